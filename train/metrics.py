"""Metrics: sums over the steps of a log interval, reduced over ranks once (P9). docs/metrics.md explains each."""

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data.lane_state import LaneState
from data.loader import epochs
from data.packing import PADDING_DOCUMENT
from model.log_snr_bins import BINS, mean_by_bin, mean_over_bins
from train.distributed.ranks import Ranks
from train.flops import Flops
from train.hardware import find, probe_seconds
from train.next_batch import AgreedBatch
from train.step import StepLoss


class Interval:
    """Sums over the steps since the last row; `row()` reduces them over ranks and resets them."""

    def __init__(self, flops: Flops, ranks: Ranks, sources: Sequence[str]):
        self.flops, self.ranks, self.sources = flops, ranks, sources
        on_cuda = ranks.device.type == "cuda"
        gpu = find(torch.cuda.get_device_name(ranks.device)) if on_cuda else None
        self.peak_flops = gpu and 1e12 * gpu.peak_tflops
        self._reset(time.monotonic())

    def _reset(self, now: float) -> None:
        # Text nll, image error, and the x0 errors' sums and counts by bin of log SNR.
        self._device_sums = torch.zeros(2 + 2 * len(BINS), dtype=torch.float64, device=self.ranks.device)
        self._sums = dict.fromkeys(("slots", "rows", "idle_rows", "flops", "flops_again", "data_wait_s"), 0.0)
        self._global = dict.fromkeys(("text_targets", "images", "tokens"), 0)
        self._last: dict[str, Any] = {}  # of the last step only
        self._attention_pairs = 0  # of this rank's sequences
        self._documents = [0] * len(self.sources)  # of this rank by source; each part of a cut one counts
        self._peers_wait_s = 0.0  # this rank waited for the others
        self.num_steps = 0
        self.checkpoint_s = 0.0  # the loop waited for saves
        self.evaluation_s = 0.0  # it spent on evaluations and previews
        if self.ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._start = now

    def add(self, agreed: AgreedBatch, losses: list[StepLoss], grad_norm: torch.Tensor) -> None:
        """Add one step of this rank; the global counts are the vote's."""
        batch, vote = agreed.batch, agreed.vote
        assert batch is not None
        for loss in losses:
            losses_of_both = torch.stack([loss.text_nll, loss.image_error]).to(torch.float64)
            self._device_sums += torch.cat([losses_of_both, loss.x0_errors.flatten()])
        for micro_batch in batch.micro_batches:
            first_documents = micro_batch.document_ids[:, 0]  # still on the host
            self._sums["slots"] += micro_batch.input_ids.numel()
            self._sums["rows"] += len(first_documents)
            self._sums["idle_rows"] += int((first_documents == PADDING_DOCUMENT).sum())
            model, again = self.flops.of_batch(micro_batch)
            self._sums["flops"] += model
            self._sums["flops_again"] += again
            self._attention_pairs += micro_batch.num_attention_pairs
        for positions in batch.documents.values():
            for source, *_ in positions:
                self._documents[source] += 1
        self._sums["data_wait_s"] += agreed.data_wait_s
        self._peers_wait_s += agreed.peers_wait_s
        self._global["text_targets"] += vote.text_targets
        self._global["images"] += vote.images
        self._global["tokens"] += vote.tokens
        self._last = {"grad_norm": grad_norm, "skipped_documents": vote.documents_skipped}
        self.num_steps += 1

    def row(self, lane_states: dict[int, LaneState]) -> dict[str, float]:
        """Return the interval's metrics, the same on every rank. Collective; waits for the device."""
        sums = torch.cat([self._device_sums.cpu(), torch.tensor(list(self._sums.values()), dtype=torch.float64)])
        dist.all_reduce(sums, group=self.ranks.vote_group)
        now = time.monotonic()  # after the waits for device and peers, which are part of the steps
        seconds = now - self._start
        losses, by_bin, others = sums.tensor_split([2, 2 + 2 * len(BINS)])
        (text_nll, image_error), x0_errors = losses.tolist(), mean_by_bin(by_bin.view(2, -1))
        slots, rows, idle_rows, model_flops, flops_again, data_wait_s = others.tolist()
        flops_per_s = model_flops / seconds / self.ranks.world_size
        hardware_share = (model_flops + flops_again) / max(model_flops, 1)
        probe_s = probe_seconds(self.ranks.device)
        mine = (epochs(lane_states), self._documents, self._attention_pairs, socket.gethostname(), *_memory_gib())
        gathered = zip(*self.ranks.gather((*mine, self._peers_wait_s, probe_s)), strict=True)
        of_ranks, documents, pairs, hosts, host_gib, device_gib, peers_wait_s, probes_s = gathered
        epoch = np.concatenate(of_ranks)  # [L, sources]
        slowest, lag_share = _slowest(peers_wait_s, probes_s, seconds)
        counts, world_size = self._global, self.ranks.world_size
        row = {
            "interval_steps": self.num_steps,  # that the sums and means below are over
            "text_loss": text_nll / counts["text_targets"] if counts["text_targets"] else None,  # nats per text target
            "image_loss": image_error / counts["images"] if counts["images"] else None,  # mean squared error
            # Mean squared error of x0, over bins of log SNR and in each that held images (docs/training.md); null: one
            # held none, so that the mean is always of the same levels.
            "x0_error": mean_over_bins(x0_errors),
            **{f"x0_error/{name}": error for name, error in zip(BINS, x0_errors, strict=True) if error is not None},
            "tokens_per_s": counts["tokens"] / seconds,
            "images_per_s": counts["images"] / seconds,
            "step_s": seconds / max(self.num_steps, 1),
            "padding_share": 1 - counts["tokens"] / max(slots, 1),  # of all token slots, idle rows included
            "idle_row_share": idle_rows / max(rows, 1),  # of all rows: lanes not divisible by ranks, or ended
            "data_stall_share": data_wait_s / world_size / seconds,
            "checkpoint_stall_share": self.checkpoint_s / seconds,
            "evaluation_share": self.evaluation_s / seconds,  # previews included
            "model_tflops_per_s_per_rank": flops_per_s / 1e12,
            # Shares of the device's dense bf16 peak: model FLOPs without and with recomputation; null: peak unknown.
            "mfu": self.peak_flops and flops_per_s / self.peak_flops,
            "hfu": self.peak_flops and flops_per_s * hardware_share / self.peak_flops,
            "attention_imbalance": max(pairs) / max(np.mean(pairs), 1),  # the largest rank's pairs over the mean
            "slowest_rank": slowest,  # which waited least for the others, or whose GPU is slowest: see `_slowest`
            "slowest_host": hosts[slowest],
            "slowest_lag_share": lag_share,  # of the time that others waited
            "host_memory_gib": max(host_gib),  # resident now, of the largest rank without its loader workers
            "device_memory_gib": max(device_gib),  # peak of the largest rank; 0 without CUDA
            "grad_norm": float(self._last["grad_norm"]),  # before clipping, of the last step
            "skipped_documents": self._last["skipped_documents"],  # since the run began
            "epoch_min": int(epoch.min()),  # over lanes and sources
            "epoch_mean": float(epoch.mean()),
            "epoch_max": int(epoch.max()),
            # By source: mean epoch over lanes, and documents (each part of a cut one) in the interval's sequences.
            **{f"epoch/{name}": float(of_source.mean()) for name, of_source in zip(self.sources, epoch.T, strict=True)},
            **{f"documents/{n}": int(c) for n, c in zip(self.sources, np.sum(documents, axis=0), strict=True)},
            "time": time.time(),  # seconds since 1970
        }
        self._reset(now)
        return row


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
