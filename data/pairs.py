"""A picture and its captions: one, several, or several of each of several kinds."""

from collections.abc import Callable, Sequence
from typing import Any

from data.raw_document import RawDocument
from data.shards import BadRecord


def pair(
    key: str,
    where: str,
    picture: bytes,
    captions_under: Callable[..., list[str]],
    caption_keys: Sequence[str],
    info: dict[str, Any],
    input_bytes: int,
) -> RawDocument:
    """Return the document of a picture with what `captions_under` returns for each of `caption_keys`, of a single one
    or of none; it raises BadRecord for no caption, as this does if no key gives one.
    """
    if len(caption_keys) > 1:
        found, missing = _captions_by_key(captions_under, where, caption_keys)
        kinds = tuple(caption_keys.index(name) for name, several in found.items() for _ in several)
        captions = tuple(caption for several in found.values() for caption in several)
        info |= {name: several if len(several) > 1 else several[0] for name, several in found.items()}
        return RawDocument(key, where, (captions[0], picture), info, input_bytes, captions, kinds, missing)
    texts = captions_under(*caption_keys)
    if len(texts) == 1:
        return RawDocument(key, where, (texts[0], picture), {**info, "caption": texts[0]}, input_bytes)
    return RawDocument(key, where, (texts[0], picture), {**info, "caption": texts}, input_bytes, tuple(texts))


def _captions_by_key(
    captions_under: Callable[..., list[str]], where: str, keys: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the captions of each key that gives some, and why each of the others gives none.

    Raises BadRecord if none does: with their common reason, or as a record without a caption.
    """
    found: dict[str, list[str]] = {}
    errors: dict[str, BadRecord] = {}
    for key in keys:
        try:
            found[key] = captions_under(key)
        except BadRecord as error:
            errors[key] = error
    reasons = {key: error.reason for key, error in errors.items()}
    if not found:
        if len(set(reasons.values())) == 1:
            raise errors[keys[0]]
        raise BadRecord("no caption", where, ", ".join(f"{key}: {reason}" for key, reason in reasons.items()))
    return found, reasons
