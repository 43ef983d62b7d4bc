"""Document -> Piece: the layout of one document as tokens. Pure; no files, no randomness.

A document is `BOS segment ... EOS`, an image inside it `BOI patches EOI`. Text targets are all text tokens, BOI and
EOS, each exactly once, as the label of the token before it. There is no loss where the input is BOI or a patch (the
paper, footnote 8), so EOI is no target: the decoder appends it. Labels are shifted before a document is cut. Context is
no target: neither its tokens, nor the BOI before an image of it, nor an EOS after it.

With clean copies (BAGEL's generalized causal attention: Deng et al. 2025, arXiv:2505.14683) an image that is a target
and has something after it is `BOI noised clean EOI`. The clean patches have the noised ones' positions and do not see
them, nor does anything after them: all that follows sees the image as it does at sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.documents import Document, ImageSegment, TextSegment
from data.tokenizer import SpecialIds

IGNORE = -100
CAPTION_TOKENS = 256  # tokens of text before an image that stay with it when an interleaved document is cut


@dataclass(frozen=True)
class PlacedImage:
    """An image in a piece: `rows` x `columns` patches from token `start` on."""

    segment: ImageSegment
    start: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Piece:
    """One document laid out as tokens, or a part of a cut one. Arrays are [len]."""

    input_ids: np.ndarray  # int64
    labels: np.ndarray  # int64, IGNORE where there is no text target
    images: tuple[PlacedImage, ...]
    cuts: tuple[tuple[int, int], ...]  # (first, last) of each range of places it may be cut at; see `_cuts`

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_attention_pairs(self) -> int:
        """Pairs the mask allows: the causal triangle, and the upper one inside each image, but for what copies hide."""
        pairs = len(self) * (len(self) + 1) // 2
        for image in self.images:
            patches = image.rows * image.columns
            pairs += patches * (patches - 1) // 2
            if image.segment.role == "copy":
                pairs -= patches * (len(self) - image.start)
        return pairs

    @property
    def longest_uncut(self) -> int:
        """Length of the longest part when it is cut wherever it may be."""
        before = [0, *(last for _, last in self.cuts)]
        after = [*(first for first, _ in self.cuts), len(self)]
        return max(b - a for a, b in zip(before, after, strict=True))

    def cut_at(self, length: int) -> int:
        """Return the length of the longest head of at most `length` tokens that may be cut off; 0 if none may."""
        return max((min(last, length) for first, last in self.cuts if first <= length), default=0)

    def split(self, length: int) -> tuple["Piece", "Piece"]:
        assert any(first <= length <= last for first, last in self.cuts), (length, self.cuts)
        head = tuple(image for image in self.images if image.start < length)
        rest = tuple(replace(image, start=image.start - length) for image in self.images[len(head) :])
        before = tuple((first, min(last, length - 1)) for first, last in self.cuts if first < length)
        after = tuple((max(first - length, 1), last - length) for first, last in self.cuts if last > length)
        return (
            Piece(self.input_ids[:length], self.labels[:length], head, before),
            Piece(self.input_ids[length:], self.labels[length:], rest, after),
        )


def lay_out(document: Document, special: SpecialIds, patch_size: int, clean_copies: bool = False) -> Piece:
    """Return the document's tokens; raise ValueError for a latent grid that patches do not tile."""
    images: list[PlacedImage] = []
    spans: list[tuple[int, int]] = []  # each segment's tokens, BOI and EOI included
    tokens, targets = [np.array([special.bos])], []  # targets: of the tokens after BOS
    start = 1
    for number, segment in enumerate(document.segments, start=1):
        if isinstance(segment, TextSegment):
            tokens.append(segment.token_ids)
            targets.append(segment.token_ids)
        else:
            rows, columns = patch_grid(segment.grid, patch_size)
            images.append(PlacedImage(segment, start + 1, rows, columns))
            patches = rows * columns
            if clean_copies and segment.role == "target" and number < len(document.segments):
                images.append(PlacedImage(replace(segment, role="copy"), start + 1 + patches, rows, columns))
                patches *= 2
            tokens.append(np.full(patches + 2, special.pad))
            tokens[-1][[0, -1]] = special.boi, special.eoi
            targets.append(np.full(patches + 2, IGNORE))
            targets[-1][0] = special.boi
        if segment.role == "context":
            targets[-1] = np.full(len(tokens[-1]), IGNORE)
        spans.append((start, start + len(tokens[-1])))
        start = spans[-1][1]
    end = special.eos if document.segments[-1].role == "target" else IGNORE
    input_ids = np.concatenate([*tokens, [special.eos]])
    labels = np.concatenate([*targets, [end, IGNORE]])  # one place earlier than the token
    return Piece(input_ids, labels, tuple(images), _cuts(document, spans))


def _cuts(document: Document, spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return where a document may be cut: a text anywhere, an image with its caption and what has context nowhere.

    In a longer document the last CAPTION_TOKENS of the text before an image describe it and stay with it: cuts fall
    right after an image or earlier in a text.
    """
    if document.has_context:
        return ()
    if not document.has_image:
        return ((1, spans[-1][1]),)
    if len(spans) <= 2:
        return ()
    cuts = []
    is_image = [*(isinstance(segment, ImageSegment) for segment in document.segments), False]
    for i, (start, stop) in enumerate(spans):
        first = start if i else start + 1  # BOS alone is no head
        if not is_image[i]:
            last = stop - CAPTION_TOKENS if is_image[i + 1] else stop
            cuts.append((first, max(first, last) if i else last))
        elif i and is_image[i - 1]:
            cuts.append((first, first))
    return tuple((first, last) for first, last in cuts if first <= last)


def caption_room(document: Document, patch_size: int, sequence_length: int, clean_copies: bool = False) -> int | None:
    """Return how many tokens each of a document's several captions may have beside its image; None if it has not.

    Raises ValueError for a latent grid that patches do not tile.
    """
    image = document.segments[-1]
    if not document.captions or not isinstance(image, ImageSegment):
        return None
    rows, columns = patch_grid(image.grid, patch_size)
    return sequence_length - rows * columns * (1 + clean_copies) - 4


def patch_grid(grid: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return (rows, columns) of patches of a latent grid (h, w)."""
    h, w = grid
    if h % patch_size or w % patch_size:
        raise ValueError(f"latent grid {h}x{w} is not a multiple of patch_size={patch_size}; choose another patch size")
    return h // patch_size, w // patch_size
