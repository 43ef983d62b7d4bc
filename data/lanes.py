"""The order of documents: a lane is an endless, deterministic stream of packed sequences.

Step s of lane l is the same sequence whoever computes it, so elasticity, determinism and resume are one thing:
assigning lanes to ranks. An epoch permutes a source's shards, lays their documents end to end and cuts L ranges of
equal tokens at document borders; a lane reads its range, shuffling within bounded blocks. A lane's state is a few
ints a source and the positions of pending documents, never contents. Rejected: shards dealt out to ranks and
workers (the order would depend on both) and replay on resume (its cost grows with the run).
"""

import bisect
import errno
import logging
import math
import operator
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial, reduce

import numpy as np
from omegaconf import MISSING

from data.documents import OrderConfig, arrange, check_document, decode_document, seed_from, uniforms
from data.manifest import Manifest
from data.packing import PackedSequence, Piece, lay_out, pack
from data.remote import shown
from data.shards import BadRecord, Record, read_at
from data.storage import Location
from data.tokenizer import SpecialIds
from data.watch import ReadWatch

MIN_CUT = 8  # tokens: a shorter piece of a cut text teaches nothing and costs a document border
NAMES_KEPT = 4  # names of skipped documents in a lane's state; the log has them all
SKIPS_IN_A_ROW = 1000  # documents: a lane that skips this many has nothing left to read and would search for ever

Position = tuple[int, int, int]  # (source, shard, record) of a document

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    path: Location = MISSING  # folder of encoded shards with its manifest.json
    weight: float = 1.0  # share of all tokens relative to the other sources, >= 0
    # Other weights from given steps on, such as {20000: 0.5, 30000: 0}. A resume may change those of steps to come.
    weight_from: dict[str, float] = field(default_factory=dict)
    repeat: bool = True  # start another epoch when one ends; else the share goes to the other sources

    def __post_init__(self) -> None:
        for step, weight in self.weight_from.items():
            if not (step.isdecimal() and step == str(int(step)) and int(step) > 1 and 0 <= weight < math.inf):
                raise ValueError(f"weight_from: {step}: {weight}: expected a step, 2 or more, and a weight, 0 or more")
        if not 0 <= self.weight < math.inf or not max(self.weight, *self.weight_from.values(), 0.0):
            raise ValueError(f"weight={self.weight}: expected more than 0; leave the source out instead")

    def weight_at(self, step: int) -> float:
        """Return the weight that holds for the batch of `step`, counted from 1."""
        since = max((int(s) for s in self.weight_from if int(s) <= step), default=0)
        return self.weight_from[str(since)] if since else self.weight


@dataclass(frozen=True)
class LaneSettings:
    """Everything that decides the order besides the data; resume refuses a change of any of it."""

    seed: int
    lanes: int
    sequence_length: int
    patch_size: int
    shuffle_block: int  # documents
    look_ahead: int  # documents
    order: OrderConfig
    special: SpecialIds


class Source:
    """One encoded data set: the order of its documents for each (epoch, lane), and reading them."""

    def __init__(
        self,
        number: int,
        config: SourceConfig,
        manifest: Manifest,
        settings: LaneSettings,
        watch: ReadWatch,
        read_ahead: int = 0,
        too_long: Iterable[tuple[int, int]] = (),
    ):
        self.number, self.config, self.manifest, self.settings, self.watch = number, config, manifest, settings, watch
        self.read_ahead = read_ahead  # documents that each lane asks for before it reads them
        self.too_long = frozenset(too_long)  # (shard, record) of those that are known to be, and named already
        self._shard_tokens = np.array([shard.tokens(settings.patch_size) for shard in manifest.shards], dtype=np.int64)
        open_shards = 2 * settings.lanes + 16  # each lane's block lies in one or two
        self._index = lru_cache(open_shards)(manifest.load_index)
        self._path = lru_cache(open_shards)(manifest.shard_path)
        self._reader = lru_cache(open_shards)(lambda shard: partial(manifest.store.read, manifest.shards[shard].name))
        self._begins = lru_cache(64)(self._document_begins)
        self._epoch = lru_cache(4)(self._lay_out_epoch)
        self._range = lru_cache(4 * settings.lanes)(self._cut_range)
        self._block = lru_cache(2 * settings.lanes)(self._permute_block)
        self._channels = manifest.latent_spec.channels if manifest.latent_spec is not None else 0

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
        """Begin to fetch a document that the lane will read."""
        self.watch.begin("lane %d: index of %s", lane, self._path(shard))
        with suppress(BadRecord):  # of the index: it is counted when the document is read
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
            if error.errno in (errno.EMFILE, errno.ENFILE):  # this process's fault, and no record's
                raise
            self.manifest.store.forget()  # a stale handle would fail for ever
            raise BadRecord("unreadable shard", where, error.strerror or str(error)) from None
        finally:
            self.watch.end()
        settings = self.settings
        document = decode_document(members, where)
        check_document(document, self.manifest.vocab_size, self._channels, where)
        document = arrange(document, settings.order, settings.seed, epoch, self.number, shard, record)
        try:
            piece = lay_out(document, settings.special, settings.patch_size)
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
        return read_at(self._reader(shard), span, where)  # it may have been the cache's fault alone

    def _lay_out_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the epoch's order of shards [n], the token each starts at and the end [n + 1], each lane's range [L].

        Lanes change ranges, so that none meets the same documents (or, in a small set, none at all) for ever.
        """
        generator = np.random.default_rng(seed_from("epoch", self.settings.seed, epoch, self.number))
        order = generator.permutation(len(self._shard_tokens))
        starts = np.concatenate([[0], np.cumsum(self._shard_tokens[order])])
        return order, starts, generator.permutation(self.settings.lanes)

    def _cut_range(self, epoch: int, lane: int) -> tuple[list[tuple[int, int]], list[int]]:
        """Return the lane's runs of records: [(shard, first record)] and the running count at each run's end."""
        order, starts, ranges = self._epoch(epoch)
        total, lanes, part = int(starts[-1]), self.settings.lanes, int(ranges[lane])
        low, high = total * part // lanes, total * (part + 1) // lanes
        spans, ends, count = [], [], 0
        for place in range(np.searchsorted(starts, low, "right") - 1, np.searchsorted(starts, high, "left")):
            shard, start, stop = int(order[place]), int(starts[place]), int(starts[place + 1])
            first, last = 0, self.manifest.shards[shard].records
            if start < low or stop > high:  # a border shard: a document belongs where its first token lies
                begins = start + self._begins(shard)
                first, last = np.searchsorted(begins, (low, high), "left").tolist()
            if last > first:
                count += last - first
                spans.append((shard, first))
                ends.append(count)
        return spans, ends

    def _document_begins(self, shard: int) -> np.ndarray:
        """Return int64 [R]: tokens of the shard before each of its documents."""
        tokens = self._index(shard).document_tokens(self.settings.patch_size)
        return np.cumsum(tokens) - tokens

    def _permute_block(self, epoch: int, lane: int, block: int, size: int) -> np.ndarray:
        seed = seed_from("block", self.settings.seed, epoch, self.number, lane, block)
        return np.random.default_rng(seed).permutation(size)


@dataclass
class Cursor:
    """Where a lane stands in one source."""

    epoch: int = 0
    ordinal: int = 0  # next document of the lane's range
    tokens: int = 0  # drawn since the weights last changed: the running account that holds the mix


@dataclass(frozen=True)
class Pending:
    """A document that was drawn and is not used up: its position, and how many of its tokens are."""

    source: int
    epoch: int
    shard: int
    record: int
    cut: int = 0


class Lane:
    """One lane: `next_row()` packs its next sequence, `state()` is all that is needed to go on from here."""

    def __init__(self, number: int, sources: list[Source], settings: LaneSettings, state: dict | None = None):
        self.number, self.sources, self.settings = number, sources, settings
        # A phase of up to one sequence, so that lanes do not all begin with the same source; each by itself, so that
        # a source that is appended changes nothing for the others.
        phases = [uniforms("mix", settings.seed, number, source.number, count=1)[0] for source in sources]
        self._phases = [phase * settings.sequence_length for phase in phases]
        self._rows = 0  # made so far: the next one is that of step `_rows + 1`
        self.documents: list[Position] = []  # in the last row
        self._skipped: Counter = Counter()
        self._skipped_names: list[str] = []
        self._skipped_documents: dict[Position, None] = {}  # in the order in which they were met
        self._cursors = [Cursor() for _ in sources]
        self._pending: list[tuple[Pending, Piece]] = []
        if state is not None:
            self._restore(state)
        self._weights = self._weights_at(max(self._rows, 1))  # of the last row, or the first
        for source, cursor in zip(sources, self._cursors, strict=True):
            for ordinal in range(cursor.ordinal, cursor.ordinal + source.read_ahead):
                self._prefetch(source, cursor.epoch, ordinal)

    def next_row(self) -> PackedSequence | None:
        """Return the next packed sequence; None when every source has ended."""
        weights = self._weights_at(self._rows + 1)
        if weights != self._weights:
            self._settle_accounts()
            self._weights = weights
        self._rows += 1
        self.documents = []
        length, chosen, space = self.settings.sequence_length, [], self.settings.sequence_length
        while space:
            self._refill()
            # The oldest opens a row whatever its length, so that a long text is not passed over for ever.
            place = self._place_in(space) if chosen else 0
            if place is None or place == len(self._pending):
                break
            pending, piece = self._pending.pop(place)
            if len(piece) > space:
                cut = piece.cut_at(space)
                piece, rest = piece.split(cut)
                self._pending.insert(place, (replace(pending, cut=pending.cut + cut), rest))
            chosen.append(piece)
            self.documents.append((pending.source, pending.shard, pending.record))
            space -= len(piece)
        return pack(chosen, length, self.settings.special.pad) if chosen else None

    def _place_in(self, space: int) -> int | None:
        """Return which pending document comes next: the oldest that fits, else the oldest that may be cut to fit."""
        for place, (_, piece) in enumerate(self._pending):
            if len(piece.input_ids) <= space:
                return place
        for place, (_, piece) in enumerate(self._pending):
            if piece.cut_at(space) >= MIN_CUT:
                return place
        return None

    def state(self) -> dict:
        """Return a JSON-able copy of the state."""
        return {
            "rows": self._rows,
            "cursors": [_ints(cursor) for cursor in self._cursors],
            "pending": [_ints(pending) for pending, _ in self._pending],
            "skipped": dict(self._skipped),
            "skipped_names": list(self._skipped_names),
            "skipped_documents": [list(position) for position in self._skipped_documents],
        }

    def _restore(self, state: dict) -> None:
        self._rows = state["rows"]
        before = [Cursor(*ints) for ints in state["cursors"]]
        self._cursors[: len(before)] = before  # the rest are of sources that were appended since
        self._skipped.update(state["skipped"])
        self._skipped_names = list(state["skipped_names"])
        # Earlier versions kept none: their documents count when they are met again.
        self._skipped_documents = dict.fromkeys(map(tuple, state.get("skipped_documents", [])))
        pendings = [Pending(*ints) for ints in state["pending"]]
        for pending in pendings:
            if self.sources[pending.source].read_ahead:
                self.sources[pending.source].prefetch(self.number, pending.shard, pending.record)
        for pending in pendings:
            if (piece := self._read(pending)) is not None:
                self._pending.append((pending, piece.split(pending.cut)[1] if pending.cut else piece))

    def _weights_at(self, step: int) -> list[float]:
        weights = [source.config.weight_at(step) for source in self.sources]
        total = sum_in_order(weights)
        return [weight / total for weight in weights]

    def _settle_accounts(self) -> None:
        """Begin the accounts anew where weights change, each source keeping what it is ahead or behind."""
        accounts = [cursor.tokens + phase for cursor, phase in zip(self._cursors, self._phases, strict=True)]
        going = [n for n, weight in enumerate(self._weights) if weight and not self._has_ended(n)]
        total, weights = (sum_in_order(values[n] for n in going) for values in (accounts, self._weights))
        for number, (cursor, phase) in enumerate(zip(self._cursors, self._phases, strict=True)):
            owed = total * self._weights[number] / weights - accounts[number] if number in going else 0.0
            cursor.tokens = round(-owed - phase)

    def _has_ended(self, number: int) -> bool:
        source, cursor = self.sources[number], self._cursors[number]
        return not source.config.repeat and source.position(cursor.epoch, self.number, cursor.ordinal) is None

    def _ratio(self, number: int) -> float:
        """Return how far a source is with its share: tokens drawn by weight."""
        return (self._cursors[number].tokens + self._phases[number]) / self._weights[number]

    def _refill(self) -> None:
        while len(self._pending) < self.settings.look_ahead and (drawn := self._draw()) is not None:
            self._pending.append(drawn)

    def _draw(self) -> tuple[Pending, Piece] | None:
        """Draw the next good document of the source that is furthest behind its share; None when all have ended."""
        left = [number for number, weight in enumerate(self._weights) if weight]
        skipped = 0
        while left:
            number = min(left, key=self._ratio)
            pending = self._advance(number)
            if pending is None:
                left.remove(number)
            elif (piece := self._read(pending)) is not None:
                self._cursors[number].tokens += len(piece)
                return pending, piece
            elif (skipped := skipped + 1) == SKIPS_IN_A_ROW:
                raise ValueError(
                    f"lane {self.number} skipped {skipped} documents in a row ({dict(self._skipped)}), the last was "
                    f"{self._skipped_names[-1]}; restore the data or leave the source out"
                )
        return None

    def _advance(self, number: int) -> Pending | None:
        """Take the next position of a source, through empty ranges into the next epochs if it repeats."""
        source, cursor = self.sources[number], self._cursors[number]
        for _ in range(1000):
            position = source.position(cursor.epoch, self.number, cursor.ordinal)
            if position is not None:
                if source.read_ahead:
                    self._prefetch(source, cursor.epoch, cursor.ordinal + source.read_ahead)
                cursor.ordinal += 1
                return Pending(number, cursor.epoch, *position)
            if not source.config.repeat:
                return None
            cursor.epoch, cursor.ordinal = cursor.epoch + 1, 0
        raise ValueError(
            f"lane {self.number} found no document of {shown(source.manifest.store.root)} in 1000 epochs: "
            f"{source.manifest.records} documents are too few or too long for {self.settings.lanes} lanes"
        )

    def _prefetch(self, source: Source, epoch: int, ordinal: int) -> None:
        if (position := source.position(epoch, self.number, ordinal)) is not None:
            source.prefetch(self.number, *position)

    def _read(self, pending: Pending) -> Piece | None:
        source = self.sources[pending.source]
        try:
            return source.read(self.number, pending.epoch, pending.shard, pending.record)
        except BadRecord as error:
            self._skipped[error.reason] += 1
            self._skipped_names = [*self._skipped_names, str(error)][-NAMES_KEPT:]
            position = pending.source, pending.shard, pending.record
            if position not in self._skipped_documents and position[1:] not in source.too_long:
                log.warning("lane %d skipped %s", self.number, error)
                self._skipped_documents[position] = None
            return None


def lanes_of_rank(rank: int, world_size: int, lanes: int, may_idle: bool = False) -> range:
    """Return the lanes a rank owns; any world size up to the number of lanes, or with ranks that own none."""
    if world_size > lanes and not may_idle:
        raise ValueError(f"{world_size} ranks, but data.lanes={lanes}: use at most one rank a lane, or more lanes")
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


def sum_in_order(values: Iterable[float]) -> float:
    """Add from left to right. `sum` corrects for rounding from Python 3.12 on, and a resume must find the same bits."""
    return reduce(operator.add, values, 0.0)


def _ints(record: Cursor | Pending) -> list[int]:
    return list(vars(record).values())
