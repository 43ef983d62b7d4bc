"""What a sequence of a run holds on average: by sequences that its lanes really pack, or by the paper's mix.

Manifests know neither roles nor what is drawn of a document (its caption, order, dropout), and the mask's pairs grow
with the square of a document's length. So a plan reads the data: as many documents as fill some sequences.
"""

import math
import operator
from collections.abc import Iterator
from functools import reduce

import numpy as np

from data.dataset import DataSet
from data.documents import PIXEL_CHANNELS, Document, ImageKind, ImageSegment, TextSegment
from data.lanes import Lane, lanes_of_rank
from data.largest_batch import ANY_IDS, Grid
from data.layout import lay_out
from data.packing import ImageDraws, PackedSequence, collate, pack
from model.latent_space import Pixels
from train.flops import Counts
from train.pretrain_config import PretrainConfig

LANES, SEQUENCES = 8, 64  # that are read: of so many lanes, or all if there are fewer, the first sequences
PAPER_GRID: Grid = (32, 32)  # latents of the paper's pictures
PAPER_PIXELS: Grid = (256, 256)
CAPTION_TOKENS = 64  # assumed when the data is not available
IMAGE_SHARE = 0.5  # likewise, of all tokens: the paper's


def average_sequence(config: PretrainConfig, data: DataSet | None) -> Counts:
    """Return what an average sequence holds: of the data or, without it, of the paper's mix."""
    if data is None:
        return _assumed(config)
    counts = [_counts(row, config.model.patch_size) for row in _first_rows(data)]
    if not counts:
        raise ValueError("data.sources: no document could be read that fits a sequence; train.encode verify=FOLDER")
    return reduce(operator.add, counts).times(1 / len(counts))


def assumed_images(config: PretrainConfig) -> tuple[Grid, ImageKind]:
    """Return the grid and the kind of the paper's pictures, for when the data is not available."""
    return (PAPER_PIXELS, "pixels") if config.vae == Pixels.hash else (PAPER_GRID, "moments")


def _first_rows(data: DataSet) -> Iterator[PackedSequence]:
    """Yield the first sequences of some lanes."""
    lanes = min(LANES, data.settings.lanes)
    for number in range(lanes):
        lane = Lane(lanes_of_rank(number, lanes, data.settings.lanes)[0], data.sources, data.settings)
        for _ in range(-(-SEQUENCES // lanes)):
            if (row := lane.next_row()) is not None:
                yield row


def _counts(row: PackedSequence, patch_size: int) -> Counts:
    return Counts.of(collate([row], [ImageDraws.zeros(row)], patch_size), patch_size**2)


def _assumed(config: PretrainConfig) -> Counts:
    """Return what a sequence holds of captioned pictures, laid out as the run would, and of text that fills it."""
    length, size, order = config.data.sequence_length, config.model.patch_size, config.data.order
    grid, kind = assumed_images(config)
    channels = {"pixels": PIXEL_CHANNELS, "moments": 2 * config.model.latent_channels}[kind]
    image = ImageSegment(np.zeros((channels, *grid), np.uint8 if kind == "pixels" else np.float16), kind)

    def text(tokens: int) -> TextSegment:
        return TextSegment(np.zeros(tokens, dtype=np.int64))

    def counted(*segments: TextSegment | ImageSegment) -> Counts:
        piece = lay_out(Document(segments), ANY_IDS, size, config.data.clean_copies)
        return _counts(pack([piece], len(piece), ANY_IDS.pad), size)

    caption, dropped = text(CAPTION_TOKENS), order.caption_dropout
    picture = counted(image).times(dropped)
    picture += counted(caption, image).times(order.caption_first * (1 - dropped))
    picture += counted(image, caption).times((1 - order.caption_first) * (1 - dropped))
    # As data.image_share counts: without clean copies.
    patches = math.prod(grid) // size**2
    uncopied = patches + 4 + CAPTION_TOKENS * (1 - dropped)
    share = min(1.0, (config.data.image_share or IMAGE_SHARE) * uncopied / patches)
    words = counted(text(max(1, length - 2)))
    mixed = picture.times(share / uncopied) + words.times((1 - share) / words.tokens)
    return mixed.times(length / mixed.tokens)
