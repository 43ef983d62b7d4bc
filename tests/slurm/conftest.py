"""The cluster that the tests run on; each gets it idle."""

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster


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
