"""Intervals of held-out losses: they are summed by document, and documents are drawn again (scores.bootstrap)."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch

from data.layout import IGNORE
from data.packing import PackedBatch
from model.log_snr_bins import half_width, mean_by_bin, mean_over_bins
from train.evaluation.scores import bootstrap, perplexity
from train.step import StepLoss


def by_document(batch: PackedBatch) -> PackedBatch:
    """Let losses be summed by document; parts of a document that was cut count each."""
    most = int(batch.document_ids.max()) + 1
    rows = torch.arange(len(batch.document_ids))[:, None]
    return replace(batch, group_ids=batch.document_ids.long() + rows * most, num_groups=len(rows) * most)


def of_documents(batch: PackedBatch, loss: StepLoss, patch_size: int) -> torch.Tensor:
    """Return f64 [documents, 4] of a batch as of `by_document`: text nll, text targets, image error, images."""
    groups, ones = batch.group_ids.flatten(), partial(torch.bincount, minlength=batch.num_groups)
    targets = ones(groups[batch.text_target_index[batch.text_targets != IGNORE]])
    images = torch.zeros_like(targets)
    if batch.images:
        images = ones(groups[batch.first_image_tokens(patch_size)[batch.is_target]])
    text_nll, image_error = loss.by_group
    device = text_nll.device
    found = torch.stack([text_nll, targets.to(device), image_error, images.to(device)], dim=1)
    return found[((targets > 0) | (images > 0)).to(device)]


def intervals(documents: dict[str, np.ndarray], x0_errors: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each loss that has one: the bootstrap's over documents, x0_error's normal.

    `documents` f64 [N, 4] by pass, as of `of_documents`; `x0_errors` as of model/log_snr_bins.sum_by_bin.
    """
    nothing = np.zeros((0, 4))
    found: dict[str, tuple[float, float]] = {}
    parts = (
        ("text_loss", documents["caption_first"][:, :2]),
        ("image_loss", documents["caption_first"][:, 2:]),
        ("captioning_loss", documents.get("image_first", nothing)[:, :2]),
    )
    for kind, sums_and_counts in parts:
        used = sums_and_counts[sums_and_counts[:, 1] > 0]
        used = used[np.lexsort(used.T)]  # the order of ranks must not count
        if len(used) > 1:
            score = bootstrap(used, lambda drawn: drawn[:, 0].sum() / drawn[:, 1].sum())
            assert score.low is not None and score.high is not None  # of two items and more
            found[kind] = score.low, score.high
    if "text_loss" in found:
        low, high = found["text_loss"]
        found["perplexity"] = perplexity(low), perplexity(high)
    mean, half = mean_over_bins(mean_by_bin(x0_errors)), half_width(x0_errors)
    if mean is not None and half is not None:
        found["x0_error"] = mean - half, mean + half
    return found
