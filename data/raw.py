"""Raw data -> RawDocument: texts and still compressed pictures in order, as the encoder takes them.

Four kinds of input file. A .tar holds one document a record (img2dataset's layout): a picture with its caption in
.txt, or with one or a list of several in .json under "caption"; or, interleaved, a .json with "segments": texts and
{"image": MEMBER} in order, where MEMBER is what follows the key in the member's name (`0.jpg` of `000012.0.jpg`), or
{"text": ..., "role": "context"} and the same of an image for what is given. A .jsonl (.gz, .zst) or a .parquet holds a
row a line (data/rows.py): a text, a picture with captions, a conversation or an edit, pictures in files beside it. A
.txt is one text. What cannot be used is counted by reason.
With `caption_keys` a picture's captions are what its .json or row holds under each of these keys, and its .txt under
"txt"; where several keys are named, each is a *kind* of caption, and a picture needs one of any kind.
"""

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from data.documents import MAX_SEGMENTS, ROLES, Role
from data.inputs import expand
from data.lines import lines_of, other_kind
from data.pairs import pair
from data.parquet import PARQUET, read_parquet
from data.picture_files import MAX_PICTURES
from data.raw_document import KeysConfig, RawDocument
from data.remote import shown, without_query
from data.rows import Rows
from data.shards import BadRecord, BadRecords, Record, read_shard
from data.storage import local_copy
from data.words import BOM, decoded, is_text, object_in, texts_of, value_in

TAR, TEXT = ".tar", ".txt"
SUFFIXES = (TAR, ".jsonl", ".jsonl.gz", ".jsonl.zst", PARQUET, TEXT)
PICTURES = ("jpg", "jpeg", "png", "webp")
MAX_TEXT_BYTES = 1 << 26  # of one text, of a line, and of all texts of a row
MAX_MEMBER_BYTES = 1 << 24  # of a record's .txt or .json; as Python objects, lists in JSON take 25 times their bytes
_TXT = "txt"  # the key that names the .txt member


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
        yield from _read_rows(file, source, bad, names)
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
        texts = texts_of(decoded(_member(record, "txt", where), "caption", where), "caption", where, "its .txt")
    elif key != _TXT and "json" in record:
        key = "caption" if key is None else key
        value = value_in(object_in(_member(record, "json", where), "caption", where), key, "caption", where)
        texts = texts_of(value, "caption", where, repr(key))
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
        segments, roles = _segments(info["segments"], record, where)
        return RawDocument(key, where, tuple(segments), info, size, roles=roles)
    picture = picture_of(record, where)
    return pair(key, where, picture, partial(captions_of, record, where), caption_keys, info, size)


def _segments(listed: Any, record: Record, where: str) -> tuple[list[str | bytes], tuple[Role, ...]]:
    """Return the texts and pictures of an interleaved record, and their roles if any is context."""
    if not isinstance(listed, list) or not listed:
        raise BadRecord("undecodable segments", where, "expected a list of texts and images")
    if len(listed) > MAX_SEGMENTS:
        raise BadRecord("too many segments", where, f"{len(listed)}, expected at most {MAX_SEGMENTS}")
    segments: list[str | bytes] = []
    roles: list[Role] = []
    pictures = 0
    for listed_segment in listed:
        segment = listed_segment if isinstance(listed_segment, dict) else {"text": listed_segment}
        member, text, role = segment.get("image"), segment.get("text"), segment.get("role", "target")
        if role not in ROLES or (isinstance(member, str) and text is not None):
            raise BadRecord("undecodable segments", where, repr(segment)[:80])
        if isinstance(member, str):
            pictures += 1
            if pictures > MAX_PICTURES:
                raise BadRecord("too many pictures", where, f"more than {MAX_PICTURES}")
            if member.lower() not in record:
                raise BadRecord("no picture", where, f"no {member!r} among members {sorted(record)}")
            segments.append(record[member.lower()])
            roles.append(role)
        elif isinstance(text, str) and is_text(text):
            if text.strip():
                segments.append(text.lstrip(BOM))
                roles.append(role)
        else:
            raise BadRecord("undecodable segments", where, repr(listed_segment)[:80])
    return segments, tuple(roles) if "context" in roles else ()


def _read_rows(file: Path, source: str, bad: BadRecords, names: KeysConfig) -> Iterator[RawDocument]:
    """Yield what each row of a .jsonl or .parquet holds, or the text that a .txt is."""
    key, suffix, name = input_name(source).replace(".", "_"), suffix_of(source), shown(source)  # a key ends at a dot
    rows, what, is_cut, number = Rows(source, names, bad), other_kind(file, suffix), False, 0
    pieces = pieces_of(file, suffix) if what is None else iter(())
    while not is_cut:
        where, place = f"{name}:{number + 1}", {"source": input_name(source) + suffix, "line": number + 1}
        try:
            piece, size = next(pieces)
        except StopIteration:
            break
        except (OSError, EOFError, zlib.error) as error:  # damaged compression: nothing more can be read
            bad.add(BadRecord("truncated", where, str(error)))
            is_cut = True
        else:
            try:
                yield _of_row(rows, piece, suffix, f"{key}-{number:08d}", where, place, size)
            except BadRecord as error:
                bad.add(error)
        bad.seen, number = bad.seen + 1, number + 1
    if number:
        bad.files.append((file.stat().st_size, float(is_cut)))
    elif suffix == TEXT and what is None:
        bad.seen += 1
        bad.add(BadRecord("empty text", name))
    else:
        bad.failed.append(f"{name}: no text; it is {what or 'without lines'}")


def pieces_of(file: Path, suffix: str) -> Iterator[tuple[Any, int]]:
    """Yield the lines of a text file, as bytes, or the rows of a table, each with its bytes in the file."""
    return read_parquet(file) if suffix == PARQUET else lines_of(file, suffix, MAX_TEXT_BYTES)


def row_of(piece: Any, where: str) -> dict[str, Any]:
    """Return a line, None for one too long, or a row of a table as a row; raise BadRecord for what is none."""
    if piece is None:
        raise BadRecord("oversized text", where, f"more than {MAX_TEXT_BYTES} bytes")
    return piece if isinstance(piece, dict) else object_in(piece, "text", where)


def _of_row(rows: Rows, piece: Any, suffix: str, key: str, where: str, place: dict[str, Any], size: int) -> RawDocument:
    if suffix != TEXT or piece is None:
        document = rows.document(row_of(piece, where), key, where, place, size)
        if (found := sum(len(text.encode()) for text in document.texts)) > MAX_TEXT_BYTES:  # as cells of tables may be
            raise BadRecord("oversized text", where, f"{found} bytes, more than {MAX_TEXT_BYTES}")
        return document
    (text,) = texts_of(decoded(piece, "text", where), "text", where, "the file")
    return RawDocument(key, where, (text,), place, size)
