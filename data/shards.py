"""Tar shards as records: scan, index, read at offsets, write, and count what is bad.

One reader serves raw and encoded shards. webdataset writes them and gives the key rule, but it does not read them
here: it drops a truncated tail uncounted and hands on the cut sample without its later members. A record is the run
of consecutive members that share a key; it is complete only if another record or the end-of-archive block follows.
Keys are valid UTF-8 and stay inside the archive: no `..`, no leading slash.
"""

import io
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

Record = dict[str, bytes]  # extension -> contents, and "__key__" -> the key in UTF-8

TAR_BLOCK = 512
MAX_RECORD_BYTES = 1 << 30  # a header that claims more is hostile or broken
MAX_NAME_BYTES = 1 << 16
NAMES_KEPT = 20  # of bad records
_KEY_RULE = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's: the key ends at the name's first dot
_META_RULE = re.compile(r"__[^/]*__($|/)")  # webdataset's: members about the archive, part of no record
_FILE_TYPES = (b"0", b"\0", b"7")
_LINK_OR_FOLDER_TYPES = (b"1", b"2", b"3", b"4", b"5", b"6")  # have no contents, whatever size they claim
_HEADER_TYPES = (b"x", b"L", b"g", b"K")  # describe the member after them (x and L: its name) or the archive
_END_OF_ARCHIVE = bytes(TAR_BLOCK)
# A file of an ASCII name, no prefix: name, mode and owners, size, time, checksum, type "0", no link, ustar or GNU.
_PLAIN_HEADER = re.compile(
    rb"([\x20-\x7e]{1,100})\0*[0-7]{7}\0.{16}([0-7]{11})\0.{12}([0-7]{6})\0 0\0{100}ustar.{83}\0{155}",
    re.DOTALL,
)
# What numpy and zipfile raise for bytes that are no archive of arrays.
_NOT_ARRAYS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


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
        if len(self.names) < NAMES_KEPT:
            self.names.append(str(error))

    def check(self, final: bool = False) -> None:
        """Raise ValueError when more than `max_fraction` of the records seen were bad."""
        bad = self.reasons.total()
        if bad and (final or self.seen >= 20) and bad > self.max_fraction * max(self.seen, 1):
            raise ValueError(
                f"{bad} of {self.seen} records are bad, more than max_bad_fraction={self.max_fraction}: "
                f"{self.summary()}" + (f". First: {'; '.join(self.names[:3])}" if self.names else "")
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
    def load(cls, path: Path, crc32: int | None = None) -> "ShardIndex":
        """Raise BadRecord where the file is missing, torn, not an index or (if given) of another checksum."""
        try:
            data = path.read_bytes()
            if crc32 is not None and zlib.crc32(data) != crc32:
                raise ValueError("its checksum differs from the manifest's")
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                index = cls(**{name: arrays[name] for name in ("spans", "text_tokens", "grid_starts", "grids")})
            index._check_shapes()
        except _NOT_ARRAYS as error:
            raise BadRecord("unreadable index", str(path), str(error)) from None
        return index

    def _check_shapes(self) -> None:
        shapes = [(array.ndim, array.dtype.kind) for array in vars(self).values()]
        if shapes != [(2, "i"), (1, "i"), (1, "i"), (2, "i")]:
            raise ValueError(f"arrays of (dimensions, kind) {shapes}")
        records, images = len(self.spans), len(self.grids)
        starts = self.grid_starts
        if self.spans.shape[1] != 3 or self.grids.shape[1] != 2 or len(self.text_tokens) != records:
            raise ValueError(f"arrays of shapes {[array.shape for array in vars(self).values()]}")
        if len(starts) != records + 1 or starts[0] != 0 or starts[-1] != images or (np.diff(starts) < 0).any():
            raise ValueError(f"grid_starts do not cut {images} images into {records} records")

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
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                os.replace(self.temporary, self.path)
        finally:
            self.file.close()
            self.temporary.unlink(missing_ok=True)  # there only if something failed


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".idx")


def write_shard(path: Path, records: Iterable[Record]) -> None:
    """Write records as a tar through webdataset: same records, same bytes (times, owners and modes fixed).

    Raises ValueError for a key that would not read back as it is, or that is the same as its predecessor's.
    """
    import webdataset

    last = None
    with (
        atomic_write(path) as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o444) as writer,
    ):
        for record in records:
            key = record["__key__"].decode()
            if key == last or _key_of(f"{key}.x") != (key, "x") or _name_problem(key):
                raise ValueError(f"{path}: key {key!r} repeats, holds a dot or leaves the archive; rename the record")
            writer.write({**record, "__key__": key})
            last = key


def index_shard(path: Path, sizes_of: Callable[[Record], tuple[int, list[tuple[int, int]]]]) -> ShardIndex:
    """Read a whole shard and return its index; `sizes_of` gives a record's text tokens and image grids.

    Raises BadRecord at the first record that is broken: an index vouches for every record it lists.
    """
    spans, text_tokens, counts, grids = [], [], [0], []
    with open(path, "rb") as file:
        for offset, length in _scan(file, str(path)):
            where = f"{path}@{offset}"
            span = _read_span(file.fileno(), offset, length, where)
            tokens, record_grids = sizes_of(parse_record(span, where))
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
    offset, length, crc32 = span.tolist()
    data = _read_span(file_descriptor, offset, length, where)
    if zlib.crc32(data) != crc32:
        raise BadRecord("checksum", where)
    return parse_record(data, where)


def read_shard(path: Path, bad: BadRecords) -> Iterator[Record]:
    """Yield a shard's good records in file order; bad ones are counted in `bad`, and a broken tail as one."""
    with open(path, "rb") as file:
        spans = _scan(file, str(path))
        while True:
            try:
                offset, length = next(spans)
                where = f"{path}@{offset}"
                record = parse_record(_read_span(file.fileno(), offset, length, where), where)
            except StopIteration:
                return
            except BadRecord as error:  # one record's, or the tail's: then the next turn ends the shard
                bad.seen += 1
                bad.add(error)
                bad.check()
            else:
                bad.seen += 1
                yield record


def parse_record(span: bytes, where: str) -> Record:
    """Return the members of one record's bytes by extension, and its key; raise BadRecord for one we do not trust."""
    record: Record = {}
    for member in _members(lambda offset, size: span[offset : offset + size], len(span), where):
        if member.key is None:
            continue
        key = member.key.encode(errors="surrogateescape")
        if member.problem is not None:
            raise BadRecord(member.problem, where, repr(key))
        if record.setdefault("__key__", key) != key or member.extension in record:
            raise BadRecord("duplicate member", where, f"{key!r} {member.extension}")
        record[member.extension] = span[member.start : member.start + member.size]
    return record


class _Member(NamedTuple):
    """One tar member: its first header's offset, where its contents start, their size, where the next header is."""

    key: str | None  # None: a folder, a name without an extension or webdataset's meta data: part of no record
    extension: str
    problem: str | None  # why its record cannot be used
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
        if header == _END_OF_ARCHIVE:
            return
        place = f"{where}@{offset}"
        if len(header) < TAR_BLOCK:
            raise BadRecord("truncated", place, "no end-of-archive block")
        kind, name, size = _plain_header(header) or _any_header(header, place)
        is_member = kind not in _HEADER_TYPES
        if not 0 <= size <= (MAX_RECORD_BYTES if is_member else MAX_NAME_BYTES):
            raise BadRecord("oversized member", place, f"{size} bytes")
        start = offset + TAR_BLOCK
        after = start + -(-size // TAR_BLOCK) * TAR_BLOCK
        if is_member:
            name = long_name or name
            key, extension = _key_of(name) if kind != tarfile.DIRTYPE else (None, "")
            problem = "member is not a file" if kind not in _FILE_TYPES else _name_problem(name)
            # A member that is cut is handed on before the error: its name shows that the record before it is whole.
            yield _Member(key, extension, problem, first, start, size, after)
        if after > end:
            raise BadRecord("truncated", place, f"{name!r} ends at byte {after} of {end}")
        if is_member:
            first, long_name = after, None
        elif kind in (b"x", b"L"):
            long_name = _long_name(kind, read(start, size)) or long_name
        offset = after


def _plain_header(header: bytes) -> tuple[bytes, str, int] | None:
    """Return (type, name, size) of a header such as TarWriter writes for a file, None for every other.

    tarfile's own parser takes 30 us a header, more than all the rest of a read; adler32's lower half is the sum of
    the bytes that a tar header's checksum asks for, but for its own eight bytes counting as spaces.
    """
    match = _PLAIN_HEADER.match(header)
    if match is None or match.start(2) != 124:  # a name of another length than its field
        return None
    name, size, checksum = match.groups()
    if ((zlib.adler32(header) & 0xFFFF) - sum(header[148:156]) - 1 + 256 - int(checksum, 8)) % 65521:
        return None
    return b"0", name.decode(), int(size, 8)


def _any_header(header: bytes, where: str) -> tuple[bytes, str, int]:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise BadRecord("broken header", where, str(error)) from None
    return info.type, info.name, 0 if info.type in _LINK_OR_FOLDER_TYPES else info.size


def _key_of(name: str) -> tuple[str | None, str]:
    """Return (key, extension) of a member's name by webdataset's rules; key None where it is part of no record."""
    match = _KEY_RULE.fullmatch(name)
    return (match[1], match[2].lower()) if match and not _META_RULE.match(name) else (None, "")


def _name_problem(name: str) -> str | None:
    """Return what is wrong with a name that is not UTF-8 or would leave a folder it is unpacked in, else None."""
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        return "unsafe member name"
    return None if name.isascii() or not re.search("[\ud800-\udfff]", name) else "member name is not UTF-8"


def _long_name(kind: bytes, contents: bytes) -> str | None:
    """Return the name that a GNU ("L") or pax ("x") header gives to the member after it, if it gives one."""
    if kind == b"L":
        return contents.rstrip(b"\0").decode("utf-8", "surrogateescape")
    match = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", contents)
    return match[1].decode("utf-8", "surrogateescape") if match else None


def _read_span(file_descriptor: int, offset: int, length: int, where: str) -> bytes:
    if offset < 0 or not 0 <= length <= MAX_RECORD_BYTES:
        raise BadRecord("oversized record", where, f"{length} bytes at {offset}")
    data = os.pread(file_descriptor, length, offset)
    if len(data) != length:
        raise BadRecord("truncated", where, f"{len(data)} of {length} bytes")
    return data
