"""One record -> a Document: ordered text and image segments; and the encoded record's layout, both ways.

An encoded record holds `tokens.npy` (int32 [len], the caption or the text) and, if it has an image, `moments.npy`
(f16 [2C, h, w], the VAE posterior's mean and log variance), plus `json` for people. Which of caption and image comes
first, and whether the caption is dropped, is drawn here from (seed, epoch, source, shard, record), so it belongs to
the document and not to whoever reads it.
"""

import hashlib
import io
import re
import struct
from dataclasses import dataclass

import numpy as np

from data.shards import BadRecord, Record

_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>=|]\w+)', 'fortran_order': False, 'shape': \(([\d, ]{,40})\), \} *\n",
    re.DOTALL,
)

LOGVAR_RANGE = (-30.0, 20.0)  # to which AutoencoderKL clamps its log variance; exp of more overflows training


@dataclass(frozen=True)
class TextSegment:
    token_ids: np.ndarray  # int64 [len]


@dataclass(frozen=True)
class ImageSegment:
    moments: np.ndarray  # f16 [2C, h, w]
    before_caption: bool = False  # the image precedes the text that describes it


@dataclass(frozen=True)
class Document:
    segments: tuple[TextSegment | ImageSegment, ...]

    @property
    def has_image(self) -> bool:
        return any(isinstance(segment, ImageSegment) for segment in self.segments)


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    # Share of image-caption documents that put the caption first, in [0, 1] (the paper's: 0.8).
    caption_first: float = 0.8
    # Share of image-caption documents whose caption is dropped, in [0, 1] (ours: guidance needs it).
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("caption_first", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share in [0, 1]")


def seed_from(*parts: int | str) -> int:
    """Hash a tuple of ints and names to a 63-bit seed: the one source of every draw that must not depend on ranks."""
    return int.from_bytes(_digest(parts, 8), "little") >> 1


def uniforms(*parts: int | str, count: int) -> list[float]:
    """Return `count` floats in [0, 1) that depend on `parts` alone."""
    values = struct.unpack(f"<{count}Q", _digest(parts, 8 * count))
    return [(value >> 11) / 2**53 for value in values]


def decode_document(record: Record, where: str) -> Document:
    """Return the record's document, caption before image; raise BadRecord for contents that cannot be trained on."""
    if "tokens.npy" not in record and "moments.npy" not in record:
        raise BadRecord("no tokens and no moments", where, f"members {sorted(record)}")
    segments: list[TextSegment | ImageSegment] = []
    if "tokens.npy" in record:
        token_ids = _load_array(record["tokens.npy"], where, "<i4", 1)
        if len(token_ids):
            segments.append(TextSegment(token_ids.astype(np.int64)))
    if "moments.npy" in record:
        moments = _load_array(record["moments.npy"], where, "<f2", 3)
        if 0 in moments.shape or moments.shape[0] % 2:
            raise BadRecord("wrong array", where, f"moments {moments.shape}, expected [2C, h, w]")
        if not np.isfinite(moments).all():
            raise BadRecord("non-finite latents", where)
        logvar = moments[len(moments) // 2 :]
        if logvar.min() < LOGVAR_RANGE[0] or logvar.max() > LOGVAR_RANGE[1]:
            raise BadRecord("latent variance out of range", where, f"log variance {logvar.min()}...{logvar.max()}")
        segments.append(ImageSegment(moments))
    if not segments:
        raise BadRecord("empty document", where)
    return Document(tuple(segments))


def check_document(document: Document, vocab_size: int, channels: int, where: str) -> None:
    """Raise BadRecord for token ids or latents that are none of the tokenizer's and VAE's of the manifest."""
    for segment in document.segments:
        if isinstance(segment, TextSegment):
            if segment.token_ids.view(np.uint64).max() >= vocab_size:  # a negative id is a large one here
                raise BadRecord("token id out of range", where, f"expected 0...{vocab_size - 1}")
        elif len(segment.moments) != 2 * channels:
            raise BadRecord("wrong array", where, f"moments {segment.moments.shape}, expected {2 * channels} channels")


def encode_record(key: str, token_ids: np.ndarray, moments: np.ndarray | None, info: bytes) -> Record:
    """Return the encoded record of a text (`moments` None) or of an image and its caption (maybe of no tokens)."""
    record: Record = {"__key__": key.encode(), "json": info, "tokens.npy": _save_array(token_ids.astype(np.int32))}
    if moments is not None:
        record["moments.npy"] = _save_array(moments.astype(np.float16))
    return record


def document_sizes(record: Record) -> tuple[int, list[tuple[int, int]]]:
    """Return (text tokens, latent grid of each image) of an encoded record, as its shard's index keeps them."""
    document = decode_document(record, record["__key__"].decode())
    tokens = sum(len(s.token_ids) for s in document.segments if isinstance(s, TextSegment))
    return tokens, [s.moments.shape[1:] for s in document.segments if isinstance(s, ImageSegment)]


def arrange(document: Document, config: OrderConfig, *origin: int) -> Document:
    """Draw caption order and caption dropout of an image-caption document from `origin`; leave others as they are.

    `origin` is (seed, epoch, source, shard, record). An image that comes before its caption is marked: its noise is
    capped (the paper, section 4.1: t <= 500 there, so that captions are learnt from pictures one can see).
    """
    kinds = [type(segment) for segment in document.segments]
    if kinds != [TextSegment, ImageSegment]:
        return document
    order_draw, dropout_draw = uniforms("caption", *origin, count=2)
    caption, image = document.segments
    if dropout_draw < config.caption_dropout:
        return Document((image,))
    if order_draw < config.caption_first:
        return document
    return Document((ImageSegment(image.moments, before_caption=True), caption))


def _digest(parts: tuple[int | str, ...], size: int) -> bytes:
    packed = b"".join(p.encode() + b"\0" if isinstance(p, str) else struct.pack("<q", p) for p in parts)
    return hashlib.shake_128(packed).digest(size)


def _load_array(data: bytes, where: str, dtype: str, ndim: int) -> np.ndarray:
    """Return the .npy array in `data`, read-only.

    Takes only what np.save writes for our arrays and never asks numpy to parse: its parser evaluates Python literals
    (a hostile header exhausts it), unpickles if told to, and takes longer than all the rest of a read.
    """
    match = _NPY_HEADER.match(data)
    if match is None:
        raise BadRecord("undecodable array", where, f"not a plain .npy file: {data[:64]!r}")
    found, sizes = match[1].decode(), match[2].decode()
    if found != dtype or len(shape := [size for size in sizes.split(",") if size.strip()]) != ndim:
        raise BadRecord("wrong array", where, f"{found} ({sizes}), expected {dtype} of {ndim} dimensions")
    try:
        return np.frombuffer(data, dtype, offset=match.end()).reshape([int(size) for size in shape])
    except (ValueError, OverflowError) as error:
        raise BadRecord("undecodable array", where, str(error)) from None


def _save_array(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
