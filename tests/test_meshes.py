"""A checkpoint does not depend on the mesh that wrote it: HSDP and FSDP load each other's (P4)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bench.step import backward, sharded_model
from data.dataset import open_data
from data.loader import Loader
from data.tokenizer import Tokenizer
from tests.ranks import run_ranks
from tests.runs import settings
from train.checkpoints import checkpoint
from train.checkpoints.run_folder import RunFolder
from train.checkpoints.saver import Saver
from train.config import load_config
from train.distributed.parallelize import gather_weights
from train.distributed.ranks import Ranks, alone
from train.nested import leaves
from train.optim.optimizer import Optimizer
from train.pretrain_config import PretrainConfig
from train.state import Progress, TrainState

MESHES = {"1": (1, 1), "1x2": (2, 1), "2x1": (2, 2), "1x3": (3, 1), "1x4": (4, 1), "2x2": (4, 2)}  # ranks, dp_replicate
LANES = 4


class Trainee:
    """A run without its loop: the state on a mesh, and steps over global batches that do not depend on the mesh."""

    def __init__(self, config: PretrainConfig, dp_replicate: int, ranks: Ranks, seed: int) -> None:
        self.config = replace(config, parallel=replace(config.parallel, dp_replicate=dp_replicate))
        self.ranks = ranks
        self.data = open_data(config.data, config.seed, config.model.patch_size)
        model = sharded_model(config.model, self.data.tokenizer.vocab_size, ranks, self.config.parallel, seed)
        self.state = TrainState.begin(model, Optimizer(model, config.optim, config.guard), config, self.data)

    def train(self, num_steps: int) -> list[float]:
        """Return the loss of each step, over all ranks."""
        state, ranks, losses = self.state, self.ranks, []
        place = {"rank": ranks.rank, "world_size": ranks.world_size, "micro_batch_size": 1}
        start = {"first_step": state.progress.step + 1, "states": state.lane_states}
        loader = Loader(self.data, self.config.data, **place, **start)
        counts = {"spec": self.data.latent_spec, "targets": 100, "images": 10}
        for _ in range(num_steps):
            batch = loader.next(30)
            total = backward(state.model, batch.micro_batches, ranks, self.config.parallel, **counts)
            torch.distributed.all_reduce(total)
            losses.append(total.item())
            state.optimizer.update(batch.step)
            state.progress, state.lane_states = Progress(step=batch.step), batch.lane_states
        loader.close()
        return losses

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return weights, moments and averages, gathered."""
        return gather_weights(dict(leaves(self.state._tensors())))


def _save(ranks: Ranks, config: PretrainConfig, dp_replicate: int, root: Path) -> tuple[dict, list[float]]:
    """Train two steps, save, train two more."""
    trainee = Trainee(config, dp_replicate, ranks, seed=1)
    trainee.train(2)
    with RunFolder(root, ranks) as folder:
        saver = Saver(folder, config.checkpoint, ranks)
        saver.start(trainee.state.snapshot(ranks))
        saver.settle(tolerate=False)
    return trainee.tensors(), trainee.train(2)


def _load(ranks: Ranks, config: PretrainConfig, dp_replicate: int, roots: list[Path]) -> list[tuple[dict, list[float]]]:
    found = []
    for root in roots:
        trainee = Trainee(config, dp_replicate, ranks, seed=2)
        trainee.state.load(checkpoint.latest(root / "checkpoints", ranks), ranks)
        loaded = trainee.tensors()
        found.append((loaded, trainee.train(2)))
    return found


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]) -> PretrainConfig:
    changes = {"data__lanes": LANES, "model__transformer__layers": 1}
    return load_config(PretrainConfig, settings(tmp_path / "run", tokenizer, sources, **changes))


def _assert_every_mesh_loads(saving: list[str], loading: list[str], config: PretrainConfig, tmp_path: Path) -> None:
    roots = [tmp_path / name for name in saving]
    saved = [run_ranks(_save, MESHES[n][0], config, MESHES[n][1], r)[0] for n, r in zip(saving, roots, strict=True)]
    for name in loading:
        for of_rank in run_ranks(_load, MESHES[name][0], config, MESHES[name][1], roots):
            for (expected, losses), (loaded, further), by in zip(saved, of_rank, saving, strict=True):
                assert loaded.keys() == expected.keys()
                assert [n for n, tensor in expected.items() if not torch.equal(tensor, loaded[n])] == []
                assert further == pytest.approx(losses, rel=1e-5), f"{by} -> {name}"


def test_hsdp_and_fsdp_load_what_the_other_saved(config: PretrainConfig, tmp_path: Path) -> None:
    """P4: the same bits, then the same losses within 1e-5; replicas do not write twice."""
    _assert_every_mesh_loads(["2x2"], ["1x3"], config, tmp_path)
    _assert_every_mesh_loads(["1x2"], ["2x2"], config, tmp_path)
    hsdp, fsdp = (sum(f.stat().st_size for f in (tmp_path / n).rglob("*.distcp")) for n in ("2x2", "1x2"))
    assert hsdp < 1.1 * fsdp, "the same shards, each written once"


@pytest.mark.slow
def test_every_mesh_loads_what_every_other_saved(config: PretrainConfig, tmp_path: Path) -> None:
    """P4: FSDP on 1 to 4 ranks, HSDP 2x2 and 2x1, all thirty-six pairs."""
    _assert_every_mesh_loads(list(MESHES), list(MESHES), config, tmp_path)


def _load_columns(ranks: Ranks, folder: Path) -> torch.Tensor:
    mesh = init_device_mesh("cpu", (ranks.world_size,))
    state = {"model": {"turned": distribute_tensor(torch.zeros(5, 4), mesh, [Shard(1)])}}
    checkpoint.load(folder, state, ranks)
    tensor = state["model"]["turned"]
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def test_columns_and_turned_tensors_are_read_as_well_as_rows(tmp_path: Path) -> None:
    turned = torch.arange(20.0).view(4, 5).T
    with RunFolder(tmp_path, alone()) as run:
        folder = checkpoint.save(run, 1, {"model": {"turned": turned}}, {}, alone())
    assert all(torch.equal(loaded, turned) for loaded in run_ranks(_load_columns, 2, folder))
