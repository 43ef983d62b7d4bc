"""The network interface for gloo that NCCL_SOCKET_IFNAME means on this node.

NCCL takes a list of prefixes, `^` in front to exclude them and `=` for whole names, with ports that it ignores here
(`parseStringList` and `matchIfList` in its sources); gloo takes names alone, and dies of one that has no address.
"""

import fcntl
import socket
import struct
from pathlib import Path

IPV6 = Path("/proc/net/if_inet6")  # a line for each address, the interface's name last
SIOCGIFADDR = 0x8915  # "get interface address", an IPv4 one


def gloo_interface(nccl: str, present: list[str]) -> str | None:
    """Return the one interface of `present` that NCCL_SOCKET_IFNAME=`nccl` selects, None if that is ambiguous.

    Of a list of names the first counts that selects a single interface: gloo would connect all ranks once for each.
    """
    excludes, nccl = nccl.startswith("^"), nccl.removeprefix("^")
    exact, nccl = nccl.startswith("="), nccl.removeprefix("=")
    wanted = [name for item in nccl.split(",") if (name := item.partition(":")[0])]
    matches = [
        [found for found in present if found == name or (not exact and found.startswith(name))] for name in wanted
    ]
    if excludes:
        matched = {found for of_name in matches for found in of_name}
        matches = [[found for found in present if found not in matched]]
    return next((of_name[0] for of_name in matches if len(of_name) == 1), None)


def interfaces() -> list[str]:
    """Return the interfaces of this node that have an address."""
    with_ipv6 = (
        {line.split()[-1] for line in IPV6.read_text(encoding="utf-8").splitlines()} if IPV6.is_file() else set()
    )
    return [name for _, name in socket.if_nameindex() if name in with_ipv6 or _has_ipv4(name)]


def _has_ipv4(name: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return False
    return True
