"""Host memory at load: beyond their shards, the ranks of a machine take far less than one copy of the model."""

import ctypes
import gc
from dataclasses import replace
from pathlib import Path

import torch

from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig
from tests.ranks import run_ranks
from train.checkpoints import checkpoint
from train.checkpoints.run_folder import RunFolder
from train.distributed.parallelize import ParallelConfig, initialize, parallelize
from train.distributed.ranks import Ranks

# 193 MB: two tables of 31 MB, ten blocks of four matrices of 1 to 6 MB, and as many vectors.
MODEL = TransfusionConfig(transformer=TransformerConfig(width=512, layers=10, heads=8), latent_channels=2)
VOCAB = 16_000


class Cost:
    """Peak growth of resident memory within the context, and bytes read from files."""

    def __enter__(self) -> "Cost":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self._before, self._read_before = _proc("status", "VmRSS"), _proc("io", "rchar")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = 1024 * (_proc("status", "VmHWM") - self._before)
        self.read = _proc("io", "rchar") - self._read_before


def _proc(file: str, field: str) -> int:
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _meta_model(ranks: Ranks, config: TransfusionConfig) -> torch.nn.Module:
    with torch.device("meta"):
        model = Transfusion(config, VOCAB)
    return parallelize(model, ParallelConfig(dtype="float32"), ranks)


def _initialize_and_load(ranks: Ranks, folder: Path) -> dict[str, float]:
    """Return bytes by purpose; the first call saves the checkpoint."""
    small = replace(MODEL, transformer=TransformerConfig(width=16, layers=1, heads=2))
    initialize(_meta_model(ranks, small), 7, ranks.device)  # loads code at its first use: 10 MB for any model
    model = _meta_model(ranks, MODEL)
    parameters = dict(model.named_parameters())
    sizes = {"copy": sum(p.nbytes for p in parameters.values()), "shards": 0}
    with Cost() as initializing:
        initialize(model, 7, ranks.device)
    sizes["shards"] = sum(p.to_local().nbytes for p in parameters.values())
    if not folder.exists():
        with RunFolder(folder, ranks) as run:
            checkpoint.save(run, 1, {"model": parameters}, {}, ranks)
    before = [p.to_local().sum().item() for p in parameters.values()]
    with torch.no_grad():
        torch._foreach_zero_([p.to_local() for p in parameters.values()])
    with Cost() as loading:
        checkpoint.load(checkpoint.saved(folder / "checkpoints")[0], {"model": parameters}, ranks)
    assert [p.to_local().sum().item() for p in parameters.values()] == before
    return sizes | {
        "initialize": initializing.peak - sizes["shards"],
        "load": loading.peak,
        "read": loading.read,
    }


def test_initializing_and_loading_need_less_than_a_copy_of_the_model_a_machine(tmp_path: Path) -> None:
    """P4: on 2 and 4 ranks, and from a checkpoint that one rank wrote, whose every tensor is in one piece.

    Nor does a rank read what the others need.
    """
    folder = tmp_path / "run"
    for world_size in (1, 2, 4):
        found = run_ranks(_initialize_and_load, world_size, folder)
        copy = found[0]["copy"]
        assert copy == sum(costs["shards"] for costs in found) > 190e6
        for what in ("initialize", "load"):
            beyond_shards = sum(costs[what] for costs in found)
            assert beyond_shards < 0.3 * copy, (world_size, what, beyond_shards / copy)
        assert sum(costs["read"] for costs in found) < 1.1 * copy
