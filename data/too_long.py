"""Documents too long for any sequence, found by the indices before the first step, so that they are reported once and
not each time a lane meets them.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from data.captions import drawable
from data.documents import CELL_BYTES, Document, check_document, decode_document
from data.layout import lay_out
from data.manifest import Manifest
from data.shards import BadRecord, read_at
from data.tokenizer import SpecialIds

MAX_EXAMINED = 4096  # documents of a data set that are read to see whether they may be cut


def find_too_long(
    manifest: Manifest,
    special: SpecialIds,
    patch_size: int,
    sequence_length: int,
    caption_weights: Sequence[float] = (),
) -> Iterator[tuple[int, int]]:
    """Yield (shard, record) of documents that are longer than a sequence wherever they are cut, whichever of their
    captions is drawn by these weights.

    Looks only at documents with one image and at data sets of conversations, as most others can be cut, and not at
    remote data, where it could take hours. Whatever it misses, such as edits, is skipped when a lane meets it.
    """
    kind, channels = manifest.kind_and_channels
    has_conversations = manifest.chat_hash is not None
    examined = 0
    for shard, entry in enumerate(() if manifest.store.is_remote else manifest.shards):
        # Bytes of an image and of as many token ids as fill the rest of a sequence: few shards hold more.
        least = [
            4 * (sequence_length - 4 - (h // patch_size) * (w // patch_size)) + CELL_BYTES[kind] * channels * h * w
            for h, w in (*entry.sizes, *([(0, 0)] * has_conversations))
        ]
        if not least or entry.largest_record < min(least):
            continue
        with suppress(BadRecord):  # of the index: reported when it is needed
            index = manifest.load_index(shard)
            is_long = index.document_tokens(patch_size) > sequence_length
            is_long &= has_conversations | (np.diff(index.grid_starts) == 1)
            for record in np.flatnonzero(is_long).tolist():
                if (examined := examined + 1) > MAX_EXAMINED:
                    return
                read = partial(manifest.store.read, entry.name)
                with suppress(OSError, ValueError):  # a bad record is counted when it is met
                    document = decode_document(read_at(read, index.spans[record], entry.name), entry.name)
                    check_document(document, manifest.vocab_size, kind, channels, entry.name, len(caption_weights))
                    if document.captions:
                        choices = drawable(len(document.captions), document.caption_kinds, caption_weights)
                        captions = sorted((document.captions[i] for i in choices), key=lambda c: len(c.token_ids))
                        document = Document((*captions[:1], *document.segments[1:]))
                    if lay_out(document, special, patch_size).longest_uncut > sequence_length:
                        yield shard, record
