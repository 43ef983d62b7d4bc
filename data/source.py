"""A source: one encoded data set, the order of its documents for each (epoch, lane), and reading them.

An epoch permutes the shards, lays their documents end to end and cuts L ranges of equal tokens at document borders
(equal documents would let lanes drift apart); a lane reads its range, shuffling within bounded blocks. Rejected:
shards dealt out to ranks and workers, which would make the order depend on both.

Ranges count each picture's longest caption, as the index does, and not the one drawn: they are then the same for any
weights, and each document is still in one range. Lanes of equal bounds draw nearly equal numbers of tokens: the
difference is that between the shares of captions drawn short, which averages out over a range of many documents, and
what it leaves moves only the place where a lane's epoch ends.
"""

import bisect
import errno
import math
import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial, reduce

import numpy as np
from omegaconf import MISSING

from data.arrangement import OrderConfig, arrange
from data.captions import check_weights
from data.documents import check_document, decode_document, seed_from
from data.layout import Piece, caption_room, lay_out
from data.manifest import Manifest
from data.shards import BadRecord, Record, read_at
from data.storage import Location
from data.tokenizer import SpecialIds
from data.watch import ReadWatch


@dataclass(frozen=True, kw_only=True)
class SourceOrderConfig:
    caption_first: float | None = None  # `data.order.caption_first` of this source, in [0, 1]; null: the common one
    caption_dropout: float | None = None  # `data.order.caption_dropout` of this source, in [0, 1]; null: the common one

    def __post_init__(self) -> None:
        self.over(OrderConfig())  # which refuses what is no share

    def over(self, common: OrderConfig) -> OrderConfig:
        """Return the order in force, where `common` is that of all sources."""
        return replace(common, **{name: share for name, share in vars(self).items() if share is not None})


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: Location = MISSING  # folder of encoded shards with its manifest.json
    weight: float = 1.0  # share of all tokens relative to the other sources, >= 0
    # Weights that take over from given steps on, such as {20000: 0.5, 30000: 0}. A resume may change future ones.
    weight_from: dict[str, float] = field(default_factory=dict)
    repeat: bool = True  # start another epoch when one ends; false: the others take over its share
    # Weights by which kinds of captions are drawn, such as {caption: 1, long_caption: 2}, instead of those given as
    # caption_keys when the data was encoded; 0 or more, kinds left out count as 0. {}: those of the encoding.
    captions: dict[str, float] = field(default_factory=dict)
    order: SourceOrderConfig = field(default_factory=SourceOrderConfig)

    def __post_init__(self) -> None:
        check_weights("captions", self.captions)
        for step, weight in self.weight_from.items():
            if not (step.isdecimal() and step == str(int(step)) and int(step) > 1 and 0 <= weight < math.inf):
                raise ValueError(f"weight_from: {step}: {weight}: expected a step, 2 or more, and a weight, 0 or more")
        if not 0 <= self.weight < math.inf or not max(self.weight, *self.weight_from.values(), 0.0):
            raise ValueError(f"weight={self.weight}: expected more than 0; leave the source out instead")

    def weight_at(self, step: int) -> float:
        """Return the weight in force at `step`, counted from 1."""
        since = max((int(s) for s in self.weight_from if int(s) <= step), default=0)
        return self.weight_from[str(since)] if since else self.weight


@dataclass(frozen=True)
class LaneSettings:
    """What decides the order besides the data; a resume refuses any change of it."""

    seed: int
    lanes: int
    sequence_length: int
    patch_size: int
    shuffle_block: int  # documents
    look_ahead: int  # documents
    order: OrderConfig
    special: SpecialIds
    clean_copies: bool = False


class Source:
    """One encoded data set: the order of its documents for each (epoch, lane), and reading them."""

    def __init__(
        self,
        number: int,
        config: SourceConfig,
        manifest: Manifest,
        settings: LaneSettings,
        watch: ReadWatch,
        read_ahead: int,
        too_long: Iterable[tuple[int, int]],
        caption_weights: Sequence[float] = (),
    ):
        self.number, self.config, self.manifest, self.settings, self.watch = number, config, manifest, settings, watch
        self.read_ahead = read_ahead  # documents that each lane requests in advance
        self.order, self.caption_weights = config.order.over(settings.order), caption_weights
        self.too_long = frozenset(too_long)  # (shard, record), reported at start already
        self._shard_tokens = np.array([shard.tokens(settings.patch_size) for shard in manifest.shards], dtype=np.int64)
        open_shards = 2 * settings.lanes + 16  # a lane's block touches one or two
        self._index = lru_cache(open_shards)(manifest.load_index)
        self._path = lru_cache(open_shards)(manifest.shard_path)
        self._reader = lru_cache(open_shards)(lambda shard: partial(manifest.store.read, manifest.shards[shard].name))
        self._begins = lru_cache(64)(self._document_begins)
        self._epoch = lru_cache(4)(self._lay_out_epoch)
        self._range = lru_cache(4 * settings.lanes)(self._cut_range)
        self._block = lru_cache(2 * settings.lanes)(self._permute_block)
        self._kind, self._channels = manifest.kind_and_channels

    def under(self, settings: LaneSettings) -> "Source":
        """Return the same data, opened once, in the order of other settings."""
        others = self.watch, self.read_ahead, self.too_long, self.caption_weights
        return Source(self.number, self.config, self.manifest, settings, *others)

    def position(self, epoch: int, lane: int, ordinal: int) -> tuple[int, int] | None:
        """Return (shard, record) of the lane's `ordinal`-th document in `epoch`, None past its range."""
        spans, ends = self._range(epoch, lane)
        if not ends or ordinal >= ends[-1]:
            return None
        block_size = self.settings.shuffle_block
        block, inside = divmod(ordinal, block_size)
        size = min(block_size, ends[-1] - block * block_size)
        in_order = block * block_size + int(self._block(epoch, lane, block, size)[inside])
        i = bisect.bisect_right(ends, in_order)
        shard, first = spans[i]
        return shard, first + in_order - (ends[i - 1] if i else 0)

    def prefetch(self, lane: int, shard: int, record: int) -> None:
        """Start fetching a document that the lane will read."""
        self.watch.begin("lane %d: index of %s", lane, self._path(shard))
        with suppress(BadRecord):  # a damaged index is counted when the document is read
            offset, length, _ = self._index(shard).spans[record].tolist()
            self.manifest.store.prefetch(self.manifest.shards[shard].name, offset, length)
        self.watch.end()

    def read(self, lane: int, epoch: int, shard: int, record: int) -> Piece:
        """Read, verify, arrange and lay out one document; raise BadRecord if any of that fails."""
        path = self._path(shard)
        where = f"{path}#{record}"
        try:
            self.watch.begin("lane %d: index of %s", lane, path)
            span = self._index(shard).spans[record]
            self.watch.begin("lane %d: record %d of %s at byte %d", lane, record, path, span[0])
            members = self._members(shard, span, where)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # this process's fault, not the record's
                raise
            self.manifest.store.forget()  # a stale handle would keep failing
            raise BadRecord("unreadable shard", where, error.strerror or str(error)) from None
        finally:
            self.watch.end()
        settings = self.settings
        document = decode_document(members, where)
        kinds = len(self.caption_weights)
        check_document(document, self.manifest.vocab_size, self._kind, self._channels, where, kinds)
        try:
            document = arrange(
                document,
                self.order,
                seed=settings.seed,
                epoch=epoch,
                source=self.number,
                shard=shard,
                record=record,
                weights=self.caption_weights,
                room=caption_room(document, settings.patch_size, settings.sequence_length, settings.clean_copies),
            )
            piece = lay_out(document, settings.special, settings.patch_size, settings.clean_copies)
        except ValueError as error:
            raise BadRecord("latent grid not tiled by patches", where, str(error)) from None
        if (longest := piece.longest_uncut) > settings.sequence_length:
            raise BadRecord("longer than a sequence", where, f"{longest} of {settings.sequence_length} tokens")
        return piece

    def _members(self, shard: int, span: np.ndarray, where: str) -> Record:
        try:
            return read_at(self._reader(shard), span, where)
        except BadRecord:
            if not self.manifest.store.drop_copy(self.manifest.shards[shard].name):
                raise
        return read_at(self._reader(shard), span, where)  # the cached copy may have been the only damage

    def _lay_out_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the epoch's order of shards [n], their first tokens and the end [n + 1], and each lane's range [L]."""
        # Lanes change ranges each epoch, so that none keeps the same documents (or, in a small set, none at all).
        generator = np.random.default_rng(seed_from("epoch", self.settings.seed, epoch, self.number))
        order = generator.permutation(len(self._shard_tokens))
        starts = np.concatenate([[0], np.cumsum(self._shard_tokens[order])])
        return order, starts, generator.permutation(self.settings.lanes)

    def _cut_range(self, epoch: int, lane: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Return the lane's runs of records as [(shard, first record)], and the record count up to each run's end."""
        order, starts, ranges = self._epoch(epoch)
        total, lanes, part = int(starts[-1]), self.settings.lanes, int(ranges[lane])
        low, high = total * part // lanes, total * (part + 1) // lanes
        spans, ends, count = [], [], 0
        for place in range(np.searchsorted(starts, low, "right") - 1, np.searchsorted(starts, high, "left")):
            shard, start, stop = int(order[place]), int(starts[place]), int(starts[place + 1])
            first, last = 0, self.manifest.shards[shard].records
            if start < low or stop > high:  # a border shard: a document belongs to the range of its first token
                begins = start + self._begins(shard)
                first, last = np.searchsorted(begins, (low, high), "left").tolist()
            if last > first:
                count += last - first
                spans.append((shard, first))
                ends.append(count)
        return spans, ends

    def _document_begins(self, shard: int) -> np.ndarray:
        """Return int64 [R]: the number of tokens before each document of the shard."""
        tokens = self._index(shard).document_tokens(self.settings.patch_size)
        return np.cumsum(tokens) - tokens

    def _permute_block(self, epoch: int, lane: int, block: int, size: int) -> np.ndarray:
        seed = seed_from("block", self.settings.seed, epoch, self.number, lane, block)
        return np.random.default_rng(seed).permutation(size)


def sum_in_order(values: Iterable[float]) -> float:
    """Add from left to right: `sum` corrects rounding since Python 3.12, and a resume must find the same bits."""
    return reduce(operator.add, values, 0.0)
