"""Numpy's .npz, uncompressed, in the same bytes under every Python: a manifest names an index by its checksum.

np.savez leaves the archive to `zipfile`, whose headers are others since Python 3.11.4. These are the newer ones.
"""

import io
import struct
import zlib
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

_LOCAL = struct.Struct("<4s5H3I2H")  # before a file's name
_ZIP64 = struct.Struct("<2H2Q")  # after it
_CENTRAL = struct.Struct("<4s6H3I5H2I")  # the same file in the table of contents
_END = struct.Struct("<4s4H2IH")
_VERSION, _UNIX, _PERMISSIONS = 45, 3 << 8, 0o600 << 16  # zip 4.5
_FIRST_DAY = 1 << 5 | 1  # 1 January 1980
_IN_ZIP64 = 0xFFFFFFFF


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name; all of them together below 4 GiB, which takes 80 million records."""
    place, contents = 0, b""
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        data, member = buffer.getbuffer(), f"{name}.npy".encode("ascii")
        what = (0, 0, 0, _FIRST_DAY, zlib.crc32(data))  # no flags, stored, at midnight
        head = _LOCAL.pack(b"PK\3\4", _VERSION, *what, _IN_ZIP64, _IN_ZIP64, len(member), _ZIP64.size) + member
        head += _ZIP64.pack(1, _ZIP64.size - 4, len(data), len(data))
        file.write(head)
        file.write(data)
        sizes = (len(data), len(data), len(member), 0, 0, 0, 0)
        contents += _CENTRAL.pack(b"PK\1\2", _VERSION | _UNIX, _VERSION, *what, *sizes, _PERMISSIONS, place) + member
        place += len(head) + len(data)
    file.write(contents + _END.pack(b"PK\5\6", 0, 0, len(arrays), len(arrays), len(contents), place, 0))
