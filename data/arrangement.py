"""What is drawn anew each epoch of a document: one of its captions, their order, and what is left out.

Drawn from (seed, epoch, source, shard, record), so it belongs to the document and not to its reader.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import fsum

from data.captions import draw_caption, drawable
from data.documents import Document, ImageSegment, TextSegment, uniforms


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    # Share of image-caption documents that put the caption first, in [0, 1] (the paper: 0.8).
    caption_first: float = 0.8
    # Share of image-caption documents whose caption is dropped, in [0, 1] (ours: guidance needs it).
    caption_dropout: float = 0.1
    # Of documents that draw an image from context, the share whose context texts are left out, in [0, 1]. Guidance at
    # sampling needs this and the next two (InstructPix2Pix: 0.05 each); together at most 1.
    text_dropout: float = 0.0
    image_dropout: float = 0.0  # the share whose context images are left out, in [0, 1]
    context_dropout: float = 0.0  # the share whose context is left out, texts and images, in [0, 1]

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: expected a share in [0, 1]")
        if (total := fsum((self.text_dropout, self.image_dropout, self.context_dropout))) > 1:
            raise ValueError(f"text_dropout + image_dropout + context_dropout={total}: expected at most 1")

    def __str__(self) -> str:
        """Name what is set as in fingerprints, which older versions wrote without the dropout of context."""
        of_context = ("text_dropout", "image_dropout", "context_dropout")
        shown = [f"{name}={share}" for name, share in vars(self).items() if share or name not in of_context]
        return f"OrderConfig({', '.join(shown)})"


def arrange(
    document: Document,
    config: OrderConfig,
    *,
    seed: int,
    epoch: int,
    source: int,
    shard: int,
    record: int,
    weights: Sequence[float] = (),
    room: int | None = None,
) -> Document:
    """Draw an image's caption, their order and caption dropout, or the dropout of context; leave others unchanged.

    Of several captions one is drawn by the `weights` of their kinds. One longer than `room` (tokens) is drawn again
    among those that are not, unless all are. An image whose captions all have weight 0 goes without, as if dropped.

    An image before its caption is marked, so that its noise may be capped (the paper, section 4.3.4: captions are
    learnt from pictures one can see); so is the image of a document of one image and then one text. Ours: in longer
    documents a text describes the image after it, and none is marked.
    """
    if document.has_context:
        return _context_dropped(document, config, uniforms("context", seed, epoch, source, shard, record, count=1)[0])
    match document.segments:
        case ImageSegment() as image, TextSegment() as text:
            return Document((replace(image, before_caption=True), text))
        case TextSegment() as caption, ImageSegment() as image:
            draws = uniforms("caption", seed, epoch, source, shard, record, count=4)
        case _:
            return document
    order_draw, dropout_draw, *caption_draws = draws
    if document.captions:
        choices = drawable(len(document.captions), document.caption_kinds, weights)
        fitting = [i for i in choices if room is None or len(document.captions[i].token_ids) <= room]
        if not choices:
            return Document((image,))
        chosen = draw_caption(choices, document.caption_kinds, weights, caption_draws[0])
        if fitting and chosen not in fitting:
            chosen = draw_caption(fitting, document.caption_kinds, weights, caption_draws[1])
        caption = document.captions[chosen]
    if dropout_draw < config.caption_dropout:
        return Document((image,))
    if order_draw < config.caption_first:
        return Document((caption, image))
    return Document((replace(image, before_caption=True), caption))


def _context_dropped(document: Document, config: OrderConfig, uniform: float) -> Document:
    """Leave out context texts, context images or both, or neither, by a `uniform` in [0, 1)."""
    if not document.draws_image:
        return document
    upto, dropped = 0.0, tuple[type, ...]()
    kinds = ((TextSegment,), (ImageSegment,), (TextSegment, ImageSegment))
    for share, of_kinds in zip((config.text_dropout, config.image_dropout, config.context_dropout), kinds, strict=True):
        if upto <= uniform < upto + share:
            dropped = of_kinds
        upto += share
    return Document(tuple(s for s in document.segments if s.role == "target" or not isinstance(s, dropped)))
