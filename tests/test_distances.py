"""Distances equal closed forms and the libraries' numbers, and their intervals say how they scatter."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from tests.ranks import run_ranks
from train.distributed.ranks import Ranks, alone
from train.evaluation.distances import BLOCKS, SCALE, SIGMA, Moments, cmmd, frechet, jackknife
from train.evaluation.scores import Score


def moments(features: np.ndarray, blocks: int = BLOCKS) -> Moments:
    found = Moments.zeros(blocks, features.shape[1], torch.device("cpu"))
    for start in range(0, len(features), 7):
        rows = torch.from_numpy(features[start : start + 7])
        found.add(range(start, start + len(rows)), rows)
    return found


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    """As pytorch-fid computes it."""
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    difference = x.mean(0) - y.mean(0)
    return difference @ difference + sum(map(np.trace, covariances)) - 2 * np.trace(root).real


def by_torch_fidelity(x: np.ndarray, y: np.ndarray) -> float:
    """As torch-fidelity computes it: no root of a matrix, but of the product's eigenvalues."""
    covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    difference = x.mean(0) - y.mean(0)
    return difference @ difference + sum(map(np.trace, covariances)) - 2 * roots


def exact(x: np.ndarray, y: np.ndarray) -> float:
    """The trace is the nuclear norm of the product of the centred samples, whatever their number."""
    a, b = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    difference = x.mean(0) - y.mean(0)
    norm = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return difference @ difference + (a * a).sum() + (b * b).sum() - 2 * norm


@pytest.mark.parametrize(("n", "m", "dim"), [(300, 200, 24), (150, 400, 96), (40, 30, 64), (25, 500, 48)])
def test_a_frechet_distance_equals_scipys_and_torch_fidelitys_also_of_few_samples(n: int, m: int, dim: int) -> None:
    """With fewer samples than dimensions, covariances are singular; directions differ a thousandfold in size."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(dim, dim)) * np.logspace(0, -3, dim)
    x, y = random.normal(size=(n, dim)) @ mix + 5, random.normal(size=(m, dim)) @ mix * 1.1 + 5.2
    found = frechet(moments(x), moments(y, 1))
    assert found.value == pytest.approx(exact(x, y), rel=1e-8)
    assert found.value == pytest.approx(by_scipy(x, y), rel=1e-6)
    assert found.value == pytest.approx(by_torch_fidelity(x, y), rel=1e-6)
    assert found.low < found.value < found.high and found.items == n
    assert frechet(moments(x), moments(x, 1)).value == pytest.approx(0, abs=1e-9 * np.trace(np.cov(x, rowvar=False)))


def test_a_frechet_distance_between_diagonal_gaussians_is_its_closed_form() -> None:
    """Orthogonal samples with exactly these means and variances: sum of (m1 - m2)^2 + (s1 - s2)^2."""
    dim, (s1, s2) = 6, (np.arange(1.0, 7.0), np.arange(7.0, 1.0, -1))
    axes = np.concatenate([np.eye(dim), -np.eye(dim)]) * math.sqrt((2 * dim - 1) / 2)
    x, y = axes * s1 + 1, axes * s2 - 2
    expected = 9 * dim + ((s1 - s2) ** 2).sum()
    assert frechet(moments(x, 1), moments(y, 1)).value == pytest.approx(expected, rel=1e-12)


def _among_ranks(ranks: Ranks, x: np.ndarray, y: np.ndarray) -> tuple[Score, Score]:
    parts = []
    for features, blocks in ((x, BLOCKS), (y, 1)):
        start, stop = (len(features) * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
        found = Moments.zeros(blocks, features.shape[1], torch.device("cpu"))
        found.add(range(start, stop), torch.from_numpy(features[start:stop]))
        found.sum_over(ranks)
        parts.append(found)
    return frechet(*parts), cmmd(torch.from_numpy(x), torch.from_numpy(y), ranks)


def test_distances_do_not_depend_on_the_number_of_ranks() -> None:
    random = np.random.default_rng(1)
    x, y = random.normal(size=(611, 12)), random.normal(size=(540, 12)) * 1.2
    expected_of_all = _among_ranks(alone(), x, y)
    for found in run_ranks(_among_ranks, 3, x, y):
        for score, expected in zip(found, expected_of_all, strict=True):
            assert vars(score) == pytest.approx(vars(expected), rel=1e-9)


def test_cmmd_is_the_authors_and_its_blocks_leave_out_what_they_say() -> None:
    """Their formula, over whole matrices: biased, of vectors of length one, sigma 10, times 1000."""
    random = np.random.default_rng(2)
    x, y = random.normal(size=(530, 8)), random.normal(size=(300, 8)) + 0.5

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        a, b = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a, b))
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * SIGMA**2)).mean()

    def theirs(a: np.ndarray) -> float:
        return SCALE * (mean_kernel(a, a) + mean_kernel(y, y) - 2 * mean_kernel(a, y))

    found = cmmd(torch.from_numpy(x), torch.from_numpy(y), alone())
    left_out = (theirs(x[np.arange(len(x)) % BLOCKS != block]) for block in range(BLOCKS))
    expected = jackknife(theirs(x), left_out, torch.full((BLOCKS,), 53))
    assert vars(found) == pytest.approx(vars(expected), rel=1e-8)
    assert cmmd(torch.from_numpy(x), torch.from_numpy(x), alone()).value == pytest.approx(0, abs=1e-9)


def test_the_jackknife_of_a_mean_is_students_interval_and_few_samples_have_none() -> None:
    """Of block means: value and error are those of ten numbers."""
    x = np.random.default_rng(3).normal(size=200)
    blocks = np.stack([x[block::BLOCKS] for block in range(BLOCKS)])
    without = [float(np.delete(blocks, block, 0).mean()) for block in range(BLOCKS)]
    found = jackknife(float(x.mean()), without, torch.full((BLOCKS,), 20))
    half = scipy.stats.t.ppf(0.975, BLOCKS - 1) * blocks.mean(1).std(ddof=1) / math.sqrt(BLOCKS)
    assert (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), rel=1e-6)
    few = jackknife(1.0, iter(()), torch.tensor([2] * 9 + [1]))
    assert few == Score(1.0, None, None, 19)


@pytest.mark.slow
def test_the_interval_of_a_frechet_distance_covers_its_mean_over_draws() -> None:
    """Over 200 draws of 400 samples, 95 % intervals hold the mean distance of such draws at least 9 times in 10."""
    random = np.random.default_rng(4)
    references = moments(random.normal(size=(400, 16)), 1)
    found = [frechet(moments(random.normal(size=(400, 16)) * 1.1 + 0.05), references) for _ in range(200)]
    mean = np.mean([score.value for score in found])
    assert 0.9 <= np.mean([score.low <= mean <= score.high for score in found]) <= 1
