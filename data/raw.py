"""Raw data -> RawDocument: texts and still compressed pictures in order, as the encoder takes them.

Three kinds of input file. A .tar holds one document a record (img2dataset's layout): a picture with its caption in
.txt, or with one or a list of several in .json under "caption"; or, interleaved, a .json with "segments": texts and
{"image": MEMBER} in order, where MEMBER is what follows the key in the member's name (`0.jpg` of `000012.0.jpg`). A
.jsonl (.gz, .zst) holds a text a line under "text". A .txt is one text. What cannot be used is counted by reason.
With `caption_keys` a picture's captions are what its .json holds under each of these keys, and its .txt under "txt";
where several keys are named, each is a *kind* of caption, and a picture needs one of any kind.
"""

import gzip
import io
import json
import os
import re
import reprlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from data.captions import check_weights
from data.documents import MAX_SEGMENTS
from data.inputs import expand
from data.remote import shown, without_query
from data.shards import BadRecord, BadRecords, Record, read_shard
from data.signatures import HEAD_BYTES, LFS_POINTER, looks_like
from data.storage import local_copy

TAR, TEXT = ".tar", ".txt"
SUFFIXES = (TAR, ".jsonl", ".jsonl.gz", ".jsonl.zst", TEXT)
PICTURES = ("jpg", "jpeg", "png", "webp")
MAX_TEXT_BYTES = 1 << 26  # of one text
MAX_PICTURES = 1000  # of a document
MAX_MEMBER_BYTES = 1 << 24  # of a record's .txt or .json; as Python objects, lists in JSON take 25 times their bytes
_ZST_BYTES = 1024  # decompressed at once: they may expand 30,000-fold
_BOM = "\ufeff"  # the byte order mark that some editors put before a text
_TXT = "txt"  # the key that names the .txt member
_NOTHING = ("nan", "none", "null")  # how tables spell a missing caption


@dataclass(frozen=True, kw_only=True)
class KeysConfig:
    # Keys of a picture's captions in its .json, `txt` for its .txt, each with the weight with which training draws that
    # kind of caption, 0 or more, such as {caption: 1, long_caption: 2}. {}: the .txt or, without one, "caption" in the
    # .json. All captions are stored; other weights rewrite only the manifest.
    caption_keys: dict[str, float] = field(default_factory=dict)
    text_key: str = "text"  # key of the text in a line of .jsonl

    def __post_init__(self) -> None:
        check_weights("caption_keys", self.caption_keys)

    @property
    def caption_kinds(self) -> dict[str, float]:
        """Return the weights of the kinds of captions; one key makes no kinds."""
        return {name: float(w) for name, w in self.caption_keys.items()} if len(self.caption_keys) > 1 else {}


@dataclass(frozen=True)
class RawDocument:
    key: str
    where: str
    segments: tuple[str | bytes, ...]  # text, or the bytes of a picture's file
    info: dict[str, Any]  # kept for people
    input_bytes: int  # of its input file, roughly
    captions: tuple[str, ...] = ()  # all captions of a picture that has several; `segments` holds the first
    caption_kinds: tuple[int, ...] = ()  # with several `caption_keys`: which of them gave each of `captions`
    no_captions: dict[str, str] = field(default_factory=dict)  # with several: why a key gave none, such as "no caption"

    @property
    def texts(self) -> tuple[str, ...]:
        return self.captions or tuple(segment for segment in self.segments if isinstance(segment, str))


def suffix_of(path: str) -> str:
    """Return which of SUFFIXES a path or URL ends in, ignoring case; "" for none."""
    name = without_query(path).lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def input_name(path: str) -> str:
    """Return the file name of a path or URL without its suffix: the name of the shard made of it."""
    name = without_query(path).rsplit("/", 1)[-1]
    return name[: len(name) - len(suffix_of(path))]


def read_raw(file: Path, source: str, bad: BadRecords, names: KeysConfig | None = None) -> Iterator[RawDocument]:
    """Yield the good documents of an input file in order; `file` is `source` itself or a local copy of it."""
    names = names or KeysConfig()
    if suffix_of(source) != TAR:
        yield from _read_texts(file, source, bad, names.text_key)
        return
    keys: set[str] = set()
    for record in read_shard(file, bad, shown(source)):
        key = record["__key__"].decode()
        where = f"{shown(source)}/{key}"
        try:
            if key in keys:
                raise BadRecord("duplicate key", where, "or its members are not consecutive")
            keys.add(key)
            yield _document(record, key, where, list(names.caption_keys))
        except BadRecord as error:
            bad.add(error)


def read_texts(inputs: Sequence[str], bad: BadRecords, names: KeysConfig) -> Iterator[str]:
    """Yield every caption and text in `inputs`; what cannot be read is counted in `bad`."""
    for source in expand(inputs, SUFFIXES):
        with local_copy(source) as file:
            for document in read_raw(file, source, bad, names):
                yield from document.texts


def captions_of(record: Record, where: str, key: str | None = None) -> list[str]:
    """Return a record's captions: its .txt, or what its .json holds under `key`; without a key, the former or else the
    latter under "caption". Raise BadRecord for none.
    """
    if key in (None, _TXT) and "txt" in record:
        texts = _texts_of(_decoded(_member(record, "txt", where), "caption", where), "caption", where, "its .txt")
    elif key != _TXT and "json" in record:
        key = "caption" if key is None else key
        value = _value(_member(record, "json", where), key, "caption", where)
        texts = _texts_of(value, "caption", where, repr(key))
    else:
        wanted = {None: "txt and no .json", _TXT: "txt"}.get(key, "json")
        raise BadRecord("no caption", where, f"no .{wanted} among {sorted(record)}")
    return [text.strip() for text in texts]


def picture_of(record: Record, where: str) -> bytes:
    """Return the bytes of a record's picture file; raise BadRecord for none."""
    extension = next((name for name in PICTURES if name in record), None)
    if extension is None:
        raise BadRecord("no picture", where, f"members {sorted(record)}")
    return record[extension]


def _member(record: Record, name: str, where: str) -> bytes:
    """Return a record's .txt or .json, an empty object if there is none; raise BadRecord for one too long."""
    data = record.get(name, b"{}")
    if len(data) > MAX_MEMBER_BYTES:
        raise BadRecord("oversized text", where, f"{len(data)} bytes in .{name}, more than {MAX_MEMBER_BYTES}")
    return data


def _document(record: Record, key: str, where: str, caption_keys: list[str]) -> RawDocument:
    info, data = {}, _member(record, "json", where)
    with suppress(ValueError, RecursionError):
        info = json.loads(data)
    info = info if isinstance(info, dict) else {}
    size = sum(map(len, record.values()))
    if "segments" in info:
        return RawDocument(key, where, tuple(_segments(info["segments"], record, where)), info, size)
    picture = picture_of(record, where)
    if len(caption_keys) > 1:
        found, missing = _captions_by_key(record, where, caption_keys)
        kinds = tuple(caption_keys.index(name) for name, several in found.items() for _ in several)
        captions = tuple(caption for several in found.values() for caption in several)
        info |= {name: several if len(several) > 1 else several[0] for name, several in found.items()}
        return RawDocument(key, where, (captions[0], picture), info, size, captions, kinds, missing)
    texts = captions_of(record, where, *caption_keys)
    if len(texts) == 1:
        return RawDocument(key, where, (texts[0], picture), {**info, "caption": texts[0]}, size)
    return RawDocument(key, where, (texts[0], picture), {**info, "caption": texts}, size, tuple(texts))


def _captions_by_key(record: Record, where: str, keys: list[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the captions of each key that gives some, and why each of the others gives none.

    Raises BadRecord if none does: with their common reason, or as a record without a caption.
    """
    found: dict[str, list[str]] = {}
    errors: dict[str, BadRecord] = {}
    for key in keys:
        try:
            found[key] = captions_of(record, where, key)
        except BadRecord as error:
            errors[key] = error
    reasons = {key: error.reason for key, error in errors.items()}
    if not found:
        if len(set(reasons.values())) == 1:
            raise errors[keys[0]]
        raise BadRecord("no caption", where, ", ".join(f"{key}: {reason}" for key, reason in reasons.items()))
    return found, reasons


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
                yield segment.lstrip(_BOM)
        else:
            raise BadRecord("undecodable segments", where, repr(segment)[:80])


def _read_texts(file: Path, source: str, bad: BadRecords, text_key: str) -> Iterator[RawDocument]:
    key, suffix, name = input_name(source).replace(".", "_"), suffix_of(source), shown(source)  # a key ends at a dot
    is_whole, is_cut, number, read = suffix == TEXT, False, 0, 0
    with file.open("rb") as raw:
        size, what = file.stat().st_size, _other_kind(raw, suffix)
        lines = _lines(_decompressed(raw, suffix), is_whole) if what is None else iter(())
        while not is_cut:
            where = f"{name}:{number + 1}"
            try:
                line = next(lines)
                content = _text(line, where, None if is_whole else text_key)
                info = {"source": input_name(source) + suffix, "line": number + 1}
                yield RawDocument(f"{key}-{number:08d}", where, (content,), info, raw.tell() - read)
            except StopIteration:
                break
            except BadRecord as error:
                bad.add(error)
            except (OSError, EOFError, zlib.error) as error:  # damaged compression: nothing more can be read
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
        bad.failed.append(f"{name}: no text; it is {what or 'without lines'}")


def _other_kind(file: BinaryIO, suffix: str) -> str | None:
    """Return what a text file is by its first bytes if that contradicts its suffix, else None."""
    what = looks_like(os.pread(file.fileno(), HEAD_BYTES, 0))
    if suffix == TEXT:
        return what if what == LFS_POINTER else None
    expected = {"gz": "gzip", "zst": "zstd"}.get(suffix.rpartition(".")[2])
    return None if what == expected or (what == "JSON" and not expected) else what or f"no {expected}"


def _lines(text: BinaryIO, is_whole: bool) -> Iterator[bytes | None]:
    """Yield the lines of a file, or all of it as one; None for each that is too long."""
    while line := text.read(MAX_TEXT_BYTES + 1) if is_whole else text.readline(MAX_TEXT_BYTES + 1):
        is_too_long = len(line) > MAX_TEXT_BYTES
        while is_too_long and line and not (line.endswith(b"\n") and not is_whole):
            line = text.readline(MAX_TEXT_BYTES)
        yield None if is_too_long else line


def _text(data: bytes | None, where: str, key: str | None) -> str:
    """Return the text in a line of JSON under `key`; without a key, `data` itself."""
    if data is None:
        raise BadRecord("oversized text", where, f"more than {MAX_TEXT_BYTES} bytes")
    value = _decoded(data, "text", where) if key is None else _value(data, key, "text", where)
    what = "the file" if key is None else repr(key)
    (text,) = _texts_of(None if isinstance(value, list) else value, "text", where, what)
    return text


def _decoded(data: bytes, kind: str, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"undecodable {kind}", where, str(error)) from None


def _value(data: bytes, key: str, kind: str, where: str) -> Any:
    """Return what a JSON object holds under `key`; raise BadRecord if there is no object or no such key."""
    try:
        info = json.loads(data)  # with or without a byte order mark
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"undecodable {kind}", where, f"no JSON: {error}") from None
    if not isinstance(info, dict):
        raise BadRecord(f"no {kind}", where, f"its JSON is {reprlib.repr(info)}, expected an object")
    if key not in info:
        option = "caption_keys={KEY: 1}" if kind == "caption" else f"{kind}_key=KEY"
        found = f"{option} chooses one of {sorted(info)[:20]}" if info else "the object is empty"
        raise BadRecord(f"no {kind}", where, f"no {key!r} in its JSON: {found}")
    return info[key]


def _texts_of(value: Any, kind: str, where: str, what: str) -> list[str]:
    """Return the texts in a value, one or more; raise BadRecord for none. `what` names the value's origin.

    A list gives its texts. Numbers, null and the words that tables use for null are no text.
    """
    texts = [text.lstrip(_BOM) for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    if texts and not any(map(str.strip, texts)):
        raise BadRecord(f"empty {kind}", where)
    texts = [text for text in texts if text.strip() and text.strip().lower() not in _NOTHING]
    if not texts:
        raise BadRecord(f"no {kind}", where, f"{what} holds {reprlib.repr(value)}, expected words")
    if not all(map(_is_text, texts)):
        raise BadRecord(f"undecodable {kind}", where, f"{what} holds half a surrogate pair")
    return texts


def _is_text(value: str) -> bool:
    return value.isascii() or not re.search("[\ud800-\udfff]", value)  # JSON can encode half a surrogate pair


def _decompressed(file: BinaryIO, suffix: str) -> BinaryIO:
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
