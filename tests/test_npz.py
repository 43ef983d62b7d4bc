"""An index has the same bytes under every Python, for a manifest names it by its checksum."""

import io
import zlib

import numpy as np

from data.shard_index import write_npz

ARRAYS = {
    "spans": np.arange(3000).reshape(-1, 3),
    "grids": np.arange(8, dtype=np.int32).reshape(-1, 2),
    "none": np.zeros((0, 2), np.int32),
}


def test_the_bytes_are_pinned_and_numpy_reads_them() -> None:
    written = io.BytesIO()
    write_npz(written, ARRAYS)
    assert zlib.crc32(written.getvalue()) == 0xA48C9414
    written.seek(0)
    with np.load(written) as read:
        assert all(np.array_equal(read[name], array) for name, array in ARRAYS.items()) and len(read) == len(ARRAYS)
