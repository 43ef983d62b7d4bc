"""Documents that no sequence can hold, found by the indices before the first step, so that they are named and counted
once and not each time a lane meets them.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import numpy as np

from data.documents import Document, decode_document
from data.manifest import Manifest
from data.packing import lay_out
from data.shards import BadRecord, read_at
from data.tokenizer import SpecialIds

LOOKED_INTO = 4096  # documents of a data set that are read to see whether they may be cut


def find_too_long(
    manifest: Manifest, special: SpecialIds, patch_size: int, sequence_length: int
) -> Iterator[tuple[int, int]]:
    """Yield (shard, record) of the documents that are longer than a sequence wherever they are cut.

    Only those with one image: text can be cut, and so can what stands between images. Not of remote data, where asking
    would take longer than many a training. What is not found here is found when it is met.
    """
    channels = manifest.latent_spec.channels if manifest.latent_spec is not None else 0
    looked_into = 0
    for shard, entry in enumerate(() if manifest.store.is_remote else manifest.shards):
        grids = [tuple(map(int, grid.split("x"))) for grid in entry.grids]
        # Bytes of an image's moments and of as many token ids as do not fit beside it: most shards hold no such record.
        texts = [sequence_length - 4 - (h // patch_size) * (w // patch_size) for h, w in grids]
        least = [4 * (tokens + channels * h * w) for tokens, (h, w) in zip(texts, grids, strict=True)]
        if not grids or entry.largest_record < min(least):
            continue
        with suppress(BadRecord):  # of the index: whoever needs it says so
            index = manifest.load_index(shard)
            is_long = (index.document_tokens(patch_size) > sequence_length) & (np.diff(index.grid_starts) == 1)
            for record in np.flatnonzero(is_long).tolist():
                if (looked_into := looked_into + 1) > LOOKED_INTO:
                    return
                read = partial(manifest.store.read, entry.name)
                with suppress(OSError, ValueError):  # a bad record is counted as one when it is met
                    document = decode_document(read_at(read, index.spans[record], entry.name), entry.name)
                    if lay_out(_at_its_longest(document), special, patch_size).longest_uncut > sequence_length:
                        yield shard, record


def _at_its_longest(document: Document) -> Document:
    """Return a document with the longest of its captions."""
    if not document.captions:
        return document
    longest = max(document.captions, key=lambda caption: len(caption.token_ids))
    return Document((longest, *document.segments[1:]))
