"""The lines of a text file, compressed or not, and what a file is that holds none."""

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from data.signatures import HEAD_BYTES, LFS_POINTER, looks_like

_ZST_BYTES = 1024  # decompressed at once: they may expand 30,000-fold


def lines_of(file: Path, suffix: str, max_bytes: int) -> Iterator[tuple[bytes | None, int]]:
    """Yield the lines of a file, or all of a .txt as one, each with its bytes in the file; None for each that is longer
    than `max_bytes`. Raises OSError, EOFError or zlib.error where the compression is damaged.
    """
    is_whole, done = suffix == ".txt", 0
    with file.open("rb") as raw:
        text = decompressed(raw, suffix)
        while line := text.read(max_bytes + 1) if is_whole else text.readline(max_bytes + 1):
            is_too_long = len(line) > max_bytes
            while is_too_long and line and not (line.endswith(b"\n") and not is_whole):
                line = text.readline(max_bytes)
            read, done = raw.tell() - done, raw.tell()
            yield None if is_too_long else line, read


def other_kind(file: Path, suffix: str) -> str | None:
    """Return what a file is by its first bytes if that contradicts its suffix, else None."""
    with file.open("rb") as raw:
        what = looks_like(raw.read(HEAD_BYTES))
    if suffix == ".txt":
        return what if what == LFS_POINTER else None
    expected = {"gz": "gzip", "zst": "zstd", "parquet": "a Parquet file"}.get(suffix.rpartition(".")[2])
    if what == expected or (what == "JSON" and not expected):
        return None
    return what or f"no {str(expected).removeprefix('a ')}"


def decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
    if suffix.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    return io.BufferedReader(_Zst(file), 1 << 20) if suffix.endswith(".zst") else file


class _Zst(io.RawIOBase):
    """Decompress zstd frames; raise EOFError for a cut one, which zstandard's own reader takes for the end."""

    def __init__(self, file: BinaryIO):
        import zstandard

        self._zstandard, self._file = zstandard, file
        self._frame: Any = None  # that is being decompressed
        self._packed, self._left = b"", memoryview(b"")  # slices of a view copy nothing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            packed = self._packed or self._file.read(_ZST_BYTES)
            if not packed:
                if self._frame is not None:
                    raise EOFError("a zstd frame is cut")
                return 0
            frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._left = memoryview(frame.decompress(packed))
            except self._zstandard.ZstdError as error:
                raise OSError(f"no zstd: {error}") from None
            self._frame, self._packed = (None, frame.unused_data) if frame.eof else (frame, b"")
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
