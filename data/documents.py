"""One record -> a Document: ordered text and image segments; and the encoded record's layout, both ways.

An encoded record holds `tokens.npy` (int32 [len], the caption or all its texts end to end), its image if it has one,
and `json` for people. The image's kind names its member: `moments.npy` (f16 [2C, h, w], a VAE posterior's mean and log
variance), `latents.npy` (f16 [C, h, w], of a deterministic space) or `pixels.npy` (uint8 [3, H, W], the picture). An
image with several captions has them end to end in `tokens.npy`, and `captions.npy` (int32 [n]) with the length of each;
where they are of several kinds, `caption_kinds.npy` (int32 [n]) has each one's number in the manifest's `captions`. Any
other document (interleaved) holds its images as `0.moments.npy`, `1.moments.npy` ... and `segments.npy` (int32 [n]):
the length of each text, IMAGE for the next image; where some are context, `roles.npy` (uint8 [n]) has the place of each
one's role in ROLES.
"""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from data.arrays import load_array, save_array
from data.captions import CaptionTokens
from data.shards import BadRecord, Record

IMAGE = -1  # in segments.npy
ImageKind = Literal["moments", "latents", "pixels"]  # what a record keeps of an image
KINDS: tuple[ImageKind, ...] = get_args(ImageKind)
# What a segment is for. target: it bears loss, an image is noised. context: it is given, an image clean.
Role = Literal["target", "context"]
ROLES: tuple[Role, ...] = get_args(Role)
CELL_BYTES: dict[ImageKind, int] = {"moments": 4, "latents": 2, "pixels": 1}  # of a channel of a cell, in a record
PIXEL_CHANNELS = 3
MAX_SEGMENTS = 1 << 16  # of a document: as Python objects they take a hundred times their bytes
LOGVAR_RANGE = (-30.0, 20.0)  # AutoencoderKL clamps log variances to it; exp of more would overflow in training
# The bits of the largest and the smallest allowed mean and log variance.
_MOST = np.array([np.finfo(np.float16).max, LOGVAR_RANGE[1]], "<f2").view(np.int16)
_LEAST = np.array([np.finfo(np.float16).min, LOGVAR_RANGE[0]], "<f2").view(np.uint16)


@dataclass(frozen=True)
class TextSegment:
    token_ids: np.ndarray  # int64 [len]
    role: Role = "target"


@dataclass(frozen=True)
class ImageSegment:
    array: np.ndarray  # moments f16 [2C, h, w], latents f16 [C, h, w] or pixels uint8 [3, h, w]
    kind: ImageKind = "moments"
    before_caption: bool = False  # the image precedes the text that describes it
    role: Role | Literal["copy"] = "target"  # copy: the clean one of the image before it, in what packing lays out

    @property
    def channels(self) -> int:
        """Return C, the channels that the model sees."""
        return len(self.array) // 2 if self.kind == "moments" else len(self.array)

    @property
    def grid(self) -> tuple[int, int]:
        """Return (h, w); of pixels, (H, W)."""
        return self.array.shape[1], self.array.shape[2]


@dataclass(frozen=True)
class Document:
    segments: tuple[TextSegment | ImageSegment, ...]
    captions: tuple[TextSegment, ...] = ()  # all captions of an image that has several; `segments` holds the first
    caption_kinds: tuple[int, ...] = ()  # of each of `captions`, where the data has several kinds

    @property
    def has_image(self) -> bool:
        return any(isinstance(segment, ImageSegment) for segment in self.segments)

    @property
    def has_context(self) -> bool:
        return any(segment.role == "context" for segment in self.segments)

    @property
    def draws_image(self) -> bool:
        """Return whether an image is a target."""
        return any(isinstance(segment, ImageSegment) and segment.role == "target" for segment in self.segments)


def seed_from(*parts: int | str) -> int:
    """Hash ints and names to a 63-bit seed: the source of every draw that must not depend on ranks."""
    return int.from_bytes(_digest(parts, 8), "little") >> 1


def uniforms(*parts: int | str, count: int) -> list[float]:
    """Return `count` floats in [0, 1) that depend on `parts` alone."""
    values = struct.unpack(f"<{count}Q", _digest(parts, 8 * count))
    return [(value >> 11) / 2**53 for value in values]


def decode_document(record: Record, where: str) -> Document:
    """Return the record's document, caption before image; raise BadRecord for unusable contents."""
    if "segments.npy" in record:
        return _with_roles(list(_interleaved(record, where)), record, where)
    if "roles.npy" in record:
        raise BadRecord("wrong roles", where, "without segments.npy")
    image = _image(record, "", where)
    if "tokens.npy" not in record and image is None:
        raise BadRecord("no tokens and no image", where, f"members {sorted(record)}")
    segments: list[TextSegment | ImageSegment] = []
    captions: tuple[TextSegment, ...] = ()
    kinds: tuple[int, ...] = ()
    if "tokens.npy" in record:
        token_ids = load_array(record["tokens.npy"], where, "<i4", 1).astype(np.int64)
        if "captions.npy" in record:
            captions, kinds = _captions(record, token_ids, image, where)
            segments.append(captions[0])
        elif len(token_ids):
            segments.append(TextSegment(token_ids))
    if image is not None:
        segments.append(image)
    if not segments:
        raise BadRecord("empty document", where)
    return Document(tuple(segments), captions, kinds)


def _captions(
    record: Record, token_ids: np.ndarray, image: ImageSegment | None, where: str
) -> tuple[tuple[TextSegment, ...], tuple[int, ...]]:
    lengths = load_array(record["captions.npy"], where, "<i4", 1).tolist()
    if not lengths or min(lengths) < 1 or sum(lengths) != len(token_ids) or image is None:
        raise BadRecord("wrong captions", where, f"{lengths[:20]} of {len(token_ids)} tokens")
    kinds: list[int] = []
    if "caption_kinds.npy" in record:
        kinds = load_array(record["caption_kinds.npy"], where, "<i4", 1).tolist()
        if len(kinds) != len(lengths) or min(kinds) < 0:
            raise BadRecord("wrong captions", where, f"kinds {kinds[:20]} of {len(lengths)} captions")
    return tuple(map(TextSegment, np.split(token_ids, np.cumsum(lengths[:-1])))), tuple(kinds)


def _interleaved(record: Record, where: str) -> Iterator[TextSegment | ImageSegment]:
    lengths = load_array(record["segments.npy"], where, "<i4", 1)
    token_ids = load_array(record.get("tokens.npy", b""), where, "<i4", 1).astype(np.int64)
    if not len(lengths):
        raise BadRecord("empty document", where)
    if len(lengths) > MAX_SEGMENTS:
        raise BadRecord("too many segments", where, f"{len(lengths)}, expected at most {MAX_SEGMENTS}")
    lengths = lengths.tolist()
    if any(length < 1 and length != IMAGE for length in lengths) or sum(max(n, 0) for n in lengths) != len(token_ids):
        raise BadRecord("wrong segments", where, f"{lengths[:20]} of {len(token_ids)} tokens")
    start = images = 0
    for length in lengths:
        if length == IMAGE:
            image = _image(record, f"{images}.", where)
            if image is None:
                raise BadRecord("missing image", where, f"no image {images} among {sorted(record)}")
            yield image
            images += 1
        else:
            yield TextSegment(token_ids[start : start + length])
            start += length


def _with_roles(segments: list[TextSegment | ImageSegment], record: Record, where: str) -> Document:
    """Return the document of these segments in their roles, all targets without `roles.npy`."""
    if "roles.npy" in record:
        numbers = load_array(record["roles.npy"], where, "|u1", 1).tolist()
        if len(numbers) != len(segments) or max(numbers) >= len(ROLES):
            raise BadRecord("wrong roles", where, f"{numbers[:20]} of {len(segments)} segments")
        segments = [replace(segment, role=ROLES[n]) for segment, n in zip(segments, numbers, strict=True)]
        if all(segment.role == "context" for segment in segments):
            raise BadRecord("no target", where, f"all {len(segments)} segments are context")
    return Document(tuple(segments))


def _image(record: Record, prefix: str, where: str) -> ImageSegment | None:
    """Return the image whose member's name begins with `prefix`, None if there is none."""
    kinds = [kind for kind in KINDS if f"{prefix}{kind}.npy" in record]
    if not kinds:
        return None
    if len(kinds) > 1:
        raise BadRecord("several kinds of one image", where, " and ".join(kinds))
    kind = kinds[0]
    array = load_array(record[f"{prefix}{kind}.npy"], where, "|u1" if kind == "pixels" else "<f2", 3)
    if kind == "pixels":
        expected, is_right = f"[{PIXEL_CHANNELS}, H, W]", len(array) == PIXEL_CHANNELS
    elif kind == "latents":
        expected, is_right = "[C, h, w]", True
    else:
        expected, is_right = "[2C, h, w]", len(array) % 2 == 0
    if 0 in array.shape or not is_right:
        raise BadRecord("wrong array", where, f"{kind} {array.shape}, expected {expected}")
    if kind == "moments":
        _check_moments(array, where)
    elif kind == "latents":
        _check_latents(array, where)
    return ImageSegment(array, kind)


def check_document(
    document: Document, vocab_size: int, kind: ImageKind, channels: int, where: str, caption_kinds: int = 0
) -> None:
    """Raise BadRecord for token ids or images that the manifest's tokenizer or latent space cannot have made, and for
    captions of other than its `caption_kinds` kinds.
    """
    if (number := max(document.caption_kinds, default=-1)) >= caption_kinds:
        raise BadRecord(
            "wrong captions", where, f"kind {number}, but the manifest names {caption_kinds} kinds of captions"
        )
    for segment in document.segments + document.captions:
        if isinstance(segment, TextSegment):
            if segment.token_ids.view(np.uint64).max() >= vocab_size:  # viewed so, negative ids are large
                raise BadRecord("token id out of range", where, f"expected 0...{vocab_size - 1}")
        elif channels and segment.kind != kind:
            raise BadRecord("another kind of image", where, f"{segment.kind}, the manifest says {kind}")
        elif segment.channels != channels:
            found = f"{segment.kind} {segment.array.shape} of {segment.channels} channels"
            raise BadRecord("wrong array", where, f"{found}, expected {channels}")


def encode_record(
    key: str,
    segments: Sequence[np.ndarray],
    info: bytes,
    captions: Sequence[np.ndarray] = (),
    kind: ImageKind = "moments",
    caption_kinds: Sequence[int] = (),
    roles: Sequence[Role] = (),
) -> Record:
    """Return the encoded record of a document: its texts as token ids [len], its images as arrays of `kind`.

    An image and its caption are given caption first; a text alone or an image alone are fine. Empty texts are dropped.
    An image with several captions has them all in `captions`, and no text among `segments`. `caption_kinds` holds the
    kind of each, where there are several. `roles` are those of the segments; without them all are targets.
    """
    kept = [(s, role) for s, role in zip(segments, roles or ["target"] * len(segments), strict=True) if s.size]
    segments, numbers = [segment for segment, _ in kept], [ROLES.index(role) for _, role in kept]
    texts, images = ([s for s in segments if s.ndim == ndim] for ndim in (1, 3))
    token_ids = np.concatenate([np.zeros(0, np.int32), *texts]).astype(np.int32)
    record: Record = {"__key__": key.encode(), "json": info, "tokens.npy": save_array(token_ids)}
    if [s.ndim for s in segments] in ([], [1], [3], [1, 3]) and not any(numbers):
        names = [f"{kind}.npy"]
    else:
        names = [f"{i}.{kind}.npy" for i in range(len(images))]
        lengths = [len(s) if s.ndim == 1 else IMAGE for s in segments]
        record["segments.npy"] = save_array(np.array(lengths, dtype=np.int32))
        if any(numbers):
            record["roles.npy"] = save_array(np.array(numbers, dtype=np.uint8))
    dtype = np.uint8 if kind == "pixels" else np.float16
    record |= {name: save_array(image.astype(dtype)) for name, image in zip(names, images, strict=False)}
    caption_kinds = [number for number, caption in zip(caption_kinds, captions, strict=False) if caption.size]
    if captions := [caption for caption in captions if caption.size]:
        assert names == [f"{kind}.npy"] and not texts, (names, len(texts))
        record["tokens.npy"] = save_array(np.concatenate(captions).astype(np.int32))
        record["captions.npy"] = save_array(np.array([len(caption) for caption in captions], dtype=np.int32))
        if caption_kinds:
            record["caption_kinds.npy"] = save_array(np.array(caption_kinds, dtype=np.int32))
    return record


def document_sizes(record: Record, captions: CaptionTokens | None = None) -> tuple[int, list[tuple[int, int]]]:
    """Return (text tokens, latent grid of each image) of an encoded record, as its shard's index keeps them."""
    return sizes_of(decode_document(record, record["__key__"].decode()), captions)


def sizes_of(document: Document, captions: CaptionTokens | None = None) -> tuple[int, list[tuple[int, int]]]:
    """Return (text tokens, latent grid of each image) of a document, with the longest of its captions.

    Adds the lengths of several captions to `captions`.
    """
    if captions is not None and document.captions:
        captions.add([len(caption.token_ids) for caption in document.captions], document.caption_kinds)
    texts = [len(s.token_ids) for s in document.segments if isinstance(s, TextSegment)]
    tokens = max((len(s.token_ids) for s in document.captions), default=sum(texts))
    return tokens, [s.grid for s in document.segments if isinstance(s, ImageSegment)]


def _digest(parts: tuple[int | str, ...], size: int) -> bytes:
    packed = b"".join(p.encode() + b"\0" if isinstance(p, str) else struct.pack("<q", p) for p in parts)
    return hashlib.shake_128(packed).digest(size)


def _check_moments(moments: np.ndarray, where: str) -> None:
    """Raise BadRecord unless [2C, h, w] are finite and their log variances in range.

    Compares bits, 20 times faster than numpy's float16: as int16 positive numbers keep their order, as uint16 negative
    ones are ordered by magnitude, and infinities and NaNs come last in both.
    """
    if moments.view(np.int16).max() <= _MOST[1] and moments.view(np.uint16).max() <= _LEAST[1]:
        return  # all numbers are within the range of log variances
    parts = moments.reshape(2, -1)
    if (parts.view(np.int16).max(1) <= _MOST).all() and (parts.view(np.uint16).max(1) <= _LEAST).all():
        return
    if not np.isfinite(moments).all():
        raise BadRecord("non-finite latents", where)
    raise BadRecord("latent variance out of range", where, f"log variance {parts[1].min()}...{parts[1].max()}")


def _check_latents(latents: np.ndarray, where: str) -> None:
    """Raise BadRecord unless all are finite; compares bits, as `_check_moments` does."""
    if latents.view(np.int16).max() > _MOST[0] or latents.view(np.uint16).max() > _LEAST[0]:
        raise BadRecord("non-finite latents", where)
