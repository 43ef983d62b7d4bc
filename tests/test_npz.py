"""An index has the same bytes under every Python, for a manifest names it by its checksum."""

import io
import sys
import zlib

import numpy as np

from data.npz import write_npz

ARRAYS = {
    "spans": np.arange(3000).reshape(-1, 3),
    "grids": np.arange(8, dtype=np.int32).reshape(-1, 2),
    "none": np.zeros((0, 2), np.int32),
}


def test_the_bytes_are_numpys_own_under_a_newer_python_and_the_same_under_an_older() -> None:
    written, numpys = io.BytesIO(), io.BytesIO()
    write_npz(written, ARRAYS)
    if sys.version_info >= (3, 11, 4):
        np.savez(numpys, **ARRAYS)
        assert written.getvalue() == numpys.getvalue()
    assert zlib.crc32(written.getvalue()) == 0x53A2E67F
    written.seek(0)
    with np.load(written) as read:
        assert all(np.array_equal(read[name], array) for name, array in ARRAYS.items()) and len(read) == len(ARRAYS)
