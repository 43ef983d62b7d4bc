"""Tar headers -> members: where each lies, which record it belongs to, and what is wrong with it.

A strict walk over a tar's 512-byte blocks that trusts no size and no name. webdataset gives the rule by which a name
becomes a key and an extension. Rejected: tarfile, which hides a broken tail and takes as long as all the rest of a
read; it parses what our own fast parser does not recognise.
"""

import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

Read = Callable[[int, int], bytes]  # (offset, length) -> bytes of a shard, fewer only where it ends

TAR_BLOCK = 512
MAX_RECORD_BYTES = 1 << 30  # a header that claims more is hostile or broken
MAX_NAME_BYTES = 1 << 16
MAX_SHOWN = 500  # characters of a bad record's place and details: names in hostile shards have no end
_META_RULE = re.compile(r"__[^/]*__($|/)")  # webdataset's: members about the archive, part of no record
_FILE_TYPES = (b"0", b"\0", b"7")
_LINK_OR_FOLDER_TYPES = (b"1", b"2", b"3", b"4", b"5", b"6")  # have no contents, whatever size they claim
_HEADER_TYPES = (b"x", b"L", b"g", b"K")  # describe the member after them (x and L: its name) or the archive
_END_OF_ARCHIVE = bytes(TAR_BLOCK)
_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
# A file of an ASCII name, no prefix: name, mode and owners, size, time, checksum, type "0", no link, ustar or GNU.
_PLAIN_HEADER = re.compile(
    rb"([\x20-\x7e]{1,100})\0*[0-7]{7}\0.{16}([0-7]{11})\0.{12}([0-7]{6})\0 0\0{100}ustar.{83}\0{155}",
    re.DOTALL,
)


class BadRecord(ValueError):
    """A record that cannot be used; `reason` is a short stable name to count by."""

    def __init__(self, reason: str, where: str, detail: str = ""):
        message = f"{where[:MAX_SHOWN]}: {reason}" + (f" ({detail[:MAX_SHOWN]})" if detail else "")
        if not message.isprintable():  # nor may they move a terminal's cursor or begin a line of a log
            message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__(message)
        self.reason, self.where = reason, where


class Member(NamedTuple):
    """One tar member: its first header's offset, where its contents start, their size, where the next header is."""

    key: str | None  # None: a folder, a name without an extension or webdataset's meta data: part of no record
    extension: str
    problem: str | None  # why its record cannot be used
    offset: int
    start: int
    size: int
    after: int


def members(read: Read, end: int, where: str, whole: bool = False) -> Iterator[Member]:
    """Walk the tar headers in [0, end); `whole` also demands the end-of-archive block."""
    offset = first = 0
    long_name = None
    while offset < end or whole:
        header = read(offset, TAR_BLOCK)
        if header == _END_OF_ARCHIVE:
            return
        if len(header) < TAR_BLOCK:
            raise BadRecord("truncated", f"{where}@{offset}", "no end-of-archive block")
        kind, name, size = _plain_header(header) or _any_header(header, f"{where}@{offset}")
        is_member = kind not in _HEADER_TYPES
        if not 0 <= size <= (MAX_RECORD_BYTES if is_member else MAX_NAME_BYTES):
            raise BadRecord("oversized member", f"{where}@{offset}", f"{size} bytes")
        start = offset + TAR_BLOCK
        after = start + -(-size // TAR_BLOCK) * TAR_BLOCK
        if is_member:
            name = long_name or name
            key, extension = key_of(name) if kind != tarfile.DIRTYPE else (None, "")
            problem = "member is not a file" if kind not in _FILE_TYPES else name_problem(name)
            # A member that is cut is handed on before the error: its name shows that the record before it is whole.
            yield Member(key, extension, problem, first, start, size, after)
        if after > end:
            raise BadRecord("truncated", f"{where}@{offset}", f"{name!r} ends at byte {after} of {end}")
        if is_member:
            first, long_name = after, None
        elif kind in (b"x", b"L"):
            long_name = _long_name(kind, read(start, size), f"{where}@{offset}") or long_name
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


def key_of(name: str) -> tuple[str | None, str]:
    """Return (key, extension) of a member's name by webdataset's rules; key None where it is part of no record.

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
    """Return what is wrong with a name that is not UTF-8 or would leave a folder it is unpacked in, else None."""
    if name[:1] == "/" or "\0" in name or (".." in name and ".." in name.split("/")):
        return "unsafe member name"
    return None if name.isascii() or not re.search("[\ud800-\udfff]", name) else "member name is not UTF-8"


def _long_name(kind: bytes, contents: bytes, where: str) -> str | None:
    """Return the name that a GNU ("L") or pax ("x") header gives to the member after it, if it gives one.

    Raises BadRecord for a pax header that is broken, or by which the member is not as its own header says.
    """
    if kind == b"L":
        return contents.rstrip(b"\0").decode("utf-8", "surrogateescape")
    name, place = None, 0
    while contents[place : place + 1].strip(b"\0"):
        match = _PAX_RECORD.match(contents, place)
        end = place + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(contents) or contents[end - 1 : end] != b"\n":
            raise BadRecord("broken header", where, f"pax record {contents[place : place + 80]!r}")
        if match[2] == b"size" or match[2].startswith(b"GNU.sparse."):
            raise BadRecord("unsupported member", where, f"pax record {contents[place : place + 80]!r}")
        if match[2] == b"path":
            name = contents[match.end() : end - 1].decode("utf-8", "surrogateescape")
        place = end
    return name
