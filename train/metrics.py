"""Metrics: sums over the steps of a log interval, reduced over ranks once (P9). docs/metrics.md explains each."""

import math
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.lane_state import LaneState
from data.loader import epochs
from data.packing import PADDING_DOCUMENT, PackedBatch
from model.log_snr_bins import BINS, mean_by_bin, mean_over_bins
from train.distributed.ranks import Ranks
from train.evaluation.scores import perplexity
from train.flops import Flops
from train.hardware import find, probe_seconds
from train.next_batch import AgreedBatch
from train.optim.part_norms import sizes
from train.step import StepLoss

ORDERS = ("caption_first", "image_first")
HOST_SUMS = (
    "slots",
    "rows",
    "idle_rows",
    "flops",
    "flops_again",
    "flops_by_bagel",
    "image_tokens",
    "clean_images",
    "data_wait_s",
)
BY_SOURCE = ("text_targets", "images", "tokens", "documents")


@dataclass(frozen=True)
class _OfRank:
    """What a rank tells the others at a row, besides sums."""

    epochs: np.ndarray  # int64 [lanes, sources]
    skips: Counter[str]  # by reason, since the run began
    peers_wait_s: float
    attention_pairs: int
    host: str
    host_memory_gib: float
    device_memory_gib: float
    probe_s: float  # of equal products on its GPU


class Interval:
    """Sums over the steps since the last row; `row()` reduces them over ranks and resets them."""

    def __init__(self, flops: Flops, ranks: Ranks, sources: Sequence[str], part_sizes: Mapping[str, int] | None = None):
        """`part_sizes`: how many trained weights each part of the model has, for the norms of its gradients."""
        self.flops, self.ranks, self.sources, self.part_sizes = flops, ranks, sources, dict(part_sizes or {})
        on_cuda = ranks.device.type == "cuda"
        gpu = find(torch.cuda.get_device_name(ranks.device)) if on_cuda else None
        self.peak_flops = 1e12 * gpu.peak_tflops if gpu else None
        self._reset(time.monotonic())

    def _reset(self, now: float) -> None:
        # Text nll and image error, their sums by source and order, the x0 errors' sums by bin of log SNR.
        numbers = 2 + 2 * len(self.sources) + len(ORDERS) + 3 * len(BINS)
        self._device_sums = torch.zeros(numbers, dtype=torch.float64, device=self.ranks.device)
        self._sums = dict.fromkeys(HOST_SUMS, 0.0)
        self._by_source = np.zeros((len(BY_SOURCE), len(self.sources)))
        self._of_order = np.zeros(len(ORDERS))  # images
        self._global = dict.fromkeys(("text_targets", "images", "tokens"), 0)
        self._last: dict[str, Any] = {}  # of the last step only
        self._parts: dict[str, torch.Tensor] = {}  # likewise
        self._attention_pairs = 0  # of this rank's sequences
        self._peers_wait_s = 0.0  # this rank waited for the others
        self.num_steps = 0
        self.checkpoint_s = 0.0  # the loop waited for saves
        self.evaluation_s = 0.0  # it spent on evaluations and previews
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._start = now

    def add(
        self,
        agreed: AgreedBatch,
        losses: list[StepLoss],
        grad_norm: torch.Tensor,
        parts: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Add one step of this rank; the global counts are the vote's, `parts` what `PartNorms.sums` measured."""
        batch, vote = agreed.batch, agreed.vote
        assert batch is not None
        for loss in losses:
            both = torch.stack([loss.text_nll, loss.image_error]).to(torch.float64)
            sums = (both, loss.by_group.flatten(), loss.by_order, loss.x0_errors.flatten())
            self._device_sums += torch.cat(sums)
        for micro_batch in batch.micro_batches:  # still on the host
            self._count(micro_batch)
        for positions in batch.documents.values():
            for source, *_ in positions:
                self._by_source[-1, source] += 1
        self._sums["data_wait_s"] += agreed.data_wait_s
        self._peers_wait_s += agreed.peers_wait_s
        self._global["text_targets"] += vote.text_targets
        self._global["images"] += vote.images
        self._global["tokens"] += vote.tokens
        self._last = {"grad_norm": grad_norm, "skipped_documents": vote.documents_skipped}
        self._parts = dict(parts or {})
        self.num_steps += 1

    def _count(self, batch: PackedBatch) -> None:
        """Add what a micro-batch holds."""
        first_documents, groups = batch.document_ids[:, 0], batch.group_ids.flatten()
        model, again = self.flops.of_batch(batch)
        patch_size = math.isqrt(self.flops.patch_cells)
        counts = (
            *(batch.input_ids.numel(), len(first_documents), int((first_documents == PADDING_DOCUMENT).sum())),
            *(model, again, self.flops.of_batch_by_bagel(batch), batch.num_image_tokens(patch_size)),
            batch.num_clean_images,
        )
        for name, count in zip(HOST_SUMS, counts, strict=False):
            self._sums[name] += count
        self._attention_pairs += batch.num_attention_pairs
        used = [groups[batch.text_target_index[: batch.num_text_targets]]]
        if batch.images:
            later = torch.cat([of.before_caption for of in batch.images.values()])[batch.is_target]
            used.append(groups[batch.first_image_tokens(patch_size)[batch.is_target]])
            self._of_order += np.array([int((~later).sum()), int(later.sum())])
        else:
            used.append(groups[:0])
        used.append(groups[batch.document_ids.flatten() != PADDING_DOCUMENT])
        for counted, of in zip(self._by_source, used, strict=False):
            counted += np.bincount(of.numpy(), minlength=len(self.sources))

    def row(self, lane_states: dict[int, LaneState]) -> dict[str, float]:
        """Return the interval's metrics, on every rank the same but for its clock. Collective; waits for the device."""
        fetched = [self._device_sums, *self._parts.values()]
        host = [np.array(list(self._sums.values())), self._by_source.ravel(), self._of_order]
        sums = torch.cat([torch.cat(fetched).cpu(), *map(torch.from_numpy, host)])
        dist.all_reduce(sums, group=self.ranks.vote_group)
        now = time.monotonic()  # after the waits for device and peers, which are part of the steps
        of_ranks: list[_OfRank] = self.ranks.gather(self._of_rank(lane_states))
        seconds, lengths = now - self._start, [2, 2 * len(self.sources), len(ORDERS), 3 * len(BINS)]
        lengths += [4 * len(self._parts), len(HOST_SUMS), self._by_source.size, len(ORDERS)]
        losses, by_source, by_order, by_bin, parts, others, counts, of_order = sums.split(lengths)
        of_sources = dict(zip(BY_SOURCE, counts.view(len(BY_SOURCE), -1).tolist(), strict=True))
        totals = dict(zip(HOST_SUMS, others.tolist(), strict=True))
        row = {
            "interval_steps": self.num_steps,  # that the sums and means below are over
            **self._losses(float(losses[0]), float(losses[1]), by_bin.view(3, -1)),
            **self._losses_by(by_source.view(2, -1).tolist(), of_sources, by_order.tolist(), of_order.tolist()),
            **self._gradients(parts.view(-1, 4).tolist()),
            **self._data(totals, of_sources, of_ranks),
            **self._speed(totals, seconds, of_ranks),
            "time": time.time(),  # seconds since 1970
        }
        self._reset(now)
        return row

    def _of_rank(self, lane_states: dict[int, LaneState]) -> _OfRank:
        skips = sum((Counter(state.skipped) for state in lane_states.values()), Counter[str]())
        memory, probe_s = _memory_gib(), probe_seconds(self.ranks.device)
        wait_s, pairs = self._peers_wait_s, self._attention_pairs
        return _OfRank(epochs(lane_states), skips, wait_s, pairs, socket.gethostname(), *memory, probe_s)

    def _losses(self, text_nll: float, image_error: float, x0_sums: torch.Tensor) -> dict[str, float | None]:
        counts, x0_errors = self._global, mean_by_bin(x0_sums)
        text_loss = _mean(text_nll, counts["text_targets"])
        return {
            "text_loss": text_loss,
            "perplexity": None if text_loss is None else perplexity(text_loss),
            "image_loss": _mean(image_error, counts["images"]),
            "x0_error": mean_over_bins(x0_errors),
            **{f"x0_error/{name}": error for name, error in zip(BINS, x0_errors, strict=True) if error is not None},
        }

    def _losses_by(
        self, by_source: list[list[float]], counts: dict[str, list[float]], by_order: list[float], images: list[float]
    ) -> dict[str, float]:
        """Return the losses of each source and order that had targets or images."""
        found: dict[str, float | None] = {}
        for name, nll, targets in zip(self.sources, by_source[0], counts["text_targets"], strict=True):
            if (loss := _mean(nll, targets)) is not None:
                found |= {f"text_loss/{name}": loss, f"perplexity/{name}": perplexity(loss)}
        for name, error, count in zip(self.sources, by_source[1], counts["images"], strict=True):
            found[f"image_loss/{name}"] = _mean(error, count)
        for name, error, count in zip(ORDERS, by_order, images, strict=True):
            found[f"image_loss_by_order/{name}"] = _mean(error, count)
        return {name: value for name, value in found.items() if value is not None}

    def _gradients(self, parts: list[list[float]]) -> dict[str, float | None]:
        found: dict[str, float | None] = {"grad_norm": float(self._last["grad_norm"])}
        for part, sums in zip(self._parts, parts, strict=True):
            found[f"grad_norm/{part}"], found[f"update_ratio/{part}"] = sizes(sums, self.part_sizes[part])
        return found

    def _data(
        self, totals: dict[str, float], of_sources: dict[str, list[float]], of_ranks: list[_OfRank]
    ) -> dict[str, float]:
        """Return what was trained on."""
        epoch, tokens = np.concatenate([rank.epochs for rank in of_ranks]), self._global["tokens"]  # [L, sources]
        skips = sum((rank.skips for rank in of_ranks), Counter[str]())
        by_source = {
            **{f"epoch/{name}": float(of.mean()) for name, of in zip(self.sources, epoch.T, strict=True)},
            **{
                f"{kind}/{name}": int(count)
                for kind in BY_SOURCE[1:]
                for name, count in zip(self.sources, of_sources[kind], strict=True)
            },
        }
        return {
            "text_tokens": tokens - int(totals["image_tokens"]),
            "image_tokens": int(totals["image_tokens"]),
            "text_targets": self._global["text_targets"],
            "clean_images": int(totals["clean_images"]),
            "padding_share": 1 - tokens / max(totals["slots"], 1),
            "idle_row_share": totals["idle_rows"] / max(totals["rows"], 1),
            "skipped_documents": self._last["skipped_documents"],
            **{f"skips/{reason}": count for reason, count in sorted(skips.items())},
            "epoch_min": int(epoch.min()),
            "epoch_mean": float(epoch.mean()),
            "epoch_max": int(epoch.max()),
            **by_source,
        }

    def _speed(self, totals: dict[str, float], seconds: float, of_ranks: list[_OfRank]) -> dict[str, Any]:
        """Return how fast it went, on what and waiting for what."""
        waits, probes = [rank.peers_wait_s for rank in of_ranks], [rank.probe_s for rank in of_ranks]
        slowest, lag_share = _slowest(waits, probes, seconds)
        pairs: list[int] = [rank.attention_pairs for rank in of_ranks]
        rank_seconds = seconds * self.ranks.world_size
        model_flops, peak = totals["flops"], self.peak_flops

        def of_peak(flops: float) -> float | None:
            return flops / rank_seconds / peak if peak else None

        return {
            "tokens_per_s": self._global["tokens"] / seconds,
            "images_per_s": self._global["images"] / seconds,
            "step_s": seconds / max(self.num_steps, 1),
            "data_stall_share": totals["data_wait_s"] / rank_seconds,
            "checkpoint_stall_share": self.checkpoint_s / seconds,
            "evaluation_share": self.evaluation_s / seconds,
            "model_tflops_per_s_per_rank": model_flops / rank_seconds / 1e12,
            "mfu": of_peak(model_flops),
            "hfu": of_peak(model_flops + totals["flops_again"]),
            "mfu_bagel": of_peak(totals["flops_by_bagel"]),
            "attention_imbalance": max(pairs) / max(float(np.mean(pairs)), 1.0),
            "slowest_rank": slowest,
            "slowest_host": of_ranks[slowest].host,
            "slowest_lag_share": lag_share,
            "host_memory_gib": max(rank.host_memory_gib for rank in of_ranks),
            "device_memory_gib": max(rank.device_memory_gib for rank in of_ranks),
        }


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _slowest(peers_wait_s: Sequence[float], probes_s: Sequence[float], seconds: float) -> tuple[int, float]:
    """Return the rank that holds the others up most, and for what share of the time they wait for it.

    By its host: it waits least for the others' batches. By its device: the same work takes longest (0: no GPU).
    """
    by_host = int(np.argmin(peers_wait_s)), (max(peers_wait_s) - min(peers_wait_s)) / seconds
    if not max(probes_s):
        return by_host
    by_device = int(np.argmax(probes_s)), 1 - min(probes_s) / max(probes_s)
    return max(by_host, by_device, key=lambda found: found[1])


def _memory_gib() -> tuple[float, float]:
    """Return this process's resident memory, and its device's peak since the last row."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30, device / 2**30
