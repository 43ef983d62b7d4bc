"""Tar shards as records: scan, index, read at offsets, write, and count what is bad.

One reader serves raw and encoded shards. webdataset writes them and gives the key rule, but it does not read them
here: it drops a truncated tail uncounted and hands on the cut sample without its later members. A record is the run
of consecutive members that share a key; it is complete only if another record or the end-of-archive block follows.
"""

import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

Record = dict[str, bytes]  # extension -> contents, and "__key__" -> the key's bytes

TAR_BLOCK = 512
MAX_RECORD_BYTES = 1 << 30  # a header that claims more is hostile or broken
_KEY_RULE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's: the key ends at the name's first dot
_FILE_TYPES = (b"0", b"\0")
_NAME_TYPES = (b"x", b"L")  # headers that name the member after them
_IGNORED_TYPES = (b"5", b"g", b"K")  # folders, global headers, link names: no contents of a record


class BadRecord(ValueError):
    """A record that cannot be used; `reason` is a short stable name to count by."""

    def __init__(self, reason: str, where: str, detail: str = ""):
        super().__init__(f"{where}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.where = reason, where


@dataclass
class BadRecords:
    """Counts what was skipped by reason, remembers the first names, and stops past a share of all records."""

    max_fraction: float  # of all records seen, in [0, 1]; judged once 20 records were seen
    seen: int = 0
    reasons: Counter = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)

    def add(self, error: BadRecord) -> None:
        self.reasons[error.reason] += 1
        if len(self.names) < 20:
            self.names.append(str(error))

    def check(self, final: bool = False) -> None:
        """Raise ValueError when more than `max_fraction` of the records seen were bad."""
        bad = self.reasons.total()
        if bad and (final or self.seen >= 20) and bad > self.max_fraction * max(self.seen, 1):
            raise ValueError(
                f"{bad} of {self.seen} records are bad, more than max_bad_fraction={self.max_fraction}: "
                f"{self.summary()}. First: {'; '.join(self.names[:3])}"
            )

    def summary(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in sorted(self.reasons.items())) or "none"


@dataclass(frozen=True)
class ShardIndex:
    """Where each record of a shard lies and how much it holds; all arrays have one row a record.

    spans int64 [R, 3]: byte offset, byte length, crc32 of those bytes. text_tokens int64 [R].
    grid_starts int64 [R + 1] into grids int32 [G, 2]: latent (h, w) of each record's images.
    """

    spans: np.ndarray
    text_tokens: np.ndarray
    grid_starts: np.ndarray
    grids: np.ndarray

    def __len__(self) -> int:
        return len(self.spans)

    def save(self, path: Path) -> None:
        with atomic_write(path) as file:
            np.savez(file, **vars(self))

    @classmethod
    def load(cls, path: Path) -> "ShardIndex":
        """Raise BadRecord where the file is missing, torn or not an index."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in ("spans", "text_tokens", "grid_starts", "grids")})
        except (OSError, ValueError, KeyError, EOFError, tarfile.TarError) as error:
            raise BadRecord("unreadable index", str(path), str(error)) from None

    def document_tokens(self, patch_size: int) -> np.ndarray:
        """Return each record's length in tokens, int64 [R]: BOS, EOS, text, and BOI + patches + EOI an image."""
        patches = (self.grids[:, 0] // patch_size) * (self.grids[:, 1] // patch_size) + 2
        upto = np.concatenate([[0], np.cumsum(patches, dtype=np.int64)])
        return 2 + self.text_tokens + upto[self.grid_starts[1:]] - upto[self.grid_starts[:-1]]


class atomic_write:
    """Open `<path>.tmp-<pid>` for writing; on success fsync and rename to `path`, else leave nothing."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")

    def __enter__(self) -> BinaryIO:
        self.file = open(self.temporary, "wb")
        return self.file

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".idx")


def write_shard(path: Path, records: Iterable[Record]) -> None:
    """Write records as a tar through webdataset: same records, same bytes (times, owners and modes fixed)."""
    import webdataset

    with atomic_write(path) as file:
        writer = webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o444)
        for record in records:
            writer.write({name: value.decode() if name == "__key__" else value for name, value in record.items()})
        writer.close()


def index_shard(path: Path, sizes_of: Callable[[Record], tuple[int, list[tuple[int, int]]]]) -> ShardIndex:
    """Read a whole shard and return its index; `sizes_of` gives a record's text tokens and image grids.

    Raises BadRecord at the first record that is broken: an index vouches for every record it lists.
    """
    spans, text_tokens, counts, grids = [], [], [0], []
    with open(path, "rb") as file:
        for offset, length in _scan(file, str(path)):
            span = os.pread(file.fileno(), length, offset)
            tokens, record_grids = sizes_of(parse_record(span, f"{path}@{offset}"))
            spans.append((offset, length, zlib.crc32(span)))
            text_tokens.append(tokens)
            grids.extend(record_grids)
            counts.append(len(grids))
    return ShardIndex(
        spans=np.array(spans, dtype=np.int64).reshape(-1, 3),
        text_tokens=np.array(text_tokens, dtype=np.int64),
        grid_starts=np.array(counts, dtype=np.int64),
        grids=np.array(grids, dtype=np.int32).reshape(-1, 2),
    )


def read_at(file_descriptor: int, span: np.ndarray, where: str) -> Record:
    """Read one record at its index span (offset, length, crc32); raise BadRecord unless the bytes are the indexed."""
    offset, length, crc = (int(value) for value in span)
    data = os.pread(file_descriptor, length, offset)
    if len(data) != length:
        raise BadRecord("truncated", where, f"{len(data)} of {length} bytes")
    if zlib.crc32(data) != crc:
        raise BadRecord("checksum", where)
    return parse_record(data, where)


def read_shard(path: Path, bad: BadRecords) -> Iterator[Record]:
    """Yield a shard's complete records in file order; a broken tail is counted in `bad` and ends the shard."""
    with open(path, "rb") as file:
        try:
            for offset, length in _scan(file, str(path)):
                bad.seen += 1
                yield parse_record(os.pread(file.fileno(), length, offset), f"{path}@{offset}")
        except BadRecord as error:
            bad.seen += 1
            bad.add(error)
            bad.check()


def parse_record(span: bytes, where: str) -> Record:
    """Return the members of one record's bytes by extension, and its key."""
    record: Record = {}
    for member in _members(lambda offset, size: span[offset : offset + size], len(span), where):
        if member.key is not None:
            record["__key__"] = member.key.encode()
            record[member.extension] = span[member.start : member.start + member.size]
    return record


@dataclass(frozen=True)
class _Member:
    """One tar member: its header's offset, where its contents start, their size, where the next header is."""

    key: str | None  # None: a folder or a name without an extension, part of no record
    extension: str
    offset: int
    start: int
    size: int
    after: int


def _scan(file: BinaryIO, where: str) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of each complete record; raise BadRecord at a cut or broken tail, after the whole ones."""
    first, after, key = 0, 0, None
    file_descriptor, end = file.fileno(), os.fstat(file.fileno()).st_size
    for member in _members(lambda offset, size: os.pread(file_descriptor, size, offset), end, where, whole=True):
        if member.key is not None and member.key != key:
            if key is not None:
                yield first, after - first
            first, key = member.offset, member.key
        after = member.after
    if key is not None:
        yield first, after - first


def _members(read: Callable[[int, int], bytes], end: int, where: str, whole: bool = False) -> Iterator[_Member]:
    """Walk the tar headers in [0, end); `whole` also demands the end-of-archive block."""
    offset = first = 0
    long_name = None
    while offset < end or whole:
        header = read(offset, TAR_BLOCK)
        if header == bytes(TAR_BLOCK):
            return
        place = f"{where}@{offset}"
        if len(header) < TAR_BLOCK:
            raise BadRecord("truncated", place, "no end-of-archive block")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise BadRecord("broken header", place, str(error)) from None
        start, after = offset + TAR_BLOCK, offset + TAR_BLOCK + -(-info.size // TAR_BLOCK) * TAR_BLOCK
        if not 0 <= info.size <= MAX_RECORD_BYTES:
            raise BadRecord("oversized member", place, f"{info.size} bytes")
        if after > end:
            raise BadRecord("truncated", place, f"{info.name} ends at byte {after} of {end}")
        if info.type in _NAME_TYPES:
            long_name = _long_name(info.type, read(start, info.size)) or long_name
        elif info.type in (*_FILE_TYPES, *_IGNORED_TYPES):
            match = _KEY_RULE.match(long_name or info.name) if info.type in _FILE_TYPES else None
            key, extension = (match[1], match[2].lower()) if match else (None, "")
            yield _Member(key, extension, first, start, info.size, after)
            first, long_name = after, None
        else:
            raise BadRecord("member is not a file", place, info.name)
        offset = after


def _long_name(kind: bytes, contents: bytes) -> str | None:
    """Return the name that a GNU ("L") or pax ("x") header gives to the member after it, if it gives one."""
    if kind == b"L":
        return contents.rstrip(b"\0").decode("utf-8", "surrogateescape")
    match = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", contents)
    return match[1].decode("utf-8", "surrogateescape") if match else None
