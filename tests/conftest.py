"""Fixtures that many test files share: a tokenizer, two small encoded data sets, runs. None of them may be changed."""

import gc
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import pytest
import torch
from fsspec import AbstractFileSystem

from bench.ranks import PRELOADED
from data.tokenizer import Tokenizer, train_tokenizer
from model.vae import VaeConfig, build_vae
from tests.servers import Server, serving
from tests.sources import make_source, pairs, texts

if TYPE_CHECKING:
    from tests.runs import DrawingRun

gc.disable()  # while tests are collected: it would go through all of torch's objects again and again
PRELOADED += ["pytest", "train.encode", "train.evaluate", "wandb"]  # else each rank of a test imports them again
multiprocessing.set_forkserver_preload(PRELOADED)  # a process has one server, and any test may be the first to need it
torch.set_num_threads(1)  # tensors are tiny: on busy cores threads only wait for each other
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs and their children ignore it


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but what imports have made is none."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: far faster for tiny pictures on a busy machine, and the last bits never change."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A web server of this machine, for files given as bytes."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with serving() as server:
        yield server


@pytest.fixture
def memory() -> Iterator[AbstractFileSystem]:
    """An object store in this process's memory."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model of 300 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer((f"a large red circle beside {i} small blue squares" for i in range(200)), path, 300)
    return Tokenizer(path)


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """60 pictures with captions in three shards of unequal sizes, latents of 4x4 and 4x8 cells and 2 channels."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    return make_source(folder, tokenizer, pairs(60, grids=[(4, 4), (4, 8)]), shard_sizes=[31, 7, 22])


@pytest.fixture(scope="session")
def texts_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """50 texts of 1 to 60 tokens in two shards."""
    folder = tmp_path_factory.mktemp("data") / "texts"
    return make_source(folder, tokenizer, texts(50, lengths=(1, 60)), shard_sizes=[20, 30])


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained VAE of 2 channels and stride 4, in diffusers' layout."""
    folder = tmp_path_factory.mktemp("vae")
    config = VaeConfig(
        latent_channels=2, block_channels=(8, 8, 8), layers_per_block=1, norm_groups=4, mid_attention=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build_vae(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, vae_folder: Path) -> "DrawingRun":
    """A short, finished training run with previews and checkpoints."""
    from tests.runs import drawing_run  # only now: it imports the trainer, which most tests do not need

    return drawing_run(tmp_path_factory.mktemp("drawn"), tokenizer, vae_folder)


@pytest.fixture(scope="session")
def sources(pairs_folder: Path, texts_folder: Path) -> dict[str, Path]:
    """Both small data sets by name."""
    return {"pairs": pairs_folder, "texts": texts_folder}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a run that has not started yet."""
    return tmp_path / "run"


@pytest.fixture
def arguments(run_dir: Path, tokenizer: Tokenizer, sources: dict[str, Path]) -> Callable[..., list[str]]:
    """Makes the arguments of a small run in `run_dir` on both data sets; takes the changes to its settings."""
    from tests.runs import settings

    return partial(settings, run_dir, tokenizer, sources)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, sources: dict[str, Path]) -> Path:
    """A finished run on two ranks."""
    from tests.runs import finish, settings  # only now: it imports the trainer, which most tests do not need

    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(settings(run_dir, tokenizer, sources), 2)
    return run_dir
