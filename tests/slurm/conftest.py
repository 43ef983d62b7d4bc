"""The cluster that the tests run on; each gets it idle."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from tests.runs import finish
from tests.slurm.cluster import Cluster
from tests.slurm.launched import training


@pytest.fixture(scope="session")
def found() -> Cluster:
    """The cluster that is up; skips with the reason where there is none."""
    cluster = Cluster.find()
    if isinstance(cluster, str):
        pytest.skip(cluster)
    return cluster


@pytest.fixture
def cluster(found: Cluster) -> Iterator[Cluster]:
    """The cluster, with every node idle before and after."""
    yield found
    found.clear()


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, sources: dict[str, Path]) -> Path:
    """The same training, undisturbed, on two ranks and without Slurm."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    finish(training(run_dir, tokenizer, sources), 2)
    return run_dir
