"""Distances between the features of drawn and of reference pictures: Fréchet's, and CMMD.

Both come from sums over blocks of samples, added up over ranks, so no rank needs another's pictures. Intervals of 95 %
are the jackknife's over the blocks of drawn pictures, with the references held fixed. (A bootstrap would repeat the
work a thousand times, and a resample's Fréchet distance is biased upwards.) They say how much another draw of as many
pictures would change the value, and nothing of its bias: a Fréchet distance falls as the number of pictures grows,
about as 1/N, so only distances of equal numbers compare.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed.ranks import Ranks
from train.evaluation.scores import Score

BLOCKS = 10  # of the jackknife; of drawn pictures
T_95 = 2.262157  # Student's, two-sided, of BLOCKS - 1 degrees of freedom
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
ROWS = 256  # of the kernel's matrix held at once


@dataclass
class Moments:
    """Count, sum and sum of outer products of features by block: f64 [B], [B, D], [B, D, D].

    A sample's block is its number modulo B: BLOCKS for what an interval is wanted of, else 1.
    """

    counts: Tensor
    sums: Tensor
    products: Tensor

    @classmethod
    def zeros(cls, blocks: int, dim: int, device: torch.device) -> "Moments":
        shapes = ((blocks,), (blocks, dim), (blocks, dim, dim))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, numbers: Sequence[int], features: Tensor) -> None:
        """Add a batch of features [N, D]; `numbers` are those of its samples."""
        of_sample = torch.tensor(numbers, device=self.counts.device) % len(self.counts)
        for block in of_sample.unique().tolist():
            rows = features.to(self.sums)[of_sample == block]
            self.counts[block] += len(rows)
            self.sums[block] += rows.sum(0)
            self.products[block] += rows.T @ rows

    def sum_over(self, ranks: Ranks) -> None:
        """Add up all ranks' sums on each. Collective."""
        if ranks.world_size > 1:
            for tensor in (self.counts, self.sums, self.products):
                dist.all_reduce(tensor)

    def gaussian(self, without: int | None = None) -> tuple[int, Tensor, Tensor]:
        """Return count, mean f64 [D] and unbiased covariance [D, D] of all samples, or of all but one block's.

        There must be two.
        """
        kept = [block for block in range(len(self.counts)) if block != without]
        count = int(self.counts[kept].sum())
        mean = self.sums[kept].sum(0) / count
        products = self.products.sum(0) - (0 if without is None else self.products[without])
        return count, mean, (products - count * torch.outer(mean, mean)) / (count - 1)


def frechet(drawn: Moments, references: Moments) -> Score:
    """Return the Fréchet distance between the Gaussians of two sets of features: Heusel et al. 2017, equation 6.

    The trace of the root of the covariances' product is the sum of the roots of the eigenvalues of C1^½ C2 C1^½, which
    is symmetric: no complex root, no offset where they are singular.
    """
    count, mean, covariance = references.gaussian()
    root = _root(covariance, count)

    def distance(without: int | None) -> float:
        count_drawn, mean_drawn, covariance_drawn = drawn.gaussian(without)
        rank = min(count, count_drawn) - 1  # at most; see _root
        both = torch.linalg.eigvalsh(root @ covariance_drawn @ root)[-rank:].clamp(min=0).sqrt().sum()
        difference = (mean_drawn - mean).square().sum()
        return float(difference + covariance.trace() + covariance_drawn.trace() - 2 * both)

    return jackknife(distance(None), (distance(block) for block in range(BLOCKS)), drawn.counts)


def cmmd(drawn: Tensor, references: Tensor, ranks: Ranks) -> Score:
    """Return CMMD of all features f32 [N, D], which every rank has: Jayasumana et al. 2024, section 4. Collective.

    The squared maximum mean discrepancy of features scaled to length one under a Gaussian kernel, times 1000; biased,
    as in the authors' code: the kernel's means include a sample with itself. Each rank computes a share of the rows.
    """
    drawn, references = (torch.nn.functional.normalize(x.double(), dim=1) for x in (drawn, references))
    among = _kernel_sums(drawn, drawn, ranks)
    between = _kernel_sums(drawn, references, ranks).sum(1)
    of_references = _kernel_sums(references, references, ranks).sum() / len(references) ** 2
    counts = torch.bincount(torch.arange(len(drawn)) % BLOCKS, minlength=BLOCKS).double()

    def distance(without: int | None) -> float:
        kept = [block for block in range(BLOCKS) if block != without]
        count = counts[kept].sum()
        mean_among = among[kept][:, kept].sum() / count**2
        return SCALE * float(mean_among + of_references - 2 * between[kept].sum() / count / len(references))

    return jackknife(distance(None), (distance(block) for block in range(BLOCKS)), counts)


def jackknife(value: float, without_one: Iterable[float], counts: Tensor) -> Score:
    """Return `value` with the interval of its values `without_one` block each; None with less than two in a block.

    Tukey 1958; `without_one` is only asked for its values if there is an interval.
    """
    items = int(counts.sum())
    if len(counts) < BLOCKS or counts.min() < 2:
        return Score(value, None, None, items)
    values = torch.tensor(list(without_one), dtype=torch.float64)
    error = math.sqrt((BLOCKS - 1) / BLOCKS * float((values - values.mean()).square().sum()))
    return Score(value, value - T_95 * error, value + T_95 * error, items)


def _kernel_sums(left: Tensor, right: Tensor, ranks: Ranks) -> Tensor:
    """Return f64 [BLOCKS, BLOCKS] on the CPU: the kernel's sums over pairs of samples of two blocks. Collective."""
    sums = torch.zeros(len(left), BLOCKS, dtype=torch.float64)
    for start in range(ROWS * ranks.rank, len(left), ROWS * ranks.world_size):
        rows = left[start : start + ROWS]
        distances = 2 - 2 * rows @ right.T  # of vectors of length one
        kernel = torch.exp(-distances / (2 * SIGMA**2))
        for block in range(BLOCKS):
            sums[start : start + ROWS, block] = kernel[:, block::BLOCKS].sum(1).cpu()
    if ranks.world_size > 1:
        dist.all_reduce(sums, group=ranks.vote_group)
    return torch.stack([sums[block::BLOCKS].sum(0) for block in range(BLOCKS)])


def _root(covariance: Tensor, count: float) -> Tensor:
    """Return the symmetric square root of the covariance of `count` samples.

    They span fewer dimensions than there are samples; the other eigenvalues are zeros plus rounding, whose root would
    be 1e8 times as large.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values[: max(0, len(values) - int(count) + 1)] = 0
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
