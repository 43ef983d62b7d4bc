"""Tar shards as records: scan, index, read at offsets, write.

One reader serves raw and encoded shards. webdataset writes them and defines keys, but is not used to read: it drops
a truncated tail uncounted and yields the cut sample without its missing members. A record is a run of consecutive
members that share a key. It is complete only if no bytes were lost on either side of it and another record or an
end-of-archive block follows; in a file without such a block, the last record is complete if an earlier one had exactly
its members. Keys are valid UTF-8 and stay inside the archive: no `..`, no leading slash.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64

from data.bad_records import BadRecord, BadRecords
from data.durable import atomic_write
from data.shard_index import ShardIndex
from data.signatures import HEAD_BYTES, looks_like
from data.tar import MAX_RECORD_BYTES, Member, Read, key_of, left_out, members, name_problem

Record = dict[str, bytes]  # extension -> contents, and "__key__" -> the key in UTF-8

_PROBE_BYTES = 1 << 24  # a longer read tries its last byte first


def write_shard(path: Path, records: Iterable[Record]) -> int:
    """Write records as a tar through webdataset: same records, same bytes (times, owners and modes fixed).

    Returns the file's inode, which tells it from one that another process renames over it.
    Raises ValueError for a key that would not read back unchanged or that equals its predecessor's.
    """
    import webdataset

    last = None
    with (
        atomic_write(path) as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o444) as writer,
    ):
        for record in records:
            key = record["__key__"].decode()
            if key == last or key_of(f"{key}.x") != (key, "x") or name_problem(key) or left_out(key):
                raise ValueError(f"{path}: key {key!r} repeats, holds a dot or leaves the archive; rename the record")
            writer.write({**record, "__key__": key})
            last = key
        return os.fstat(file.fileno()).st_ino


def index_shard(
    path: Path, sizes_of: Callable[[Record], tuple[int, list[tuple[int, int]]]], bad: BadRecords
) -> ShardIndex:
    """Read a whole shard and return the index of its good records; bad ones are counted in `bad` and left out.

    `sizes_of` returns a record's text tokens and image grids, or raises BadRecord: an index lists only valid records.
    """
    spans, text_tokens, counts, grids, contents = [], [], [0], [], []
    for offset, data, record in _records(path, str(path), bad):
        try:
            tokens, record_grids = sizes_of(record)
        except BadRecord as error:
            bad.add(error)
            continue
        spans.append((offset, len(data), zlib.crc32(data)))
        text_tokens.append(tokens)
        contents.append(content_key(record))
        grids.extend(record_grids)
        counts.append(len(grids))
    return ShardIndex(
        spans=np.array(spans, dtype=np.int64).reshape(-1, 3),
        text_tokens=np.array(text_tokens, dtype=np.int64),
        grid_starts=np.array(counts, dtype=np.int64),
        grids=np.array(grids, dtype=np.int32).reshape(-1, 2),
        contents=np.array(contents, dtype=np.uint64),
    )


def content_key(record: Record) -> int:
    """Return a 64-bit hash of a record's contents, its key and its JSON (kept for people) left out."""
    digest = xxh3_64()
    for name in sorted(record.keys() - {"__key__", "json"}):
        digest.update(f"{name} {len(record[name])} ".encode())
        digest.update(record[name])
    return digest.intdigest()


def read_at(read: Read, span: np.ndarray, where: str) -> Record:
    """Read one record at its index span (offset, length, crc32); raise BadRecord unless its bytes match."""
    offset, length, crc32 = span.tolist()
    data = _read_span(read, offset, length, where)
    if zlib.crc32(data) != crc32:
        raise BadRecord("checksum", where)
    return parse_record(data, where)


def read_shard(path: Path, bad: BadRecords, name: str | None = None) -> Iterator[Record]:
    """Yield a shard's good records in file order, count the bad in `bad`; errors name `name` if `path` is a copy."""
    for _, _, record in _records(path, name or str(path), bad):
        yield record


def _records(path: Path, name: str, bad: BadRecords) -> Iterator[tuple[int, bytes, Record]]:
    """Yield (offset, bytes, record) of a shard's good records; at its end count in `bad` the bytes lost."""
    kinds: set[frozenset[str]] = set()  # sets of extensions that records had
    lost, is_cut = 0, False
    # Errors before the first record count only if there is one: a file without records is one failed file.
    counts, has_records = BadRecords(1), False
    with open(path, "rb") as file:

        def read(offset: int, length: int) -> bytes:
            return os.pread(file.fileno(), length, offset)

        size = os.fstat(file.fileno()).st_size
        for span in _scan(read, size, name, bad):
            if span.has_record and not has_records:
                bad.update(counts)
                counts, has_records = bad, True
            lost += span.lost
            is_cut |= span.is_cut
            counts.seen += 1
            where = f"{name}@{span.offset}"
            try:
                if span.error is not None:
                    raise span.error
                data = _read_span(read, span.offset, span.length, where)
                record = parse_record(data, where)
                if span.is_last and (is_cut := frozenset(record) not in kinds):
                    detail = "no end-of-archive block, and no earlier record of the same members"
                    raise BadRecord("truncated", where, detail)
            except BadRecord as error:
                counts.add(error)
                counts.check()
            else:
                kinds.add(frozenset(record))
                if span.is_last:
                    bad.note("file without an end-of-archive block, perhaps cut", name)
                yield span.offset, data, record
        head = read(0, HEAD_BYTES)
    if has_records:
        bad.files.append((size, 1.0 if is_cut else lost / size))
    else:
        what = looks_like(head)
        bad.failed.append(f"{name}: no record" + (f"; it is {what}" if what else f" in {size} bytes"))


def parse_record(span: bytes, where: str) -> Record:
    """Return the members of one record's bytes by extension, and its key; raise BadRecord for an untrusted one."""
    record: Record = {}
    for member in members(lambda offset, size: span[offset : offset + size], len(span)):
        if not isinstance(member, Member):
            if member.reason is not None:
                raise BadRecord(member.reason, where, member.detail)
            continue
        if member.key is None:
            continue
        key = member.key.encode(errors="surrogateescape")
        if member.problem is not None:
            raise BadRecord(member.problem, where, repr(key))
        if record.setdefault("__key__", key) != key or member.extension in record:
            raise BadRecord("duplicate member", where, f"{key!r} {member.extension}")
        record[member.extension] = span[member.start : member.start + member.size]
    return record


class _Span(NamedTuple):
    """The bytes of a record, or, with an error, bytes that hold no whole one."""

    offset: int
    length: int
    error: BadRecord | None = None
    has_record: bool = True  # whole or not
    is_last: bool = False  # and no end-of-archive block follows
    lost: int = 0  # bytes in which no member was found
    is_cut: bool = False  # the file ends too early


def _scan(read: Read, size: int, name: str, bad: BadRecords) -> Iterator[_Span]:
    """Yield each record's span in file order, and an error for bytes that were lost; note members of no record."""
    first = after = 0
    key = torn = lost_since = None  # the latter: why bytes were lost before this record, and before the next one

    def record(is_last: bool = False) -> _Span:
        detail = "its first members may be among the bytes lost before it"
        error = BadRecord(torn, f"{name}@{first}", f"{key!r}: {detail}") if torn else None
        return _Span(first, after - first, error, is_last=is_last)

    for part in members(read, size):
        if isinstance(part, Member):
            if part.key is None and part.problem is not None:
                bad.note(part.problem, f"{name}/{part.name}")
            elif part.key is not None and part.key != key:
                if key is not None:
                    yield record()
                first, key, torn, lost_since = part.offset, part.key, lost_since, None
            after = part.after
            continue
        if part.reason is not None:
            lost = part.stop - part.start
            detail = f"{part.detail}; {lost} bytes lost" + (f", and with them {key!r}" if key is not None else "")
            error = BadRecord(part.reason, f"{name}@{part.start}", detail)
            yield _Span(part.start, lost, error, key is not None, lost=lost, is_cut=part.is_cut)
            lost_since = part.reason
        elif key is not None:
            yield record()
        key = None
    if key is not None:
        yield record(is_last=True)


def _read_span(read: Read, offset: int, length: int, where: str) -> bytes:
    if not (0 <= offset < 1 << 62 and 0 <= length <= MAX_RECORD_BYTES):
        raise BadRecord("oversized record", where, f"{length} bytes at {offset}")
    if length > _PROBE_BYTES and not read(offset + length - 1, 1):  # allocate nothing for bytes that are not there
        raise BadRecord("truncated", where, f"fewer than {length} bytes at {offset}")
    data = read(offset, length)
    if len(data) != length:
        raise BadRecord("truncated", where, f"{len(data)} of {length} bytes")
    return data
