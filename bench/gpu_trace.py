"""Where the time of a step goes: a trace of torch.profiler, sorted into kinds of work.

A kernel is put under the first kind whose named range it was launched in, else under the first whose pattern its name
matches, else under `elementwise` (norms, rotary positions, SwiGLU, sums, noise). Without kernels, as on a CPU, the
self times of operators are sorted in the same way. What is left of the time is `idle`.
The trace is Chrome's format, which torch has not changed for years; the profiler's Python objects have.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import record_function

import train.step
from data.packing import PackedBatch
from train.optim.optimizer import Optimizer

# Ranges: those of torch, and those that `named_ranges` adds.
RANGES = {
    "optimizer": ("bench optimizer", "Optimizer.step"),
    "mask": ("bench mask",),
    "data": ("bench copies of the batch",),
    "cross_entropy": ("_LinearCrossEntropy",),
    "attention": ("_DocumentAttention",),  # on a CPU; on a GPU its kernels have names
    "fsdp": ("FSDP::",),
}
FUSED = re.compile(r"^triton_(poi|red|per)_")  # inductor's elementwise kernels and reductions, whatever they are of
NAMES = {
    "attention": re.compile(r"flex_attention|triton_tem_|flash|fmha|sdpa|_scaled_dot_product"),
    "convolution": re.compile(r"convolution|fprop|dgrad|wgrad|implicit|nchwToNhwc|nhwcToNchw|conv[123]d|cudnn"),
    "gemm": re.compile(r"gemm|nvjet|cutlass|cublas|xmma|splitKreduce|aten::(mm|addmm|bmm|baddbmm|linear|matmul)$"),
    "copies": re.compile(r"Memcpy|Memset|aten::copy_$|nccl"),
}
KINDS = (
    "attention",
    "gemm",
    "convolution",
    "cross_entropy",
    "elementwise",
    "optimizer",
    "mask",
    "data",
    "fsdp",
    "copies",
)


class Work(NamedTuple):
    kind: str
    start: float  # microseconds
    duration: float  # microseconds


@contextmanager
def named_ranges() -> Iterator[None]:
    """Name in a trace what torch does not name by itself; only for steps that are recorded."""
    with ExitStack() as stack:
        stack.enter_context(_named(Optimizer, "update", "bench optimizer"))
        stack.enter_context(_named(PackedBatch, "to", "bench copies of the batch"))
        for mask in [name for name in vars(train.step) if name.endswith("_mask")]:  # those that build one
            stack.enter_context(_named(train.step, mask, "bench mask"))
        yield


@contextmanager
def _named(owner: Any, attribute: str, name: str) -> Iterator[None]:
    work: Callable[..., Any] = getattr(owner, attribute)

    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return work(*args, **kwargs)

    setattr(owner, attribute, named)
    try:
        yield
    finally:
        setattr(owner, attribute, work)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the timed events of a compressed trace file."""
    with gzip.open(path) as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def breakdown(events: list[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds by kind, and `idle` and `window`: from the start of the first work to the end of the last."""
    kernels = _kernels(events)
    work = kernels or _operators(events)
    found = dict.fromkeys(KINDS, 0.0)
    for each in work:
        found[each.kind] += each.duration / 1e6
    start, end = min(each.start for each in work), max(each.start + each.duration for each in work)
    busy = _covered(work) / 1e6 if kernels else sum(found.values())
    window = (end - start) / 1e6
    return found | {"idle": max(0.0, window - busy), "window": window}


def _covered(work: list[Work]) -> float:
    """Return the microseconds in which anything ran; kernels on several streams overlap."""
    covered, reached = 0.0, -1.0
    for each in sorted(work, key=lambda each: each.start):
        end = each.start + each.duration
        covered += max(0.0, end - max(reached, each.start))
        reached = max(reached, end)
    return covered


def kind_of(name: str, ranges: tuple[str, ...]) -> str:
    """Return the kind of a kernel or operator that ran inside `ranges`, the outermost first."""
    for kind, prefixes in RANGES.items():
        if any(each.startswith(prefixes) for each in (*ranges, name)):
            return kind
    if FUSED.match(name) and "flex_attention" not in name:
        return "elementwise"
    for kind, pattern in NAMES.items():
        if pattern.search(name):
            return kind
    return "elementwise"


def _kernels(events: list[dict[str, Any]]) -> list[Work]:
    """Return the work on the device; a kernel belongs to the ranges of the call that launched it."""
    on_device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    wanted = {event["args"].get("correlation") for event in on_device}
    launches = [
        e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and e["args"].get("correlation") in wanted
    ]
    ranges = {
        event["args"]["correlation"]: tuple(e["name"] for e in inside)
        for event, inside in _nested(events, launches)
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
    }
    return [
        Work(kind_of(e["name"], ranges.get(e["args"].get("correlation"), ())), float(e["ts"]), float(e["dur"]))
        for e in on_device
    ]


def _operators(events: list[dict[str, Any]]) -> list[Work]:
    """Return the operators on the CPU with their self times."""
    own: dict[int, float] = {}
    found: list[tuple[dict[str, Any], tuple[str, ...]]] = []
    for event, inside in _nested(events, []):
        own[id(event)] = own.get(id(event), 0.0) + float(event["dur"])
        if inside:
            own[id(inside[-1])] -= float(event["dur"])
        found.append((event, tuple(e["name"] for e in inside)))
    steps = [event for event, _ in found if event["name"].startswith("step ")]
    return [
        Work(_inherited(event["name"], ranges), float(event["ts"]), max(0.0, own[id(event)]))
        for event, ranges in found
        if event not in steps and event.get("cat") == "cpu_op"
    ]


def _inherited(name: str, ranges: tuple[str, ...]) -> str:
    """Return the kind of an operator: its own, else that of the innermost operator around it that has one."""
    kinds = (kind_of(each, ranges) for each in (name, *reversed(ranges)))
    return next((kind for kind in kinds if kind != "elementwise"), "elementwise")


def _nested(
    events: list[dict[str, Any]], others: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield each operator, range and one of `others` with the operators and ranges around it on its thread."""
    ranges = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    threads: dict[tuple, list[dict[str, Any]]] = {}
    for event in (*ranges, *others):
        threads.setdefault((event["pid"], event["tid"]), []).append(event)
    for of_thread in threads.values():
        inside: list[dict[str, Any]] = []
        for event in sorted(of_thread, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
            while inside and float(inside[-1]["ts"]) + float(inside[-1]["dur"]) <= float(event["ts"]):
                inside.pop()
            yield event, inside
            if event.get("cat") in ("cpu_op", "user_annotation"):
                inside.append(event)
