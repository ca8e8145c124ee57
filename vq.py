"""The tokenizer: encoder E, codebook Z, decoder G (Secs. 3.1.1 and 3.4, Table 7).

    python vq.py        # every level, and the parameter counts beside the paper's

Images are float (B, 3, H, W) in [-1, 1]; codes are int64 (B, h, w) with h = H / f. Nothing here knows of devices,
processes or training; two hooks of the quantizer (`sync`, `gather`) let a training script put a mean and a
concatenation over processes in.
"""
import hashlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from runtime import load_checkpoint, refusing, restore

CODEBOOKS = ("entropy", "none", "kmeans", "factorized")  # Table 5


# ------------------------------------------------------------------------------------------ building blocks

def norm(channels):
    """GroupNorm with 32 groups (the paper's widths), or as many as leave four channels in each and divide the width."""
    groups = next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """GN-Swish-Conv-GN-Swish-Conv, plus the block's input (through a 1x1 convolution if the channels change)."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h  # the input itself, not its norm: a well-known VQGAN port has that bug


def block_side(h, w):
    """Side p of the attention blocks at a feature map of h x w: 4, 8, 8, 16, 16 at 16, 32, 64, 128, 256 (HiT has 4 at
    16, 8 at 32 and 64), so that blocks and positions within a block stay about equally many. Where p does not divide
    the map it is halved until it does; p = 1 leaves the dilated attention to look at the whole map."""
    p = 1 << -(-(min(h, w) - 1).bit_length() // 2)
    while h % p or w % p:
        p //= 2
    return p


class BlockAttention(nn.Module):
    """Multi-head self-attention within p x p blocks, or (dilated) over all blocks at one offset; HiT [66].

    The paper gives neither heads nor initialisation: heads of 64 channels (32 at 128), and an output projection that
    starts at zero, so that phase 2 begins exactly at phase 1's reconstructions."""

    def __init__(self, c, dilated):
        super().__init__()
        self.dilated, self.heads = dilated, c // min(64, c // 4)
        self.norm, self.qkv, self.out = norm(c), nn.Linear(c, 3 * c), nn.Linear(c, c)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        """x (B, C, h, w) -> the same shape: x plus what it attends to."""
        b, c, h, w = x.shape
        p = block_side(h, w)
        t = self.norm(x).reshape(b, c, h // p, p, w // p, p)
        # dims: 0 batch, 1 channel, 2 and 4 which block, 3 and 5 where inside it. Attended positions go last but one.
        order = (0, 3, 5, 2, 4, 1) if self.dilated else (0, 2, 4, 3, 5, 1)
        t = t.permute(order)
        shape = t.shape  # (b, 2 dims of groups, 2 dims of positions, c)
        t = t.reshape(shape[0] * shape[1] * shape[2], shape[3] * shape[4], c)  # (groups, positions, c)
        q, k, v = self.qkv(t).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (groups, heads, pos, c/heads)
        t = F.scaled_dot_product_attention(q, k, v)
        t = self.out(t.transpose(1, 2).flatten(2)).reshape(shape)
        back = [order.index(d) for d in range(6)]
        return x + t.permute(back).reshape(b, c, h, w)


class Up(nn.Sequential):
    def __init__(self, c):
        super().__init__(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(c, c, 3, padding=1))


# ---------------------------------------------------------------------------------------- encoder, decoder

class Encoder(nn.Module):
    """x (B, 3, H, W) -> z_hat (B, n_z, H/f, W/f), f = 2^(levels - 1).

    Paper: Table 7 and the parameter counts disagree. This layout (two blocks a level, the first one changes the
    channels; two more at the last level; average pooling; one 1x1 quant_conv) gives the counts: see `python vq.py`."""

    def __init__(self, channels, z_dim):
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1)
        self.levels, c = nn.ModuleList(), channels[0]
        for i, width in enumerate(channels):
            blocks = 4 if i == len(channels) - 1 else 2
            level = [nn.AvgPool2d(2)] if i else []
            level += [ResBlock(c if j == 0 else width, width) for j in range(blocks)]
            self.levels.append(nn.Sequential(*level))
            c = width
        self.head = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, z_dim, 1))
        self.quant_conv = nn.Conv2d(z_dim, z_dim, 1)
        self.recompute = False  # a training script's choice: levels keep their input alone for the backward pass

    def forward(self, x):
        h = self.stem(x)  # (B, c_1, H, W)
        for level in self.levels:
            h = checkpoint(level, h, use_reentrant=False) if self.recompute else level(h)  # (B, c_i, H / 2^i, W / 2^i)
        return self.quant_conv(self.head(h))


class Decoder(nn.Module):
    """z_q (B, n_z, h, w) -> x_hat (B, 3, h f, w f).

    attention: pairs of block and dilated attention at the end of each level: 1 in phase 2, 2 in Table 1's variant.
    extra_blocks: residual blocks added to each level: 2 in Table 1's Conv x2."""

    def __init__(self, channels, z_dim, attention=0, extra_blocks=0):
        super().__init__()
        c = channels[-1]
        self.stem = nn.Conv2d(z_dim, c, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(reversed(channels)):
            blocks = (4 if i == 0 else 2) + extra_blocks
            level = [Up(c)] if i else []
            level += [ResBlock(c if j == 0 else width, width) for j in range(blocks)]
            level += [BlockAttention(width, dilated) for _ in range(attention) for dilated in (False, True)]
            self.levels.append(nn.Sequential(*level))
            c = width
        self.head = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))
        self.recompute = False  # as the encoder's

    def forward(self, z_q):
        h = self.stem(z_q)  # (B, c_last, h, w)
        for level in self.levels:
            h = checkpoint(level, h, use_reentrant=False) if self.recompute else level(h)  # (B, c_i, h 2^i, w 2^i)
        return self.head(h)


# ----------------------------------------------------------------------------------------------- quantizer

class Quantizer(nn.Module):
    """Nearest code per position (Eq. 1), the last two terms of Eq. 2, and Sec. 3.4's entropy term.

    kind: "entropy" is the paper's; the others are Table 5's: "none", "kmeans" (K-means over a reservoir of encoder
    outputs, again and again), "factorized" (codes of 32 dimensions on the unit sphere, as in ViT-VQGAN).
    All of it runs in fp32, whatever the autocast."""

    RESERVOIR, KMEANS_EVERY, KMEANS_UNTIL, KMEANS_ROUNDS = 16_384, 2_000, 30_000, 10  # in forward passes

    def __init__(self, kind, K, z_dim, beta=0.25, gamma=0.01, factorized_dim=32):
        super().__init__()
        if kind not in CODEBOOKS:
            raise ValueError(f"codebook {kind!r} is none of {', '.join(CODEBOOKS)}")
        self.kind, self.K, self.beta, self.gamma = kind, K, beta, gamma
        self.sync = lambda mean: mean  # mean over processes, with gradient; a training script sets it
        self.gather = lambda rows: rows  # rows of all processes
        self.start = ""  # "bypass" or "kmeans": where a run with --vq_start stands
        dim = z_dim
        if kind == "factorized":
            dim = factorized_dim
            self.down, self.up = nn.Linear(z_dim, dim), nn.Linear(dim, z_dim)
        # Paper: silent on the start of the codebook. VQGAN's U(-1/K, 1/K); no warm-up, no K-means start.
        self.codebook = nn.Parameter(torch.empty(K, dim).uniform_(-1 / K, 1 / K))
        if kind == "factorized":  # a uniform direction on the sphere
            nn.init.normal_(self.codebook, std=dim ** -0.5)
        if kind == "kmeans":
            self.register_buffer("reservoir", torch.zeros(self.RESERVOIR, dim))
            self.register_buffer("filled", torch.zeros((), dtype=torch.long))
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def codes(self):
        """Z: (K, dim), on the unit sphere if factorized."""
        return F.normalize(self.codebook.float(), dim=1) if self.kind == "factorized" else self.codebook.float()

    def distances(self, z):
        """Squared L2 distances (N, K) of z (N, dim) to all codes, by a matrix product.

        Expanding |z|^2 - 2 z.c + |c|^2 loses digits where all vectors share a large mean, so the mean is taken off."""
        codes = self.codes()
        mean = codes.detach().mean(0)
        z, codes = z - mean, codes - mean
        return z.square().sum(1, keepdim=True) - 2 * z @ codes.T + codes.square().sum(1)

    def embed(self, indices):
        """indices (B, h, w) -> z_q (B, n_z, h, w)."""
        z_q = F.embedding(indices, self.codes())
        if self.kind == "factorized":
            z_q = self.up(z_q)
        return z_q.permute(0, 3, 1, 2)

    def forward(self, z_hat):
        """z_hat (B, n_z, h, w) -> z_q of the same shape with straight-through gradient, indices (B, h, w), and the
        unweighted terms: codebook, commitment, H (entropy of the soft usage, nats), plus `vq`, their weighted sum."""
        with torch.autocast(z_hat.device.type, enabled=False):
            z = z_hat.float().permute(0, 2, 3, 1)  # (B, h, w, n_z)
            shape = z.shape
            z = z.reshape(-1, shape[-1])  # (N, n_z)
            if self.kind == "factorized":
                z = F.normalize(self.down(z), dim=1)
            if self.kind == "kmeans" and self.training and self.codebook.requires_grad:  # phase 2 has fixed codes
                self._kmeans(z.detach())
            if self.training and self.start == "bypass":  # --vq_start: a plain autoencoder, nothing is quantized yet
                return z_hat, None, {"vq": z.new_zeros(())}
            if self.training and self.start == "kmeans":  # then the codes begin where the encoder's outputs are
                rows = self.gather(z.detach())
                rows = rows[rows.isfinite().all(1)]
                if len(rows):  # a bad step: the next one will do
                    self._set_codes(rows, 0)
                    self.start = ""
            D = self.distances(z)  # (N, K)
            indices = D.argmin(1)  # Eq. 1
            z_q = F.embedding(indices, self.codes())
            # Eq. 2. Means over all elements, not sums: VQGAN, MaskGIT. beta is on the commitment term, as printed.
            losses = {"codebook": F.mse_loss(z_q, z.detach()), "commitment": F.mse_loss(z, z_q.detach())}
            # Sec. 3.4. Paper: "L2 distance" and "penalising" H. We take the squared distance (the plain one stays flat
            # and fills nothing) and maximise H: minimising it would collapse the usage that it is to smooth.
            # The mean runs over all positions of the global batch: 256 of one image can't use 1,024 codes.
            usage = (-D).softmax(1).mean(0)  # D-bar, (K,)
            usage = self.sync(usage) if self.training else usage
            losses["H"] = -(usage * (usage + 1e-10).log()).sum()
            losses["vq"] = losses["codebook"] + self.beta * losses["commitment"]
            if self.kind == "entropy":
                losses["vq"] = losses["vq"] + self.gamma * (math.log(self.K) - losses["H"])
            z_q = z + (z_q - z).detach()  # straight through: the decoder's gradient reaches z as it is
            if self.kind == "factorized":
                z_q = self.up(z_q)
            return z_q.reshape(shape).permute(0, 3, 1, 2), indices.reshape(shape[:3]), losses

    @torch.no_grad()
    def _kmeans(self, z):
        """Keep the newest 16,384 encoder outputs; every 2,000 steps, until step 30,000, replace the codebook by
        K-means of them. The same on every process: all see all rows, the only draw is seeded by the step, and the sums
        run on the CPU, in one order (a GPU's differ in the last bit from process to process)."""
        z = self.gather(z)
        z = z[z.isfinite().all(1)][-self.RESERVOIR:]  # a bad step must not stay in the memory
        where = (self.filled + torch.arange(len(z), device=z.device)) % self.RESERVOIR
        self.reservoir[where] = z
        self.filled += len(z)
        step = int(self.steps)
        self.steps += 1
        first = int(self.filled) >= 4 * self.K and int(self.filled) - len(z) < 4 * self.K  # its own start
        if not (first or (step and step % self.KMEANS_EVERY == 0 and step <= self.KMEANS_UNTIL)):
            return
        self._set_codes(self.reservoir[:min(int(self.filled), self.RESERVOIR)], step)

    @torch.no_grad()
    def _set_codes(self, points, seed):
        self.codebook.copy_(kmeans(points.cpu(), self.K, self.KMEANS_ROUNDS, torch.Generator().manual_seed(seed)))


def kmeans(points, K, rounds, generator):
    """Lloyd's algorithm, points (N, dim) -> centres (K, dim); a centre without points is put on a random one."""
    pick = lambda n: points[torch.randint(len(points), (n,), generator=generator)]  # noqa: E731
    centres = points[torch.randperm(len(points), generator=generator)[:K]]
    if len(centres) < K:
        centres = torch.cat([centres, pick(K - len(centres))])
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=K)
        centres = sums / counts.clamp(min=1)[:, None]
        empty = counts == 0
        centres[empty] = pick(int(empty.sum()))
    return centres


def usage_and_perplexity(histogram):
    """Counts (K,) of codes over a validation set -> share of codes hit at least once, exp of the entropy (in codes),
    and the entropy itself in nats."""
    p = histogram.cpu().double() / histogram.sum().cpu()
    H = -(p * p.clamp(min=1e-12).log()).sum()
    return (histogram > 0).double().mean().item(), H.exp().item(), H.item()


# --------------------------------------------------------------------------------------------- the tokenizer

class VQModel(nn.Module):
    """The whole tokenizer. The defaults are the paper's phase 1; phase 2 has attention=1."""

    def __init__(self, channels=(128, 128, 256, 256, 512), z_dim=256, codebook_size=1024, codebook="entropy",
                 attention=0, extra_blocks=0, beta=0.25, gamma=0.01):
        super().__init__()
        for c in channels:
            if c % 16:
                raise ValueError(f"channels {c}: each width must be a multiple of 16 (group norm and heads)")
        if not (0 <= attention <= 16 and 0 <= extra_blocks <= 16):
            raise ValueError(f"attention {attention}, extra_blocks {extra_blocks}: use 0 to 16 a level")
        self.config = dict(channels=list(channels), z_dim=z_dim, codebook_size=codebook_size, codebook=codebook,
                           attention=attention, extra_blocks=extra_blocks, beta=beta, gamma=gamma)  # VQModel(**config)
        self.f = 2 ** (len(channels) - 1)
        self.encoder = Encoder(channels, z_dim)
        self.quantizer = Quantizer(codebook, codebook_size, z_dim, beta, gamma)
        self.decoder = Decoder(channels, z_dim, attention, extra_blocks)

    def encode(self, x):
        """x (B, 3, H, W) in [-1, 1] -> z_q (B, n_z, h, w), indices (B, h, w), the quantizer's losses."""
        return self.quantizer(self.encoder(x))

    def decode(self, z_q):
        """z_q (B, n_z, h, w) -> image (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(z_q)

    def decode_indices(self, indices):
        """indices (B, h, w) -> image (B, 3, H, W)."""
        return self.decode(self.quantizer.embed(indices))

    def forward(self, x):
        z_q, indices, losses = self.encode(x)
        return self.decode(z_q), indices, losses


def fingerprint(model):
    """sha256 of all that decides an image's codes: encoder and codebook. Phase 2 leaves it as it was."""
    digest = hashlib.sha256()
    for part in (model.encoder, model.quantizer):
        for name, tensor in sorted(part.state_dict().items()):
            if name not in ("reservoir", "filled", "steps"):  # K-means' memory
                digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_tokenizer(path, device="cpu"):
    """The tokenizer of a train_tokenizer.py checkpoint, in eval mode and frozen; its averaged weights if it has them.
    `.image_size` is the size that it was trained at."""
    state = load_checkpoint(path, "tokenizer")
    with refusing(path):
        model = restore(path, lambda: VQModel(**state["config"]), state["ema"] or state["model"])
        model.image_size = int(state["args"]["image_size"])
        if model.image_size % model.f or model.image_size < 1:
            raise ValueError(f"image_size {model.image_size}")
    return model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def count(module):
    """Number of parameters in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def main():
    with torch.device("meta"):
        model = VQModel(attention=1)
        print("level               resolution  channels  blocks  params (M)")
        for name, part, sizes in (("encoder", model.encoder, (256, 128, 64, 32, 16)),
                                  ("decoder", model.decoder, (16, 32, 64, 128, 256))):
            print(f"{name} stem {count(part.stem):45.3f}")
            for i, (level, size) in enumerate(zip(part.levels, sizes)):
                blocks = [b for b in level if isinstance(b, ResBlock)]
                p = f", attention p={block_side(size, size)}" if name == "decoder" else ""
                print(f"{name} level {i + 1}  {f'{size} x {size}':>14}  {blocks[-1].conv2.out_channels:>8}  "
                      f"{len(blocks):>6}  {count(level):>10.3f}{p}")
            print(f"{name} head {count(part.head):45.3f}")
        print(f"quant_conv   {count(model.encoder.quant_conv):44.3f}")
        print(f"codebook     {count(model.quantizer):44.3f}   (1024 codes of 256)")
        print("\nmodel                      ours (M)  paper (M)")
        for name, options, paper in (("phase 1 (baselineVQ)", {}, 54.5),
                                     ("phase 2 (B&D attention)", dict(attention=1), 57.9),
                                     ("+Attention x2 (Table 1)", dict(attention=2), 61.4),
                                     ("+Conv x2 (Table 1)", dict(extra_blocks=2), 70.0)):
            print(f"{name:25} {count(VQModel(**options)):9.2f} {paper:9.1f}")


if __name__ == "__main__":
    main()
