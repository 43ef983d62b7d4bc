"""float32 -> bfloat16, rounded up or down at random so that the mean is exact; for running sums stored in bfloat16.

Rounding to nearest would lose every change below 1/256 of a value: a moment with beta2 = 0.999 could never fall. The
direction is not drawn from a generator but hashed from a key and the element's index in the whole tensor, so it depends
neither on the world size nor on earlier draws, and a resume repeats it (P3, P4).
"""

import zlib
from collections.abc import Callable
from functools import lru_cache

import torch

# Odd multipliers of C. Wellons' lowbias32, as int32.
_SPREAD, _FIRST, _SECOND = 0x9E3779B1 - (1 << 32), 0x7FEB352D, 0x846CA68B - (1 << 32)


def stochastic_bfloat16(exact: torch.Tensor, first_element: int, key: str) -> torch.Tensor:
    """Return float32 `exact`, of any shape, as bfloat16; its first element has the index `first_element`.

    Unbiased. Values exact in bfloat16 do not change, nor do infinities and NaN. On a CPU it takes three temporary
    copies; on a GPU one kernel makes it, compiled once for all shapes, with the same bits.
    """
    flat = exact.flatten().data  # no view to torch, which compiles anew for views of another number of axes
    start = torch.full((), _start(first_element, key), dtype=torch.int32, device=exact.device)
    rounded = _compiled()(flat, start) if exact.is_cuda else _rounded(flat, start)
    return rounded.view(exact.shape)


def _rounded(exact: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return float32 [n] as bfloat16; `start`, int32 [], is a tensor because a number would be compiled in."""
    # int32 in [0, 2^16): hashes of the indices
    x = torch.arange(len(exact), dtype=torch.int32, device=exact.device).mul_(_SPREAD).add_(start)  # wraps
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _FIRST
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _SECOND
    up = (x >> 16).bitwise_and_(0xFFFF)
    return up.add_(exact.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


@lru_cache
def _compiled() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return torch.compile(_rounded, dynamic=True, fullgraph=True)


def _start(first_element: int, key: str) -> int:
    """Return what the hashes of indices from `first_element` on begin with, an int32."""
    number = first_element * _SPREAD + zlib.crc32(key.encode())
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
