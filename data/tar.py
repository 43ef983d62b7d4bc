"""Tar headers -> members: where each is, which record it belongs to, and what is wrong with it.

Walks a tar's 512-byte blocks, trusts no size and no name, and resumes after damage. Names are split into key and
extension by webdataset's rule. Rejected: tarfile alone, which hides a broken tail and takes as long as the rest of a
read; it parses only headers that our own fast parser does not recognise.
"""

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

Read = Callable[[int, int], bytes]  # (offset, length) -> bytes of a shard, fewer only where it ends

TAR_BLOCK = 512
MAX_RECORD_BYTES = 1 << 30  # a header that claims more is hostile or broken
MAX_NAME_BYTES = 1 << 16
_META_RULE = re.compile(r"__[^/]*__($|/)")  # webdataset's members about the archive, part of no record
_FILE_TYPES = (b"0", b"\0", b"7")
_LINK_OR_FOLDER_TYPES = (b"1", b"2", b"3", b"4", b"5", b"6")  # without contents, whatever size they claim
_HEADER_TYPES = (b"x", b"L", b"g", b"K")  # describe the member after them (x and L: its name) or the archive
_MAGIC, _MAGIC_PLACE = b"ustar", 257
_SEARCH_BYTES = (1 << 13, 1 << 20)  # read at once in search of a header: at first, at most
_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
_SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")
# A file with an ASCII name and no prefix: name, mode, owners, size, time, checksum, type "0", no link, ustar or GNU.
_PLAIN_HEADER = re.compile(
    rb"([\x20-\x7e]{1,100})\0*[0-7]{7}\0.{16}([0-7]{11})\0.{12}([0-7]{6})\0 0\0{100}ustar.{83}\0{155}",
    re.DOTALL,
)


class Member(NamedTuple):
    """One tar member: offset of its first header, start and size of its contents, offset of the next header."""

    key: str | None  # None: part of no record
    extension: str
    problem: str | None  # why its record cannot be used; without a key, why it is left out (None: a folder)
    name: str
    offset: int
    start: int
    size: int
    after: int


class Break(NamedTuple):
    """Bytes [start, stop) without members: the end of an archive or, with a reason, what could not be read."""

    start: int
    stop: int
    reason: str | None = None  # as in BadRecord
    detail: str = ""
    is_cut: bool = False  # the file ends within them, so the rest is missing


@dataclass(frozen=True)
class _Said:
    """What extended headers say of the member after them."""

    name: str | None = None
    size: int | None = None
    problem: str | None = None
    error: tuple[str, str] | None = None  # reason and detail: unusable, so the member has no name


def members(read: Read, end: int) -> Iterator[Member | Break]:
    """Walk the tar headers in [0, end), past damage and past the end of an archive (`cat` joins them).

    After a damaged header, the next member is at the first block with a tar header's magic and a right checksum.
    """
    offset = first = 0  # of this header, and of the first one that describes the same member
    said = _Said()
    while offset < end:
        header = read(offset, TAR_BLOCK)
        if header[:1] == b"\0" and not header.strip(b"\0"):
            if first < offset:
                yield Break(first, offset, "broken header", "it describes no member")
            after = _after_zeros(read, offset, end)
            yield Break(offset, after)
            offset, first, said = after, after, _Said()
            continue
        if len(header) < TAR_BLOCK:
            yield Break(first, end, "truncated", f"{len(header)} of 512 bytes of a header", is_cut=True)
            return
        try:
            kind, name, size = _parse_header(header)
        except (ValueError, tarfile.HeaderError) as error:
            after = _next_header(read, offset + TAR_BLOCK, end)
            yield Break(first, after, "broken header", str(error))
            offset, first, said = after, after, _Said()
            continue
        start = offset + TAR_BLOCK
        if kind == tarfile.GNUTYPE_SPARSE:
            start = _after_sparse_map(read, start, header[482])
        if said.size is not None and kind not in _HEADER_TYPES + _LINK_OR_FOLDER_TYPES:
            size = said.size
        after = start + -(-size // TAR_BLOCK) * TAR_BLOCK
        if kind not in _HEADER_TYPES and said.error is None:
            # A cut member is yielded before the error: its name shows that the record before it is whole.
            yield _member(kind, said.name or name, said.problem, first, start, size, after)
        if after > end:
            reason = "oversized member" if size > MAX_RECORD_BYTES else "truncated"
            yield Break(first, end, reason, f"{name!r} ends at byte {after} of {end}", is_cut=True)
            return
        if kind == b"g":
            yield Member(None, "", "global header", name, offset, start, size, after)
            first = after if first == offset else first
        elif kind in _HEADER_TYPES:
            said = _said_by(kind, size, read, start, said)
        else:
            if said.error is not None:
                yield Break(first, after, *said.error)
            first, said = after, _Said()
        offset = after
    if first < offset:
        yield Break(first, end, "truncated", "an extended header is the last", is_cut=True)


def _after_zeros(read: Read, offset: int, end: int) -> int:
    """Return the offset of the first block from `offset` on that is not all zeros."""
    length, most = _SEARCH_BYTES
    while chunk := read(offset, min(length, end - offset)):
        if rest := len(chunk.lstrip(b"\0")):
            return offset + (len(chunk) - rest) // TAR_BLOCK * TAR_BLOCK
        offset, length = offset + len(chunk), min(2 * length, most)
    return end


def _next_header(read: Read, offset: int, end: int) -> int:
    """Return the offset of the next tar header from `offset` on, or of the zeros right before it, in linear time."""
    stop, (length, most) = offset, _SEARCH_BYTES  # stop: after the last block that is not all zeros

    def after_last(chunk: bytes) -> int:
        used = len(chunk.rstrip(b"\0"))
        return offset + -(-used // TAR_BLOCK) * TAR_BLOCK if used else stop

    while chunk := read(offset, min(length, end - offset)):
        magic, block = chunk[_MAGIC_PLACE::TAR_BLOCK], -1  # the first byte of each block's
        while (block := magic.find(_MAGIC[:1], block + 1)) >= 0:
            place = block * TAR_BLOCK
            if _is_header(chunk[place : place + TAR_BLOCK]):
                return after_last(chunk[:place])
        stop = after_last(chunk)
        offset, length = offset + len(chunk), min(2 * length, most)
    return min(stop, end)


def _is_header(block: bytes) -> bool:
    digits = block[148:156].strip(b" \0")
    has_magic = len(block) == TAR_BLOCK and block.startswith(_MAGIC, _MAGIC_PLACE)
    return has_magic and digits.isdigit() and not digits.strip(b"01234567") and _has_sum(block, int(digits, 8))


def _has_sum(header: bytes, checksum: int) -> bool:
    """Return whether a header has that checksum, in which the checksum's own eight bytes count as spaces."""
    # The lower half of adler32 is the sum of the bytes.
    return not ((zlib.adler32(header) & 0xFFFF) - sum(header[148:156]) - 1 + 256 - checksum) % 65521


def _after_sparse_map(read: Read, start: int, more: int) -> int:
    """Return where the contents of an old GNU sparse member start: after its map's blocks."""
    while more:
        block = read(start, TAR_BLOCK)
        start, more = start + TAR_BLOCK, len(block) == TAR_BLOCK and block[504]
    return start


def _member(kind: bytes, name: str, problem: str | None, first: int, start: int, size: int, after: int) -> Member:
    if kind == tarfile.DIRTYPE:
        return Member(None, "", None, name, first, start, size, after)
    if (what := left_out(name)) is not None:
        return Member(None, "", what, name, first, start, size, after)
    key, extension = key_of(name)
    if key is None:
        problem = "webdataset's meta data" if _META_RULE.match(name) else "name without extension"
    elif problem is None and kind == tarfile.GNUTYPE_SPARSE:
        problem = "sparse member"
    elif problem is None:
        problem = name_problem(name) if kind in _FILE_TYPES else "member is not a file"
    return Member(key, extension, problem, name, first, start, size, after)


def left_out(name: str) -> str | None:
    """Return what a file is that file managers add to folders, None for any other."""
    base = name.rpartition("/")[2]
    is_theirs = base.startswith("._") or base in _SYSTEM_FILES or ("__MACOSX" in name and "__MACOSX" in name.split("/"))
    return "file of macOS or Windows" if is_theirs else None


def _parse_header(header: bytes) -> tuple[bytes, str, int]:
    """Return (type, name, size) of a member; raise ValueError or tarfile's HeaderError for what is no header."""
    # tarfile's own parser takes 30 us a header, more than the rest of a read.
    match = _PLAIN_HEADER.match(header)
    if match and match.start(2) == 124 and _has_sum(header, int(match[3], 8)):  # name and zeros fill their field
        return b"0", match[1].decode(), int(match[2], 8)
    info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    if info.size < 0:
        raise ValueError(f"{info.size} bytes")
    return info.type, info.name, 0 if info.type in _LINK_OR_FOLDER_TYPES else info.size


def key_of(name: str) -> tuple[str | None, str]:
    """Return (key, extension) of a member's name by webdataset's rules; key None for a member of no record.

    The key ends at the first dot after the last slash. Rejected: webdataset's own regular expression, which takes
    seconds for a name of many slashes.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    has_key = dot and (stem or (slash and "." not in folder.rpartition("/")[2]))
    if not has_key or (name.startswith("__") and _META_RULE.match(name)):
        return None, ""
    return name[: len(name) - len(extension) - 1], extension.lower()


def name_problem(name: str) -> str | None:
    """Return what is wrong with a name that is not UTF-8 or escapes the folder it is unpacked in, else None."""
    if name[:1] == "/" or "\0" in name or (".." in name and ".." in name.split("/")):
        return "unsafe member name"
    return None if name.isascii() or not re.search("[\ud800-\udfff]", name) else "member name is not UTF-8"


def _said_by(kind: bytes, size: int, read: Read, start: int, said: _Said) -> _Said:
    """Return what is known of a member after one more GNU ("L") or pax ("x") header of it."""
    if size > MAX_NAME_BYTES:
        return replace(said, error=("oversized member", f"an extended header of {size} bytes"))
    if kind == b"L":
        return replace(said, name=read(start, size).rstrip(b"\0").decode("utf-8", "surrogateescape"))
    return _said_by_pax(read(start, size), said) if kind == b"x" else said


def _said_by_pax(contents: bytes, said: _Said) -> _Said:
    place, sparse_name = 0, None
    while contents[place : place + 1].strip(b"\0"):
        match = _PAX_RECORD.match(contents, place)
        end = place + int(match[1]) if match else 0
        value = contents[match.end() : end - 1] if match else b""
        is_ended = match is not None and match.end() < end <= len(contents) and contents[end - 1 : end] == b"\n"
        if match is None or not is_ended or (match[2] == b"size" and not re.fullmatch(rb"\d{1,20}", value)):
            return replace(said, error=("broken header", f"pax record {contents[place : place + 80]!r}"))
        if match[2] == b"path":
            said = replace(said, name=value.decode("utf-8", "surrogateescape"))
        elif match[2] == b"size":
            said = replace(said, size=int(value))
        elif match[2].startswith(b"GNU.sparse."):
            said = replace(said, problem="sparse member")
            sparse_name = value if match[2] == b"GNU.sparse.name" else sparse_name
        place = end
    return said if sparse_name is None else replace(said, name=sparse_name.decode("utf-8", "surrogateescape"))
