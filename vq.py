"""The tokenizer: encoder E, codebook Z, decoder G (Secs. 3.1.1 and 3.4, Table 7).

    model = VQModel()                            # the paper's phase 1; attention=1 is its phase 2
    x_hat, indices, terms = model(x)             # x (B, 3, 256, 256), indices (B, 16, 16)
    x_hat = model.decode_indices(indices)        # decode sampled codes

    python vq.py        # parameters per level, and totals beside the paper's

Images are float (B, 3, S, S) in [-1, 1]; codes are int64 (B, h, w) with h = w = S / f.
"""
import hashlib
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------- building blocks

def norm(channels):
    """GroupNorm with 32 groups. Narrow layers (our CPU settings) have 4 channels per group."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResBlock(nn.Module):
    """GN-Swish-Conv-GN-Swish-Conv plus its input, which a 1x1 convolution maps if the number of
    channels changes."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h  # not self.shortcut(norm1(x)), a bug of one VQGAN port


def block_side(h, w):
    """Side p of the attention blocks: 4, 8, 8, 16, 16 at 16, 32, 64, 128, 256.

    HiT uses 4 at 16 and 8 at 32 and 64. We extrapolate so that the number of blocks is close to
    the number of positions per block. If p does not divide the map it is halved until it does."""
    p = 2 ** math.ceil(math.log2(min(h, w)) / 2)
    while h % p or w % p:
        p //= 2
    return p


class BlockAttention(nn.Module):
    """Self-attention within p x p blocks, or (dilated) over all blocks at one offset; HiT [66].

    The paper specifies neither the heads nor the initialization. We use heads of 64 channels (32
    at 128), and a zero output projection: phase 2 then begins exactly at phase 1's reconstructions.
    """

    def __init__(self, c, dilated):
        super().__init__()
        self.dilated, self.heads = dilated, c // min(64, c // 4)
        self.norm, self.qkv, self.out = norm(c), nn.Linear(c, 3 * c), nn.Linear(c, c)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        """x (B, C, h, w) -> x plus attention, of the same shape."""
        b, c, h, w = x.shape
        p = block_side(h, w)
        t = self.norm(x).reshape(b, c, h // p, p, w // p, p)
        # Axes: 0 batch, 1 channel, 2 and 4 which block, 3 and 5 where inside it. Positions attend
        # within a block, or (dilated) to the same place inside every block.
        order = (0, 3, 5, 2, 4, 1) if self.dilated else (0, 2, 4, 3, 5, 1)
        t = t.permute(order)
        shape = t.shape  # (B, 2 dims of groups, 2 dims of positions, C)
        t = t.reshape(shape[0] * shape[1] * shape[2], shape[3] * shape[4], c)
        qkv = self.qkv(t).unflatten(-1, (3, self.heads, -1))  # (groups, positions, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (groups, heads, positions, d)
        t = F.scaled_dot_product_attention(q, k, v)
        t = self.out(t.transpose(1, 2).flatten(2)).reshape(shape)
        back = [order.index(d) for d in range(6)]  # the inverse permutation
        return x + t.permute(back).reshape(b, c, h, w)


# --------------------------------------------------------------------------- encoder, decoder

class Encoder(nn.Module):
    """x (B, 3, S, S) -> z_hat (B, n_z, h, w), f = 2^(levels - 1).

    Table 7 and the paper's parameter counts disagree. This layout matches the counts (run
    `python vq.py`): two blocks per level, of which the first changes the channels; two more at the
    last level; average pooling; one 1x1 quant_conv. grad_checkpointing: recompute the activations
    of each level in the backward pass."""

    def __init__(self, channels, z_dim, grad_checkpointing=False):
        super().__init__()
        self.grad_checkpointing, c = grad_checkpointing, channels[0]
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(channels):
            blocks = 4 if i == len(channels) - 1 else 2
            level = [nn.AvgPool2d(2)] if i else []
            level += [ResBlock(c if j == 0 else width, width) for j in range(blocks)]
            self.levels.append(nn.Sequential(*level))
            c = width
        self.head = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, z_dim, 1))
        self.quant_conv = nn.Conv2d(z_dim, z_dim, 1)

    def forward(self, x):
        h = self.stem(x)  # (B, c_1, H, W)
        for level in self.levels:  # (B, c_i, H / 2^i, W / 2^i)
            h = checkpoint(level, h, use_reentrant=False) if self.grad_checkpointing else level(h)
        return self.quant_conv(self.head(h))


class Decoder(nn.Module):
    """z_q (B, n_z, h, w) -> x_hat (B, 3, h f, w f).

    attention: number of (block, dilated) attention pairs at the end of each level: 1 in phase 2, 2
    in Table 1. extra_blocks: residual blocks added to each level: 2 in Table 1's Conv x2."""

    def __init__(self, channels, z_dim, attention=0, extra_blocks=0, grad_checkpointing=False):
        super().__init__()
        self.grad_checkpointing, c = grad_checkpointing, channels[-1]
        self.stem = nn.Conv2d(z_dim, c, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(reversed(channels)):
            blocks = (4 if i == 0 else 2) + extra_blocks
            nearest = nn.Upsample(scale_factor=2)
            level = [nn.Sequential(nearest, nn.Conv2d(c, c, 3, padding=1))] if i else []
            level += [ResBlock(c if j == 0 else width, width) for j in range(blocks)]
            for _ in range(attention):
                level += [BlockAttention(width, dilated=False), BlockAttention(width, dilated=True)]
            self.levels.append(nn.Sequential(*level))
            c = width
        self.head = nn.Sequential(norm(c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, z_q):
        h = self.stem(z_q)  # (B, c_last, h, w)
        for level in self.levels:  # (B, c_i, h 2^i, w 2^i)
            h = checkpoint(level, h, use_reentrant=False) if self.grad_checkpointing else level(h)
        return self.head(h)


# ---------------------------------------------------------------------------------- quantizer

def global_mean(tensor):
    """Mean over all processes of torch.distributed. The backward pass treats the result as the
    local tensor. DDP then averages the gradients, which gives the gradient of the mean."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size() + tensor - tensor.detach()


def all_gather_rows(tensor):
    """Concatenate the rows of all processes in rank order (equal shapes, no gradient)."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    tensor = tensor.contiguous()
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor)
    return torch.cat(rows)


class Quantizer(nn.Module):
    """The nearest code (Eq. 1), the last two terms of Eq. 2, and the entropy term of Sec. 3.4. All
    is computed in fp32.

    A replacement must provide
        constructor        (codebook_size, z_dim, beta, gamma), and the attribute codebook_size
        embed(indices)     (B, h, w) -> z_q (B, n_z, h, w)
        forward(z_hat)     (B, n_z, h, w) -> z_q, indices (B, h, w), terms: a dict of scalars.
                           terms["vq"] is added to the tokenizer's loss, the others are logged
    and store all that determines the codes as Parameters, which phase 2 freezes."""

    def __init__(self, codebook_size, z_dim, beta=0.25, gamma=0.01):
        super().__init__()
        self.codebook_size, self.beta, self.gamma = codebook_size, beta, gamma
        # The paper does not specify the initialization. This is VQGAN's.
        start = torch.empty(codebook_size, z_dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        self.codebook = nn.Parameter(start)

    def codebook_vectors(self):
        """Z: (K, dim) fp32, the vector of each code."""
        return self.codebook.float()

    def distances(self, z):
        """Squared L2 distances (N, K) of z (N, dim) to all codes, by a matrix product.

        |z|^2 - 2 z.c + |c|^2 loses digits if the vectors have a large common mean. So the mean is
        subtracted first."""
        vectors = self.codebook_vectors()
        mean = vectors.detach().mean(0)
        z, vectors = z - mean, vectors - mean
        return z.square().sum(1, keepdim=True) - 2 * z @ vectors.T + vectors.square().sum(1)

    def embed(self, indices):
        return F.embedding(indices, self.codebook_vectors()).permute(0, 3, 1, 2)

    def forward(self, z_hat):
        """-> z_q with straight-through gradient, indices, and the terms codebook, commitment,
        soft_entropy (H of the soft usage, nats), vq (their weighted sum), code_deviation."""
        with torch.autocast(z_hat.device.type, enabled=False):
            z = z_hat.float().permute(0, 2, 3, 1)  # (B, h, w, n_z)
            shape = z.shape
            z = z.reshape(-1, shape[-1])  # (N, n_z)
            D = self.distances(z)  # (N, K)
            indices = D.argmin(1)  # Eq. 1
            vectors = self.codebook_vectors()
            z_q = F.embedding(indices, vectors)
            # Eq. 2. Means over all elements, not sums: VQGAN, MaskGIT.
            codebook = F.mse_loss(z_q, z.detach())
            commitment = F.mse_loss(z, z_q.detach())
            # Sec. 3.4. The paper says "L2 distance". We square it: the softmax of plain distances
            # stays flat and gives no gradient. The paper says "penalising" H. We maximize it:
            # minimizing it would collapse the usage. We average over all positions of the global
            # batch: the 256 positions of one image cannot use 1,024 codes.
            soft_usage = (-D).softmax(1).mean(0)  # D-bar, (K,)
            if self.training:
                soft_usage = global_mean(soft_usage)
            H = -(soft_usage * (soft_usage + 1e-10).log()).sum()
            vq = codebook + self.beta * commitment  # beta on the commitment term, as printed
            vq = vq + self.gamma * (math.log(self.codebook_size) - H)
            z_q = z + (z_q - z).detach()  # straight through: the decoder's gradient reaches z
            z_q, indices = z_q.reshape(shape).permute(0, 3, 1, 2), indices.reshape(shape[:3])
            # With n_z = 256, once this standard deviation exceeds about 0.5, unused codes get no
            # gradient from the entropy term.
            deviation = vectors.detach().std(0).mean()
            return z_q, indices, {"codebook": codebook, "commitment": commitment,
                                  "soft_entropy": H, "vq": vq, "code_deviation": deviation}


def usage_and_perplexity(histogram):
    """Counts (K,) of codes over a validation set -> fraction of codes used at least once, exp of
    the entropy (in codes), and the entropy in nats."""
    histogram = histogram.cpu()  # MPS has no float64
    p = histogram.double() / histogram.sum()
    H = -(p * p.clamp(min=1e-12).log()).sum()
    return (histogram > 0).float().mean().item(), H.exp().item(), H.item()


def l1_and_psnr(x_hat, x):
    """L1 of reconstructions, clamped to [-1, 1], and their PSNR in dB: means over the batch."""
    x_hat = x_hat.clamp(-1, 1)
    mse = ((x_hat - x) / 2).square().mean((1, 2, 3))  # of values in [0, 1]
    psnr = -10 * mse.clamp(min=1e-10).log10()
    return (x_hat - x).abs().mean(), psnr.mean()


# ------------------------------------------------------------------------------ the tokenizer

class VQModel(nn.Module):
    """The whole tokenizer. The defaults are the paper's phase 1; phase 2 has attention=1.

    channels: width of each level, a multiple of 16, and of 64 above 128. The downsampling factor
    is f = 2^(levels - 1).
    quantizer: a name in QUANTIZERS. commitment_weight, entropy_weight: beta and gamma of Quantizer.
    attention, extra_blocks: see Decoder. grad_checkpointing: see Encoder."""

    # More than five arguments: `config` makes the same model from a checkpoint.
    def __init__(self, channels=(128, 128, 256, 256, 512), z_dim=256, quantizer="vq",
                 codebook_size=1024, commitment_weight=0.25, entropy_weight=0.01, attention=0,
                 extra_blocks=0, grad_checkpointing=False):
        super().__init__()
        self.config = dict(channels=channels, z_dim=z_dim, quantizer=quantizer,
                           codebook_size=codebook_size, commitment_weight=commitment_weight,
                           entropy_weight=entropy_weight, attention=attention,
                           extra_blocks=extra_blocks)
        self.f, self.attention = 2 ** (len(channels) - 1), attention
        self.encoder = Encoder(channels, z_dim, grad_checkpointing)
        self.quantizer = QUANTIZERS[quantizer](codebook_size, z_dim, beta=commitment_weight,
                                               gamma=entropy_weight)
        self.decoder = Decoder(channels, z_dim, attention, extra_blocks, grad_checkpointing)

    def encode(self, x):
        """x (B, 3, S, S) in [-1, 1] -> z_q (B, n_z, h, w), indices (B, h, w), the terms."""
        return self.quantizer(self.encoder(x))

    def decode(self, z_q):
        """z_q (B, n_z, h, w) -> image (B, 3, S, S), about [-1, 1], not clamped."""
        # At most 64 images at a time: larger batches exceed the attention kernels' grid limits.
        parts = z_q.split(64) if self.attention else [z_q]
        x_hat = torch.cat([self.decoder(part) for part in parts])
        # always fp32 and channels_last, so that compiled networks see one dtype and layout
        return x_hat.float().contiguous(memory_format=torch.channels_last)

    def decode_indices(self, indices):
        """indices (B, h, w) -> image (B, 3, S, S)."""
        return self.decode(self.quantizer.embed(indices))

    def forward(self, x):
        z_q, indices, terms = self.encode(x)
        return self.decode(z_q), indices, terms


def load_tokenizer(path, device="cpu"):
    """A checkpoint of train_tokenizer.py -> the model, frozen and in eval mode, and the whole
    checkpoint, a dict whose "args" are the flags of the run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["component"] != "tokenizer":
            raise ValueError(f"it holds a {state['component']}")
        model = VQModel(**state["config"])
        model.load_state_dict(state["model"])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise SystemExit(f"{path} is not a checkpoint of train_tokenizer.py ({reason}). "
                         f"docs/running.md converts old ones") from error
    model.requires_grad_(False).eval()
    return model.to(device, memory_format=torch.channels_last), state


def fingerprint(model):
    """Hash of the encoder and the codebook, which determine the codes. Phase 2 keeps both."""
    digest = hashlib.sha256()
    for part in (model.encoder, model.quantizer):
        for name, p in sorted(part.named_parameters()):
            digest.update(name.encode() + p.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- Table 5's other quantizers
# "kmeans" is a Quantizer. train_tokenizer.py replaces its codebook by K-means every 2,000 steps.

def kmeans(points, K, seed=0, rounds=10):
    """Lloyd's algorithm on the CPU: points (N, dim) -> centers (K, dim). Non-finite points are
    ignored. An empty cluster is re-seeded with a random point."""
    points = points[points.isfinite().all(1)].cpu()
    generator = torch.Generator().manual_seed(seed)

    def random_points(n):
        return points[torch.randint(len(points), (n,), generator=generator)]

    centers = points[torch.randperm(len(points), generator=generator)[:K]]
    centers = torch.cat([centers, random_points(K - len(centers))])
    for _ in range(rounds):
        nearest = torch.cdist(points, centers).argmin(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=K)
        centers = sums / counts.clamp(min=1)[:, None]
        empty = counts == 0
        centers[empty] = random_points(int(empty.sum()))
    return centers


class Factorized(Quantizer):
    """ViT-VQGAN's quantizer: features are projected to 32 dimensions and compared with the codes on
    the unit sphere. z_q is projected back to n_z dimensions."""

    def __init__(self, codebook_size, z_dim, beta=0.25, gamma=0.0, dim=32):
        down, up = nn.Linear(z_dim, dim), nn.Linear(dim, z_dim)
        super().__init__(codebook_size, dim, beta, gamma)
        self.down, self.up = down, up
        nn.init.normal_(self.codebook, std=dim ** -0.5)  # a uniform direction on the sphere

    def codebook_vectors(self):
        return F.normalize(self.codebook.float(), dim=1)

    def embed(self, indices):
        with torch.autocast(indices.device.type, enabled=False):
            return self.up(F.embedding(indices, self.codebook_vectors())).permute(0, 3, 1, 2)

    def forward(self, z_hat):
        with torch.autocast(z_hat.device.type, enabled=False):
            z = F.normalize(self.down(z_hat.float().permute(0, 2, 3, 1)), dim=-1)  # (B, h, w, 32)
            z_q, indices, terms = super().forward(z.permute(0, 3, 1, 2))
            return self.up(z_q.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), indices, terms


QUANTIZERS = {"vq": Quantizer, "kmeans": Quantizer, "factorized": Factorized}  # --quantizer


# ---------------------------------------------------------------------- the parameter counts

def millions(module):
    """Number of parameters in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def main():
    with torch.device("meta"):
        model = VQModel(attention=1)
        for name, levels in (("encoder", model.encoder.levels), ("decoder", model.decoder.levels)):
            for i, level in enumerate(levels):
                size = 256 >> i if name == "encoder" else 16 << i
                print(f"{name} at {size:3} x {size:3} {millions(level):12.3f}M")
        print("\nmodel                        ours   paper")
        for name, options, paper in (("phase 1 (baselineVQ)", {}, 54.5),
                                     ("phase 2 (B&D attention)", dict(attention=1), 57.9),
                                     ("+Attention x2 (Table 1)", dict(attention=2), 61.4),
                                     ("+Conv x2 (Table 1)", dict(extra_blocks=2), 70.0)):
            print(f"{name:25} {millions(VQModel(**options)):6.2f}M {paper:6.1f}M")


if __name__ == "__main__":
    main()
