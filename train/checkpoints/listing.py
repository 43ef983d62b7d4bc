"""The files of one checkpoint, listed with their sizes and checksums, and verified (P5). Knows nothing of tensors.

Rejected: sha256 (there is no adversary here), and crc32 (it takes a third of the write).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64, xxh3_64_hexdigest

LISTING = "checksums.json"
INDEX, PICKLED_INDEX = "index.json", ".metadata"  # which part of which tensor is where: index.py
FILE_NAME = re.compile(r"[\w.-]+", re.ASCII)
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class WrittenFile:
    """Size and checksum of one file of a checkpoint, counted as it was written."""

    name: str
    num_bytes: int
    xxh3: str  # 16 hexadecimal digits


def read_listing(folder: Path) -> dict[str, WrittenFile]:
    """Return the files of `folder` by name; raises OSError or ValueError if their listing is missing or damaged."""
    try:
        files = json.loads((folder / LISTING).read_bytes())["files"]
        listing = {name: WrittenFile(name, int(file["bytes"]), file["xxh3"]) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{LISTING} is damaged: {type(error).__name__}: {error}") from None
    if not {INDEX, PICKLED_INDEX} & listing.keys():
        raise ValueError(f"{LISTING} is damaged: it does not name {INDEX}")
    if strange := [name for name in listing if not FILE_NAME.fullmatch(name)]:
        raise ValueError(f"{LISTING} is damaged: it names {strange[0]!r}, expected files directly in the folder")
    return listing


def problem_of(folder: Path, expected: WrittenFile, on_read: Callable[[int], object] | None = None) -> str | None:
    """Read one file and return what is wrong with it, or None; `on_read` gets the number of bytes of each read."""
    num_bytes, checksum = 0, xxh3_64()
    buffer = memoryview(bytearray(READ_BYTES))
    try:
        with (folder / expected.name).open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                num_bytes += count
                checksum.update(buffer[:count])
                if on_read is not None:
                    on_read(count)
    except OSError as error:
        return f"{expected.name}: {error.strerror}"
    if num_bytes != expected.num_bytes:
        return f"{expected.name}: {num_bytes} bytes, {expected.num_bytes} were written"
    if checksum.hexdigest() != expected.xxh3:
        return f"{expected.name}: xxh3 {checksum.hexdigest()}, {expected.xxh3} was written"
    return None


def read_extra(folder: Path, name: str) -> bytes:
    """Return a file without tensors; raises ValueError if it differs from its checksum, OSError if it is gone."""
    content = (folder / name).read_bytes()
    found, expected = WrittenFile(name, len(content), xxh3_64_hexdigest(content)), read_listing(folder).get(name)
    if found != expected:
        raise ValueError(f"checkpoint {folder} is damaged: {name}: expected {expected}, found {found}")
    return content
