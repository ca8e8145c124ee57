"""Table 5's alternatives to the paper's quantizer. Each keeps the contract in vq.Quantizer's docstring.

    none         VQGAN's plain codebook, without the entropy term
    kmeans       K-means over a reservoir of encoder outputs replaces the codebook again and again
    factorized   codes of 32 dimensions on the unit sphere (ViT-VQGAN)
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from vq import Quantizer


class Plain(Quantizer):
    def __init__(self, K, z_dim, beta=0.25, gamma=0.0):
        super().__init__(K, z_dim, beta, gamma=0.0)  # whatever --gamma says


class KMeans(Plain):
    """The newest 16,384 encoder outputs are kept; every 2,000 steps, until step 30,000, K-means of them replaces the
    codebook. The same on every process: all see all rows, the only random draw is seeded by the step, and the sums run
    on the CPU, in one order (a GPU's differ in the last bit from process to process)."""

    RESERVOIR, EVERY, UNTIL = 16_384, 2_000, 30_000  # rows; forward passes

    def __init__(self, K, z_dim, beta=0.25, gamma=0.0):
        super().__init__(K, z_dim, beta)
        self.gather = lambda rows: rows  # a training script puts the concatenation over processes here
        self.register_buffer("reservoir", torch.zeros(self.RESERVOIR, z_dim))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, z_hat):
        if self.training and self.codebook.requires_grad:  # phase 2 has fixed codes
            self.update(z_hat.detach().float().permute(0, 2, 3, 1).flatten(0, 2))
        return super().forward(z_hat)

    @torch.no_grad()
    def update(self, z):
        z = self.gather(z)
        z = z[z.isfinite().all(1)][-self.RESERVOIR:]  # a bad step must not stay in the memory
        where = (self.filled + torch.arange(len(z), device=z.device)) % self.RESERVOIR
        self.reservoir[where] = z
        self.filled += len(z)
        step, filled = int(self.steps), int(self.filled)
        self.steps += 1
        first = filled >= 4 * self.K and filled - len(z) < 4 * self.K  # its own start
        if first or (step and step % self.EVERY == 0 and step <= self.UNTIL):
            self.codebook.copy_(kmeans(self.reservoir[:min(filled, self.RESERVOIR)], self.K, seed=step))


class Factorized(Plain):
    """Features are projected to 32 dimensions and normalised, as the codes are; z_q is projected back."""

    def __init__(self, K, z_dim, beta=0.25, gamma=0.0, dim=32):
        down, up = nn.Linear(z_dim, dim), nn.Linear(dim, z_dim)
        super().__init__(K, dim, beta)
        self.down, self.up = down, up
        nn.init.normal_(self.codebook, std=dim ** -0.5)  # a uniform direction on the sphere

    def codes(self):
        return F.normalize(self.codebook.float(), dim=1)

    def embed(self, indices):
        with torch.autocast(indices.device.type, enabled=False):
            return self.up(F.embedding(indices, self.codes())).permute(0, 3, 1, 2)

    def forward(self, z_hat):
        with torch.autocast(z_hat.device.type, enabled=False):
            z = F.normalize(self.down(z_hat.float().permute(0, 2, 3, 1)), dim=-1)  # (B, h, w, 32)
            z_q, indices, losses = super().forward(z.permute(0, 3, 1, 2))
            return self.up(z_q.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), indices, losses


def kmeans(points, K, seed, rounds=10):
    """Lloyd's algorithm on the CPU, points (N, dim) -> centres (K, dim); a centre without points is put on a random
    one."""
    points, generator = points.cpu(), torch.Generator().manual_seed(seed)
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


CODEBOOKS = {"entropy": Quantizer, "none": Plain, "kmeans": KMeans, "factorized": Factorized}  # of --codebook
