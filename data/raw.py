"""Raw data -> RawDocument: texts and still compressed pictures in order, as the encoder takes them.

Three kinds of input file. A .tar holds a record a document (img2dataset's layout): a picture with its caption in .txt
or in .json under "caption"; or, interleaved, a .json with "segments": texts and {"image": MEMBER} in order, MEMBER
being what follows the key in the member's name (`0.jpg` of `000012.0.jpg`). A .jsonl (.gz, .zst) holds a text a line
under "text". A .txt is one text. What cannot be used is counted by reason.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data.documents import MAX_SEGMENTS
from data.remote import is_http, shown
from data.shards import BadRecord, BadRecords, Record, read_shard
from data.signatures import HEAD_BYTES, LFS_POINTER, looks_like
from data.storage import expand, local_copy

TAR, TEXT = ".tar", ".txt"
SUFFIXES = (TAR, ".jsonl", ".jsonl.gz", ".jsonl.zst", TEXT)
PICTURES = ("jpg", "jpeg", "png", "webp")
MAX_TEXT_BYTES = 1 << 26  # of one text; more is no document
MAX_PICTURES = 1000  # of a document
MAX_MEMBER_BYTES = 1 << 24  # of a record's .txt or .json; lists in JSON take 25 times their bytes
_ZST_BYTES = 1024  # fed at once: they may stand for 30,000 times as many
# What decoding and looking up raise for bytes that hold no text.
_NO_TEXT = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class RawDocument:
    key: str
    where: str
    segments: tuple[str | bytes, ...]  # text, or the bytes of a picture's file
    info: dict[str, Any]  # what is kept for people
    input_bytes: int  # of its input file, about


def suffix_of(path: str) -> str:
    """Return which of SUFFIXES a path or URL ends in, in any case, "" for none."""
    name = _without_query(path).lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), "")


def input_name(path: str) -> str:
    """Return the file name of a path or URL without its suffix: the name of the shard made of it."""
    name = _without_query(path).rsplit("/", 1)[-1]
    return name[: len(name) - len(suffix_of(path))]


def _without_query(path: str) -> str:
    return path.split("?")[0] if is_http(path) else path


def read_raw(file: Path, source: str, bad: BadRecords) -> Iterator[RawDocument]:
    """Yield the good documents of an input file in order; `file` is `source` itself or a local copy of it."""
    if suffix_of(source) != TAR:
        yield from _read_texts(file, source, bad)
        return
    keys: set[str] = set()
    for record in read_shard(file, bad, shown(source)):
        key = record["__key__"].decode()
        where = f"{shown(source)}/{key}"
        try:
            if key in keys:
                raise BadRecord("duplicate key", where, "or its members do not follow each other")
            keys.add(key)
            yield _document(record, key, where)
        except BadRecord as error:
            bad.add(error)


def read_texts(inputs: Sequence[str], bad: BadRecords) -> Iterator[tuple[str, str]]:
    """Yield (text, where) of every caption and text in `inputs`; what cannot be read is counted in `bad`."""
    for source in expand(inputs, SUFFIXES):
        with local_copy(source) as file:
            for document in read_raw(file, source, bad):
                for segment in document.segments:
                    if isinstance(segment, str):
                        yield segment, document.where


def caption_of(record: Record, where: str) -> str:
    """Return the caption in a record's `.txt`, or in its `.json` under "caption"; raise BadRecord for none."""
    try:
        if "txt" in record:
            text = _member(record, "txt", where).decode()
        else:
            text = json.loads(_member(record, "json", where)).get("caption") or ""
        text.encode()
    except BadRecord:
        raise
    except _NO_TEXT as error:
        raise BadRecord("undecodable caption", where, str(error)) from None
    if not text.strip():
        raise BadRecord("empty caption", where)
    return text.strip()


def picture_of(record: Record, where: str) -> bytes:
    """Return the file of a record's picture; raise BadRecord for none."""
    extension = next((name for name in PICTURES if name in record), None)
    if extension is None:
        raise BadRecord("no picture", where, f"members {sorted(record)}")
    return record[extension]


def _member(record: Record, name: str, where: str) -> bytes:
    """Return a record's .txt or .json, an empty object where there is none; raise BadRecord for one without end."""
    data = record.get(name, b"{}")
    if len(data) > MAX_MEMBER_BYTES:
        raise BadRecord("oversized text", where, f"{len(data)} bytes in .{name}, more than {MAX_MEMBER_BYTES}")
    return data


def _document(record: Record, key: str, where: str) -> RawDocument:
    info = _json_object(_member(record, "json", where))
    size = sum(map(len, record.values()))
    if "segments" in info:
        return RawDocument(key, where, tuple(_segments(info["segments"], record, where)), info, size)
    picture, caption = picture_of(record, where), caption_of(record, where)
    return RawDocument(key, where, (caption, picture), {**info, "caption": caption}, size)


def _segments(listed: Any, record: Record, where: str) -> Iterator[str | bytes]:
    if not isinstance(listed, list) or not listed:
        raise BadRecord("undecodable segments", where, "expected a list of texts and images")
    if len(listed) > MAX_SEGMENTS:
        raise BadRecord("too many segments", where, f"{len(listed)}, expected at most {MAX_SEGMENTS}")
    pictures = 0
    for segment in listed:
        member = segment.get("image") if isinstance(segment, dict) else None
        if isinstance(member, str):
            if (pictures := pictures + 1) > MAX_PICTURES:
                raise BadRecord("too many pictures", where, f"more than {MAX_PICTURES}")
            if member.lower() not in record:
                raise BadRecord("no picture", where, f"no {member!r} among members {sorted(record)}")
            yield record[member.lower()]
        elif isinstance(segment, str) and _is_text(segment):
            if segment.strip():
                yield segment
        else:
            raise BadRecord("undecodable segments", where, repr(segment)[:80])


def _read_texts(file: Path, source: str, bad: BadRecords) -> Iterator[RawDocument]:
    key, suffix, name = input_name(source).replace(".", "_"), suffix_of(source), shown(source)  # a key ends at a dot
    is_whole, is_cut, number, read = suffix == TEXT, False, 0, 0
    with _open_text(file, suffix) as (raw, text):
        size, what = file.stat().st_size, _other_kind(raw, suffix)
        lines = _lines(text, is_whole) if what is None else iter(())
        while not is_cut:
            where = f"{name}:{number + 1}"
            try:
                line = next(lines)
                content = _text(line, where, is_json=not is_whole)
                info = {"source": input_name(source) + suffix, "line": number + 1}
                yield RawDocument(f"{key}-{number:08d}", where, (content,), info, raw.tell() - read)
            except StopIteration:
                break
            except BadRecord as error:
                bad.add(error)
            except (OSError, EOFError, zlib.error) as error:  # of the compression: there is no more
                bad.add(BadRecord("truncated", where, str(error)))
                is_cut = True
            bad.seen += 1
            number, read = number + 1, raw.tell()
    if number:
        bad.files.append((size, float(is_cut)))
    elif is_whole and what is None:
        bad.seen += 1
        bad.add(BadRecord("empty text", name))
    else:
        bad.failed.append(f"{name}: no text; it is {what or 'of no lines'}")


def _other_kind(file: BinaryIO, suffix: str) -> str | None:
    """Return what a text file is by its first bytes where that is not what its suffix says."""
    what = looks_like(os.pread(file.fileno(), HEAD_BYTES, 0))
    if suffix == TEXT:
        return what if what == LFS_POINTER else None
    expected = {"gz": "gzip", "zst": "zstd"}.get(suffix.rpartition(".")[2])
    return None if what == expected or (what == "JSON" and not expected) else what or f"no {expected}"


def _lines(text: BinaryIO, is_whole: bool) -> Iterator[bytes | None]:
    """Yield the lines of a file, or all of it as one; None for a text that is too long to be one."""
    while line := text.read(MAX_TEXT_BYTES + 1) if is_whole else text.readline(MAX_TEXT_BYTES + 1):
        is_too_long = len(line) > MAX_TEXT_BYTES
        while is_too_long and line and not (line.endswith(b"\n") and not is_whole):
            line = text.readline(MAX_TEXT_BYTES)
        yield None if is_too_long else line


def _text(data: bytes | None, where: str, is_json: bool) -> str:
    if data is None:
        raise BadRecord("oversized text", where, f"more than {MAX_TEXT_BYTES} bytes")
    try:
        text = json.loads(data)["text"] if is_json else data.decode()
        text.encode()  # JSON can spell half a surrogate pair, which is no text
    except _NO_TEXT as error:
        raise BadRecord("undecodable text", where, str(error)) from None
    if not text.strip():
        raise BadRecord("empty text", where)
    return text


def _is_text(value: str) -> bool:
    return value.isascii() or not re.search("[\ud800-\udfff]", value)  # JSON can spell half a surrogate pair


class _open_text:
    """Open a text file, compressed or not: (the file itself, for its position; its contents, to read)."""

    def __init__(self, file: Path, suffix: str):
        self.raw = file.open("rb")
        self.text: BinaryIO = self.raw
        if suffix.endswith(".gz"):
            self.text = gzip.GzipFile(fileobj=self.raw)
        elif suffix.endswith(".zst"):
            self.text = io.BufferedReader(_Zst(self.raw), 1 << 20)

    def __enter__(self) -> tuple[BinaryIO, BinaryIO]:
        return self.raw, self.text

    def __exit__(self, *_: object) -> None:
        self.raw.close()


class _Zst(io.RawIOBase):
    """Decompress zstd frames; raise EOFError where one is cut, which zstandard's own reader takes for the end."""

    def __init__(self, file: BinaryIO):
        import zstandard

        self._file, self._error = file, zstandard.ZstdError
        self._new = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._frame, self._left = self._new(), memoryview(b"")  # a view: taking a part of it copies nothing
        self._is_open = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._left:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_open = self._new(), bool(data)
            data = data or self._file.read(_ZST_BYTES)
            if not data and self._is_open:
                raise EOFError("a zstd frame is cut")
            if not data:
                return 0
            try:
                self._left = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(f"no zstd: {error}") from None
            self._is_open = not self._frame.eof
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
