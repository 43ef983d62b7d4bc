"""The index of a shard: where each record is stored and how much it holds, so that a lane reads records by number.

Its bytes are the same under every Python, since a manifest names an index by its checksum. np.savez is not used: it
leaves headers to `zipfile`, which writes them differently since Python 3.11.4.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.bad_records import BadRecord
from data.durable import atomic_write
from data.tar import MAX_RECORD_BYTES

NPY_HEADER_BYTES = 128  # that np.save writes before an array of a few dimensions
# What zipfile and numpy raise for bytes that are no archive of arrays.
_NOT_ARRAYS = (OSError, ValueError, KeyError, EOFError, RuntimeError, OverflowError, struct.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class ShardIndex:
    """Where each record of a shard is and how much it holds; arrays have one row a record.

    spans int64 [R, 3]: byte offset, byte length, crc32 of those bytes. text_tokens int64 [R].
    grid_starts int64 [R + 1] into grids int32 [G, 2]: latent (h, w) of each record's images.
    contents uint64 [R]: `content_key` of each record; None in indices of older versions.
    """

    spans: np.ndarray
    text_tokens: np.ndarray
    grid_starts: np.ndarray
    grids: np.ndarray
    contents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.spans)

    def save(self, path: Path) -> None:
        with atomic_write(path) as file:
            write_npz(file, {name: array for name, array in vars(self).items() if array is not None})

    @property
    def sums(self) -> np.ndarray:
        """Return uint64 [R]: crc32 and length of each record's bytes, names included."""
        return self.spans[:, 2].astype(np.uint64) << np.uint64(32) | self.spans[:, 1].astype(np.uint64)

    @property
    def keys(self) -> np.ndarray:
        """Return uint64 [R]: what identifies each record: its contents or, in older indices, its bytes."""
        return self.sums if self.contents is None else self.contents

    @classmethod
    def parse(cls, data: bytes, where: str, crc32: int | None = None) -> "ShardIndex":
        """Return the index that `save` wrote; raise BadRecord for anything else, or a crc32 other than the one given.

        numpy's parser is not used: it evaluates Python literals, allocates any shape that is claimed and decompresses,
        so a few bytes exhaust it.
        """
        try:
            if crc32 is not None and zlib.crc32(data) != crc32:
                raise ValueError("its checksum differs from the manifest's")
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("compressed arrays")
                index = cls(
                    spans=_saved_array(archive, "spans", "<i8", 3),
                    text_tokens=_saved_array(archive, "text_tokens", "<i8"),
                    grid_starts=_saved_array(archive, "grid_starts", "<i8"),
                    grids=_saved_array(archive, "grids", "<i4", 2),
                    contents=_saved_array(archive, "contents", "<u8") if "contents.npy" in archive.namelist() else None,
                )
            index._check()
        except _NOT_ARRAYS as error:
            raise BadRecord("unreadable index", where, str(error)) from None
        return index

    def _check(self) -> None:
        records, images, starts = len(self.spans), len(self.grids), self.grid_starts
        if not len(self.text_tokens) == len(self.keys) == records:
            raise ValueError(f"text tokens or contents of other than {records} records")
        if len(starts) != records + 1 or starts[0] != 0 or starts[-1] != images or (np.diff(starts) < 0).any():
            raise ValueError(f"grid_starts do not cut {images} images into {records} records")
        sizes = np.concatenate([self.text_tokens, self.grids.astype(np.int64).prod(axis=1)])
        if (self.grids < 1).any() or (sizes < 0).any() or (sizes > MAX_RECORD_BYTES).any():
            raise ValueError("negative sizes, or larger than any record")

    def document_tokens(self, patch_size: int) -> np.ndarray:
        """Return each record's length in tokens, int64 [R]: BOS, EOS, text, and BOI + patches + EOI an image."""
        patches = (self.grids[:, 0] // patch_size) * (self.grids[:, 1] // patch_size) + 2
        upto = np.concatenate([[0], np.cumsum(patches, dtype=np.int64)])
        return 2 + self.text_tokens + upto[self.grid_starts[1:]] - upto[self.grid_starts[:-1]]


def _saved_array(archive: zipfile.ZipFile, name: str, dtype: str, columns: int | None = None) -> np.ndarray:
    """Return an array [n] or [n, columns], read-only; raise ValueError unless its bytes are what np.save writes."""
    data, header = archive.read(f"{name}.npy"), io.BytesIO()
    shape = (-1,) if columns is None else (-1, columns)
    array = np.frombuffer(data, dtype, offset=min(NPY_HEADER_BYTES, len(data))).reshape(shape)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    if header.getvalue() != data[:NPY_HEADER_BYTES]:
        raise ValueError(f"{name} is no array of {dtype}")
    return array


def index_path(shard: Path) -> Path:
    return shard.with_name(index_name(shard.name))


def index_name(shard: str) -> str:
    return shard + ".idx"


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays by name as an uncompressed .npz."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getbuffer())  # dated 1980
