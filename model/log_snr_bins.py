"""The one unit of image error: mean squared error of whitened x0 by bins of log SNR = log(signal^2 / sigma^2).

Losses of different predictions, weights and schedules cannot be compared; this can. At a known noise level, predicting
noise or v is predicting x0, and the squared error times `x0_error_factor` (model/diffusion.py) is that of x0. Fixed
bins compare equal levels, whichever a schedule prefers. Nothing here waits for a device.
"""

import torch
from torch import Tensor

WIDTH = 2
EDGES = tuple(range(-6, 7, WIDTH))  # a bin holds its lower edge; levels beyond the outer two count in none
BINS = tuple(f"{low}..{low + WIDTH}" for low in EDGES[:-1])  # their names in metrics


def log_snr_of_uniform(u: Tensor) -> Tensor:
    """Return f64 [N]: log SNRs uniform over all bins, from draws u [N] in [0, 1)."""
    return EDGES[0] + (EDGES[-1] - EDGES[0]) * u.double()


def sum_by_bin(errors: Tensor, log_snr: Tensor, valid: Tensor) -> Tensor:
    """Return f64 [3, bins]: sums of x0 errors [N], numbers of images and sums of squares by bin of log SNR f64 [N].

    Images that are not `valid` (bool [N]) count nowhere, whatever their numbers.
    """
    numbers = ((log_snr - EDGES[0]) / WIDTH).floor()
    inside = (numbers[:, None] == torch.arange(len(BINS), device=errors.device)) & valid[:, None]  # [N, bins]
    counted = torch.where(inside, errors.double()[:, None], 0.0)
    return torch.stack([counted.sum(0), inside.sum(0), counted.square().sum(0)])


def mean_by_bin(sums: Tensor) -> list[float | None]:
    """Return the mean error in each bin of sums on the host, as of `sum_by_bin`; None for a bin without images."""
    return [error / count if count else None for error, count, _ in sums.T.tolist()]


def mean_over_bins(means: list[float | None]) -> float | None:
    """Return the mean of `mean_by_bin`, each bin alike; None if one is empty: without it, it is of other levels."""
    return None if None in means else sum(mean for mean in means if mean is not None) / len(means)


def half_width(sums: Tensor) -> float | None:
    """Return half the 95 % interval (normal) of `mean_over_bins` of `sum_by_bin`; None with a bin of under 2 images."""
    total, count, squares = sums
    if bool((count < 2).any()):
        return None
    variances = (squares - total.square() / count) / (count - 1) / count
    return 1.96 * float(variances.clamp(min=0).sum().sqrt()) / len(BINS)
