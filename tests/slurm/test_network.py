"""NCCL's forms of an interface's name become a name that gloo accepts, or nothing."""

import pytest

from slurm.network import gloo_interface, interfaces
from tests.ranks import run_ranks
from train.distributed.ranks import Ranks

NODE = ["lo", "eno1", "ib0", "ib1", "docker0", "eth0"]


@pytest.mark.parametrize(
    ("nccl", "name"),
    [
        ("ib0", "ib0"),
        ("eth", "eth0"),  # a prefix
        ("ib", None),  # of two
        ("ib0:1", "ib0"),  # a port, which NCCL ignores for sockets
        ("ib1,ib0", "ib1"),
        ("bond0,eth,docker", "eth0"),  # bond0 is not here
        ("=eth0", "eth0"),
        ("=eth", None),  # no such name
        ("=ib0,eth0:2", "ib0"),
        ("^lo,docker0", None),  # leaves four
        ("^lo,docker,ib,en", "eth0"),
        ("^=lo,ib0,ib1,docker0,eno1", "eth0"),
        ("^=lo,ib,docker0,eno1", None),  # "ib" is no whole name, so it excludes nothing
        ("^", None),
        ("", None),
        ("wlan0", None),
    ],
)
def test_gloo_gets_the_one_interface_that_nccl_would_use(nccl: str, name: str | None) -> None:
    assert gloo_interface(nccl, NODE) == name


def _sum(ranks: Ranks) -> int:
    return sum(ranks.gather(1))


def test_gloo_connects_over_an_interface_that_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = interfaces()
    assert "lo" in found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", gloo_interface("=lo", found) or "")
    assert run_ranks(_sum, 2) == [2, 2]
