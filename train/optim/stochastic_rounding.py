"""float32 -> bfloat16, rounded up or down at random so that the mean is exact; for running sums stored in bfloat16.

Rounding to nearest would lose every change below 1/256 of a value: a moment with beta2 = 0.999 could never fall. The
direction is not drawn from a generator but hashed from a key and the element's index in the whole tensor, so it depends
neither on the world size nor on earlier draws, and a resume repeats it (P3, P4).
"""

import zlib

import torch

# Odd multipliers of C. Wellons' lowbias32, as int32.
_SPREAD, _FIRST, _SECOND = 0x9E3779B1 - (1 << 32), 0x7FEB352D, 0x846CA68B - (1 << 32)


def stochastic_bfloat16(exact: torch.Tensor, first_element: int, key: str) -> torch.Tensor:
    """Return float32 `exact`, of any shape, as bfloat16; its first element has the index `first_element`.

    Unbiased. Values exact in bfloat16 do not change, nor do infinities and NaN. Takes three temporary copies.
    """
    bits = exact.contiguous().view(torch.int32)
    up = _uniform16(exact.numel(), first_element, key, exact.device).view(bits.shape)
    return up.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _uniform16(count: int, first_element: int, key: str, device: torch.device) -> torch.Tensor:
    """Return int32 [count] in [0, 2^16): hashes of the indices from `first_element` on."""
    start = _int32(first_element * _SPREAD + zlib.crc32(key.encode()))
    x = torch.arange(count, dtype=torch.int32, device=device).mul_(_SPREAD).add_(start)  # wraps, as int32 does
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _FIRST
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _SECOND
    return (x >> 16).bitwise_and_(0xFFFF)


def _int32(number: int) -> int:
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
