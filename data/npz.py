"""Numpy's .npz, uncompressed, in the same bytes under every Python: a manifest names an index by its checksum.

np.savez leaves the headers to `zipfile`, in the form for files of unknown size, which is another since Python 3.11.4.
"""

import io
import zipfile
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getbuffer())  # dated 1980
