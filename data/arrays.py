"""An array of a record as a .npy file: only what np.save writes for ours, read without numpy's parser."""

import io
import re
from functools import lru_cache

import numpy as np

from data.bad_records import BadRecord
from data.shard_index import NPY_HEADER_BYTES

_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>=|]\w+)', 'fortran_order': False, "
    rb"'shape': \((\d{1,18}(?:, \d{1,18}){,9}),?\), \} *\n",
    re.DOTALL,
)


def load_array(data: bytes, where: str, dtype: str, ndim: int) -> np.ndarray:
    """Return the .npy array in `data`, read-only.

    Takes only what np.save writes for our arrays, without numpy's parser: that evaluates Python literals (a hostile
    header exhausts it), can unpickle, and takes longer than the rest of a read.
    """
    layout = _npy_layout(data[:NPY_HEADER_BYTES])
    if layout is None:
        raise BadRecord("undecodable array", where, f"not a plain .npy file: {data[:64]!r}")
    found, shape = layout
    if found != dtype or len(shape) != ndim:
        raise BadRecord("wrong array", where, f"{found} {shape}, expected {dtype} of {ndim} dimensions")
    try:
        return np.frombuffer(data, dtype, offset=NPY_HEADER_BYTES).reshape(shape)
    except (ValueError, OverflowError) as error:
        raise BadRecord("undecodable array", where, str(error)) from None


@lru_cache(4096)
def _npy_layout(header: bytes) -> tuple[str, tuple[int, ...]] | None:
    """Return (dtype, shape) of a .npy file's first bytes; None unless they are a plain header."""
    match = _NPY_HEADER.fullmatch(header)
    return (match[1].decode(), tuple(map(int, match[2].split(b", ")))) if match else None


def save_array(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
