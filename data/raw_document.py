"""A raw document: texts and still compressed pictures in order, what each is for, and the keys by which it was read."""

from dataclasses import dataclass, field
from typing import Any

from data.captions import check_weights
from data.chat import Message
from data.documents import Role


@dataclass(frozen=True, kw_only=True)
class KeysConfig:
    # Keys of a picture's captions in its .json or row, `txt` for its .txt, each with the weight with which training
    # draws that kind of caption, 0 or more, such as {caption: 1, long_caption: 2}. {}: the .txt or, without one,
    # "caption" in the .json; "caption" or "captions" in a row. All captions are stored; other weights rewrite only the
    # manifest.
    caption_keys: dict[str, float] = field(default_factory=dict)
    text_key: str = "text"  # key of the text in a row of .jsonl or .parquet

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
    roles: tuple[Role, ...] = ()  # of each of `segments`; without them all are targets
    messages: tuple[Message[bytes], ...] = ()  # a conversation; `segments` holds their parts in order

    @property
    def texts(self) -> tuple[str, ...]:
        return self.captions or tuple(segment for segment in self.segments if isinstance(segment, str))

    @property
    def pictures(self) -> tuple[bytes, ...]:
        return tuple(segment for segment in self.segments if isinstance(segment, bytes))
