"""The tokenizer: encoder E, codebook Z, decoder G (Secs. 3.1.1 and 3.4, Table 7).

    model = VQModel()                            # the paper's phase 1; attention=1 is its phase 2
    x_hat, indices, losses = model(x)            # x (B, 3, 256, 256) in [-1, 1], indices (B, 16, 16)
    x_hat = model.decode_indices(indices)        # what a prior's codes become

    python vq.py        # every level, and the parameter counts beside the paper's

Images are float (B, 3, H, W) in [-1, 1]; codes are int64 (B, h, w) with h = H / f. Nothing here depends on files
or devices.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

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
    p = 2 ** math.ceil(math.log2(min(h, w)) / 2)
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
        self.recompute = False  # True: levels keep only their input for the backward pass

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

    The contract, which any module that stands in for this one keeps (codebooks.py has Table 5's three):
        constructor        (K, z_dim, beta, gamma); what decides the codes are Parameters, which phase 2 freezes
        K                  number of codes
        nearest(z)         (N, dim) -> indices (N,) int64
        embed(indices)     (B, h, w) -> z_q (B, n_z, h, w)
        forward(z_hat)     (B, n_z, h, w) -> z_q, indices, losses; `losses` are scalars, and losses["vq"] is their
                           weighted sum, which a training script adds to its loss; the others are logged
    All of it runs in fp32, whatever the autocast."""

    def __init__(self, K, z_dim, beta=0.25, gamma=0.01):
        super().__init__()
        self.K, self.beta, self.gamma = K, beta, gamma
        self.mean = lambda usage: usage  # a training script on several processes puts their mean here, with gradient
        # Paper: silent on the start of the codebook. VQGAN's U(-1/K, 1/K); no warm-up, no K-means start.
        self.codebook = nn.Parameter(torch.empty(K, z_dim).uniform_(-1 / K, 1 / K))

    def codes(self):
        """Z: (K, dim) fp32."""
        return self.codebook.float()

    def distances(self, z):
        """Squared L2 distances (N, K) of z (N, dim) to all codes, by a matrix product.

        Expanding |z|^2 - 2 z.c + |c|^2 loses digits where all vectors share a large mean, so the mean is taken off."""
        codes = self.codes()
        mean = codes.detach().mean(0)
        z, codes = z - mean, codes - mean
        return z.square().sum(1, keepdim=True) - 2 * z @ codes.T + codes.square().sum(1)

    def nearest(self, z):
        with torch.autocast(z.device.type, enabled=False):
            return self.distances(z.float()).argmin(1)

    def embed(self, indices):
        return F.embedding(indices, self.codes()).permute(0, 3, 1, 2)

    def forward(self, z_hat):
        """-> z_q with straight-through gradient, indices, and the terms codebook, commitment, H (entropy of the soft
        usage, nats) and vq."""
        with torch.autocast(z_hat.device.type, enabled=False):
            z = z_hat.float().permute(0, 2, 3, 1)  # (B, h, w, n_z)
            shape = z.shape
            z = z.reshape(-1, shape[-1])  # (N, n_z)
            D = self.distances(z)  # (N, K)
            indices = D.argmin(1)  # Eq. 1
            z_q = F.embedding(indices, self.codes())
            # Eq. 2. Means over all elements, not sums: VQGAN, MaskGIT. beta is on the commitment term, as printed.
            losses = {"codebook": F.mse_loss(z_q, z.detach()), "commitment": F.mse_loss(z, z_q.detach())}
            # Sec. 3.4. Paper: "L2 distance" and "penalising" H. We take the squared distance (the plain one stays flat
            # and fills nothing) and maximise H: minimising it would collapse the usage it should smooth.
            # The mean runs over all positions of the global batch: 256 of one image can't use 1,024 codes.
            usage = (-D).softmax(1).mean(0)  # D-bar, (K,)
            usage = self.mean(usage) if self.training else usage
            losses["H"] = -(usage * (usage + 1e-10).log()).sum()
            losses["vq"] = losses["codebook"] + self.beta * losses["commitment"]
            losses["vq"] = losses["vq"] + self.gamma * (math.log(self.K) - losses["H"])
            z_q = z + (z_q - z).detach()  # straight through: the decoder's gradient reaches z as it is
            return z_q.reshape(shape).permute(0, 3, 1, 2), indices.reshape(shape[:3]), losses


def usage_and_perplexity(histogram):
    """Counts (K,) of codes over a validation set -> share of codes hit at least once, exp of the entropy (in codes),
    and the entropy itself in nats."""
    p = histogram.cpu().double() / histogram.sum().cpu()
    H = -(p * p.clamp(min=1e-12).log()).sum()
    return (histogram > 0).double().mean().item(), H.exp().item(), H.item()


# --------------------------------------------------------------------------------------------- the tokenizer

class VQModel(nn.Module):
    """The whole tokenizer. The defaults are the paper's phase 1; phase 2 has attention=1.

    channels: one width per level, multiples of 16; each level halves the image, f = 2^(levels - 1).
    attention, extra_blocks: see Decoder. quantizer: a class that keeps Quantizer's contract, called as Quantizer is."""

    def __init__(self, channels=(128, 128, 256, 256, 512), z_dim=256, codebook_size=1024, attention=0, extra_blocks=0,
                 beta=0.25, gamma=0.01, quantizer=Quantizer):
        super().__init__()
        if any(c % 16 for c in channels):
            raise ValueError(f"channels {channels}: each width must be a multiple of 16 (group norm and heads)")
        self.f = 2 ** (len(channels) - 1)
        self.encoder = Encoder(channels, z_dim)
        self.quantizer = quantizer(codebook_size, z_dim, beta, gamma)
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
