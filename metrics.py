"""The formulas of fid.py, on tensors: Frechet distance, precision and recall, PSNR and SSIM. All in float64."""
import torch
import torch.nn.functional as F

NEIGHBOURS = 3  # k of precision and recall, in the paper and in ADM
WINDOW = 11  # pixels, of SSIM
ROWS = 1000  # of a block of distances


def frechet(mean1, cov1, mean2, cov2):
    """Squared Frechet distance of two Gaussians, |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2); float64.
    tr sqrt(S1 S2) is the sum of the roots of the eigenvalues of the symmetric R^T S2 R, for any R with R R^T = S1:
    real, not negative even for singular S1 and S2, and faster than a matrix square root."""
    root, singular = torch.linalg.cholesky_ex(cov1)
    if singular:  # leave out the null space, whose rounding errors of 1e-16 would count as their roots, 1e-8
        values, vectors = torch.linalg.eigh(cov1)
        keep = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        root = vectors[:, keep] * values[keep].sqrt()  # (D, rank)
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return distance.clamp(min=0).item()  # equal Gaussians give +-1e-12


def squared_distances(a, b):
    """Of the rows of a (N, D) to those of b (M, D): blocks (ROWS, M), as all of 50,000 to 50,000 would be 20 GB."""
    b = b.double()
    squares = torch.linalg.vector_norm(b, dim=1).square()
    for block in a.split(ROWS):
        block = block.double()
        # float64, since |a|^2 + |b|^2 - 2 ab loses digits: in fp32 some near ties would fall the other way
        yield torch.addmm(squares, block, b.T, alpha=-2).add_(block.square().sum(1, keepdim=True))


def precision_recall(real, fake):
    """Kynkaanniemi et al. 2019, of features (N, D) and (M, D). An image's ball reaches to its third neighbour in its
    own set. Precision: the share of fake images inside the ball of any real one; recall: of real ones inside those of
    fake ones. Inside is < as in the prdc package, not <= as in the paper: exact copies alone tell them apart."""
    # + 1, since the nearest is the image itself; topk is ten times as fast as kthvalue
    real_radius, fake_radius = (torch.cat([block.topk(NEIGHBOURS + 1, largest=False).values[:, -1]
                                           for block in squared_distances(x, x)]) for x in (real, fake))
    precise, recalled = torch.zeros_like(fake_radius, dtype=torch.bool), []
    for block, radius in zip(squared_distances(real, fake), real_radius.split(ROWS)):
        precise |= (block < radius[:, None]).any(0)
        recalled.append((block < fake_radius).any(1))
    return precise.double().mean().item(), torch.cat(recalled).double().mean().item()


def psnr_ssim(x, y):
    """Of two images, uint8 (3, H, W) -> (2,), equal to scikit-image's. SSIM as in Wang et al. 2004: a Gaussian window
    of 11 pixels, sigma 1.5, that lies wholly inside the image; mean over channels. One image fits a CPU's cache: a
    batch would take seven times as long."""
    x, y = x.double(), y.double()
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = (-(at / 1.5).square() / 2).softmax(0).view(1, 1, 1, WINDOW)  # exp(...) over their sum

    def mean(t):
        return F.conv2d(F.conv2d(t[:, None], window), window.mT)  # (3, 1, H - 10, W - 10)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    error = (x - y).square().mean() / 255**2
    # An exact copy's PSNR is infinite, and one of them would make the mean infinite: it counts as 100.
    return torch.stack([-10 * error.clamp(min=1e-10).log10(), ssim.mean()])
