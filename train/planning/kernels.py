"""The speeds that bench/gpu.sh measured on one GPU, by the width of the model, for predictions of other runs.

Each part of a step has a speed of its own, so that another depth, mix, vocabulary or recomputation than the measured
ones costs what its parts cost. Between two measured widths speeds are interpolated on a logarithmic scale; beyond them
the nearest width's are taken.
"""

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from model.transformer import TransformerConfig
from model.transfusion import TransfusionConfig
from train.flops import Flops

KEEP = "bash bench/gpu.sh writes one"


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Seconds of one GPU for each unit of a step's work."""

    product: float  # a FLOP of the blocks' matrix products and linear patches
    attention: float  # a FLOP of attention
    text_head: float  # a FLOP of the text head, softmax and loss included
    convolution: float  # a latent cell in the U-Net's convolutions
    element: float  # a token, layer and channel in norms, sums, SwiGLU, the mask and copies
    optimizer: float  # a parameter in clipping and update
    copied_byte: float  # a byte read or written by a plain copy
    idle: float  # share of a step in which the GPU waits


@dataclass(frozen=True)
class Kernels:
    """What one GPU reached, by patcher and width."""

    device: str
    cases: dict[str, list[tuple[int, Speeds]]]  # by model.patches: width and speeds, narrow to wide

    @classmethod
    def read(cls, path: str | Path, *, allow_cpu: bool = False) -> "Kernels":
        """Read a record of bench/gpu.py. Raise ValueError for anything else, and for a smoke run on a CPU."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"kernels={path} cannot be read ({error.strerror}): expected a record of bench/gpu.py; {KEEP}"
            ) from None
        except ValueError as error:
            raise ValueError(
                f"kernels={path} is not JSON ({error}): expected a record of bench/gpu.py; {KEEP}"
            ) from None
        if not isinstance(record, dict) or record.get("bench") != "gpu" or "cases" not in record:
            found = record.get("bench") if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"kernels={path} is a record of {found!r}: expected one of bench/gpu.py; {KEEP}")
        if record["device_type"] != "cuda" and not allow_cpu:
            raise ValueError(
                f"kernels={path} is of a smoke run on a CPU, whose times mean nothing: expected a GPU's; {KEEP}"
            )
        cases: dict[str, list[tuple[int, Speeds]]] = {}
        for case in record["cases"].values():
            if "breakdown_ms" in case and not case["text_only"]:
                cases.setdefault(case["patches"], []).append((case["transformer"]["width"], _speeds(case)))
        return cls(
            record["device"], {patches: sorted(of_width, key=lambda one: one[0]) for patches, of_width in cases.items()}
        )

    def at(self, patches: str, width: int) -> Speeds:
        """Return the speeds for a model of this patcher and width; raise ValueError if none was measured with it."""
        if patches not in self.cases:
            raise ValueError(
                f"kernels: nothing was measured with model.patches={patches}, only with "
                f"{', '.join(self.cases) or 'none'}; bash bench/gpu.sh measures both, unless its time runs out"
            )
        measured = self.cases[patches]
        widths = [math.log(of_width) for of_width, _ in measured]
        return Speeds(
            **{
                name: float(np.interp(math.log(width), widths, [getattr(speeds, name) for _, speeds in measured]))
                for name in (field.name for field in fields(Speeds))
            }
        )


def _speeds(case: dict[str, Any]) -> Speeds:
    """Return the speeds of one measured step."""
    trunk = TransformerConfig(**case["transformer"])
    config = TransfusionConfig(transformer=trunk)  # the patcher's FLOPs are counted apart
    flops = Flops.of(config, case["vocab_size"], case["activation_checkpointing"], case["compiled"])
    counts, taken = case["counts"], {kind: ms / 1e3 for kind, ms in case["breakdown_ms"].items()}
    busy = sum(seconds for kind, seconds in taken.items() if kind != "idle")
    products = (flops.per_token + flops.again_per_token) * counts["tokens"]
    if case["patches"] == "linear":
        products += flops.per_latent_cell * counts["latent_cells"]
    rest = sum(taken[kind] for kind in ("elementwise", "mask", "data", "copies"))
    return Speeds(
        product=taken["gemm"] / products,
        attention=taken["attention"] / counts["attention_flops"],
        text_head=taken["cross_entropy"] / (flops.per_text_target * counts["text_targets"]),
        convolution=taken["convolution"] / counts["latent_cells"],
        element=rest / (counts["tokens"] * trunk.layers * trunk.width),
        optimizer=taken["optimizer"] / case["parameters"],
        copied_byte=1e-9 / case["ceiling"]["copy_gb_per_s"],
        idle=max(0.0, 1 - busy / case["step_s"]),
    )
