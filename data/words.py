"""The texts in what people store: JSON under a key, a list, a table's cell; and why there are none."""

import json
import re
import reprlib
from typing import Any

from data.shards import BadRecord

BOM = "\ufeff"  # the byte order mark that some editors put before a text
_NOTHING = ("nan", "none", "null")  # how tables spell a missing caption


def decoded(data: bytes, kind: str, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(f"undecodable {kind}", where, str(error)) from None


def object_in(data: bytes, kind: str, where: str) -> dict[str, Any]:
    """Return the JSON object in `data`; raise BadRecord for anything else."""
    try:
        info = json.loads(data)  # with or without a byte order mark
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"undecodable {kind}", where, f"no JSON: {error}") from None
    if not isinstance(info, dict):
        raise BadRecord(f"no {kind}", where, f"its JSON is {reprlib.repr(info)}, expected an object")
    return info


def value_in(info: dict[str, Any], key: str, kind: str, where: str) -> Any:
    """Return what an object holds under `key`; raise BadRecord if there is no such key."""
    if key not in info:
        option = "caption_keys={KEY: 1}" if kind == "caption" else f"{kind}_key=KEY"
        found = f"{option} chooses one of {sorted(info)[:20]}" if info else "the object is empty"
        otherwise = f"no {key!r} in its JSON, which has {sorted(info)[:20]}"
        raise BadRecord(f"no {kind}", where, f"no {key!r} in its JSON: {found}", otherwise)
    return info[key]


def texts_of(value: Any, kind: str, where: str, what: str) -> list[str]:
    """Return the texts in a value, one or more; raise BadRecord for none. `what` names the value's origin.

    A list gives its texts. Numbers, null and the words that tables use for null are no text.
    """
    texts = [text.lstrip(BOM) for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    if texts and not any(map(str.strip, texts)):
        raise BadRecord(f"empty {kind}", where)
    texts = [text for text in texts if text.strip() and text.strip().lower() not in _NOTHING]
    if not texts:
        raise BadRecord(f"no {kind}", where, f"{what} holds {reprlib.repr(value)}, expected words")
    if not all(map(is_text, texts)):
        raise BadRecord(f"undecodable {kind}", where, f"{what} holds half a surrogate pair")
    return texts


def is_text(value: str) -> bool:
    return value.isascii() or not re.search("[\ud800-\udfff]", value)  # JSON can encode half a surrogate pair
