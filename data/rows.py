"""A row of a .jsonl or .parquet -> RawDocument. Its keys say what it is, row by row.

| keys | document |
|---|---|
| `conversations` or `messages`, with or without `image` or `images` | a conversation (data/conversations.py) |
| `output_image`, `instruction`, `input_image` or `input_images` | pictures and an instruction as context, a picture |
| `output_image`, `instruction` | a picture with a caption |
| `image` or `images` of one, `caption` or `captions`, or the `caption_keys` | a picture with captions |
| `text`, or the `text_key` | a text |
"""

from functools import partial
from typing import Any, Literal

from data.conversations import read_conversation
from data.documents import Role
from data.pairs import pair
from data.picture_files import PictureFiles
from data.raw_document import KeysConfig, RawDocument
from data.shards import BadRecord, BadRecords
from data.words import texts_of, value_in

_CAPTIONS = ("caption", "captions")
_KEPT_DEPTH = 8  # of a row's JSON that is kept for people
RowKind = Literal["conversation", "edit", "picture", "text"]


def kind_of(row: dict[str, Any], names: KeysConfig) -> RowKind:
    """Return what a row is by its keys; one with a text is a text, unless it is a picture with captions."""
    has_text = row.get(names.text_key) is not None
    has_caption = any(row.get(key) is not None for key in names.caption_keys or _CAPTIONS)
    if not _is_absent(_named(row, "image")) and has_caption and _turns(row) is None:
        return "picture"
    if has_text:
        return "text"
    if _turns(row) is not None:
        return "conversation"
    if row.get("output_image") is not None:
        return "edit"
    return "text" if _is_absent(_named(row, "image")) else "picture"


def names_pictures(row: dict[str, Any], names: KeysConfig) -> bool:
    """Return whether a row, by its keys, has pictures."""
    kind = kind_of(row, names)
    return kind in ("edit", "picture") or (kind == "conversation" and not _is_absent(_named(row, "image")))


class Rows:
    """The rows of one file, `source`; what costs no row is noted in `bad`."""

    def __init__(self, source: str, names: KeysConfig, bad: BadRecords):
        self._names, self._bad, self._files = names, bad, PictureFiles(source)

    def document(self, row: dict[str, Any], key: str, where: str, place: dict[str, Any], size: int) -> RawDocument:
        """Return the document of a row of `size` bytes; raise BadRecord for what cannot be used.

        `place` says where the row is, for people.
        """
        kind = kind_of(row, self._names)
        if kind == "text":
            if not _is_absent(_named(row, "image")):
                key_of_text = self._names.text_key
                self._bad.note(
                    f"images left out of texts, which caption_keys={{{key_of_text}: 1}} would caption", where
                )
            return RawDocument(key, where, (self._text(row, where),), place, size)
        info = {**_for_people(row), **place}
        if kind == "conversation":
            pictures = self._files.read(_named(row, "image"), where)
            messages, were_put_first = read_conversation(_turns(row), pictures, where)
            if were_put_first:
                self._bad.note("pictures without <image>, put before the first question", where)
            parts = tuple(part for message in messages for part in message.parts)
            return RawDocument(key, where, parts, info, size, messages=messages)
        if kind == "edit":
            return self._edit(row, key, where, info, size)
        picture = self._picture(_named(row, "image"), "image", where)
        return pair(key, where, picture, partial(_captions, row, where), list(self._names.caption_keys), info, size)

    def _edit(self, row: dict[str, Any], key: str, where: str, info: dict[str, Any], size: int) -> RawDocument:
        (instruction,) = texts_of(_single(row.get("instruction")), "instruction", where, "'instruction'")
        given = self._files.read(_named(row, "input_image"), where)
        drawn = self._picture(row["output_image"], "output_image", where)
        if not given:  # OmniGen2's rows for text to image
            return RawDocument(key, where, (instruction, drawn), info, size)
        context: Role = "context"
        roles: tuple[Role, ...] = (*[context for _ in given], context, "target")
        return RawDocument(key, where, (*given, instruction, drawn), info, size, roles=roles)

    def _picture(self, named: Any, key: str, where: str) -> bytes:
        pictures = self._files.read(named, where)
        if len(pictures) != 1:
            raise BadRecord(
                "too many pictures" if pictures else "no picture", where, f"{key!r} names {len(pictures)}, expected one"
            )
        return pictures[0]

    def _text(self, row: dict[str, Any], where: str) -> str:
        key = self._names.text_key
        (text,) = texts_of(_single(value_in(row, key, "text", where)), "text", where, repr(key))
        return text


def _named(row: dict[str, Any], key: str) -> Any:
    """Return what a row holds under `key` or its plural."""
    return row[key] if row.get(key) is not None else row.get(f"{key}s")


def _turns(row: dict[str, Any]) -> Any:
    return row["conversations"] if row.get("conversations") is not None else row.get("messages")


def _is_absent(value: Any) -> bool:
    return value is None or value in ("", [])


def _single(value: Any) -> Any:
    return None if isinstance(value, list) else value


def _captions(row: dict[str, Any], where: str, key: str = "") -> list[str]:
    key = key or ("captions" if row.get("caption") is None and "captions" in row else "caption")
    return [text.strip() for text in texts_of(value_in(row, key, "caption", where), "caption", where, repr(key))]


def _for_people(value: Any, depth: int = 0) -> Any:
    """Return a row, or a value of one, as JSON can hold it: without the bytes of pictures, and of a limited depth."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth == _KEPT_DEPTH or not isinstance(value, (dict, list)):
        return f"<{type(value).__name__}>" if isinstance(value, (bytes, dict, list)) else str(value)
    if isinstance(value, dict):
        return {str(key): _for_people(one, depth + 1) for key, one in value.items()}
    return [_for_people(one, depth + 1) for one in value]
