"""A lane: an endless, deterministic stream of packed sequences, mixed from all sources.

Step s of lane l is the same sequence on any rank, so elasticity, determinism and resume are one thing:
assigning lanes to ranks. A lane continues from its state (data/lane_state.py) and reads only what is pending.
Rejected: replay on resume, whose cost grows with the run.
"""

import itertools
import logging
from collections import Counter
from dataclasses import replace

from data.documents import uniforms
from data.lane_state import Cursor, LaneState, Pending, Position
from data.layout import Piece
from data.packing import PackedSequence, pack
from data.remote import shown
from data.shards import BadRecord
from data.source import LaneSettings, Source, sum_in_order

MIN_CUT = 8  # tokens: a shorter piece of a cut text teaches nothing and costs a document border
NAMES_KEPT = 4  # names of skipped documents in a lane's state; the log has them all
SKIPS_IN_A_ROW = 1000  # documents: a lane that skips this many has nothing left to read and would search for ever

log = logging.getLogger(__name__)


class Lane:
    """One lane: `next_row()` packs its next sequence, `state()` is all that is needed to continue after it."""

    def __init__(self, number: int, sources: list[Source], settings: LaneSettings, state: LaneState | None = None):
        self.number, self.sources, self.settings = number, sources, settings
        # A phase of up to one sequence, so that lanes do not all begin with the same source. Drawn per source, so that
        # appending one changes nothing for the others.
        phases = [uniforms("mix", settings.seed, number, source.number, count=1)[0] for source in sources]
        self._phases = [phase * settings.sequence_length for phase in phases]
        self.documents: list[Position] = []  # in the last row
        state = state or LaneState()
        self._rows = state.rows  # packed so far: the next one belongs to step `_rows + 1`
        self._cursors = [replace(cursor) for cursor in state.cursors]
        self._cursors += [Cursor() for _ in sources[len(state.cursors) :]]  # appended since
        self._skipped = Counter(state.skipped)
        self._skipped_names = list(state.skipped_names)
        self._skipped_documents = dict.fromkeys(state.skipped_documents)  # a set that keeps their order
        for pending in state.pending:
            if sources[pending.source].read_ahead:
                sources[pending.source].prefetch(number, pending.shard, pending.record)
        self._pending: list[tuple[Pending, Piece]] = []
        for pending in state.pending:
            if (piece := self._read(pending)) is not None:
                self._pending.append((pending, piece.split(pending.cut)[1] if pending.cut else piece))
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
        chosen: list[Piece] = []
        space = self.settings.sequence_length
        while space:
            while len(self._pending) < self.settings.look_ahead and (drawn := self._draw()) is not None:
                self._pending.append(drawn)
            # The oldest document opens a row whatever its length, so that a long text is not passed over for ever.
            place = self._place_in(space) if chosen else 0
            if place is None or not self._pending:
                break
            pending, piece = self._pending.pop(place)
            if len(piece) > space:
                cut = piece.cut_at(space)
                piece, rest = piece.split(cut)
                self._pending.insert(place, (replace(pending, cut=pending.cut + cut), rest))
            chosen.append(piece)
            self.documents.append(pending.position)
            space -= len(piece)
        return pack(chosen, self.settings.sequence_length, self.settings.special.pad) if chosen else None

    def _place_in(self, space: int) -> int | None:
        """Return which pending document comes next: the oldest that fits, else the oldest that may be cut to fit."""
        pieces = [piece for _, piece in self._pending]
        fitting = (place for place, piece in enumerate(pieces) if len(piece) <= space)
        cuttable = (place for place, piece in enumerate(pieces) if piece.cut_at(space) >= MIN_CUT)
        return next(itertools.chain(fitting, cuttable), None)

    def state(self) -> LaneState:
        """Return a copy of the state."""
        return LaneState(
            rows=self._rows,
            cursors=[replace(cursor) for cursor in self._cursors],
            pending=[pending for pending, _ in self._pending],
            skipped=dict(self._skipped),
            skipped_names=list(self._skipped_names),
            skipped_documents=list(self._skipped_documents),
        )

    def _weights_at(self, step: int) -> list[float]:
        weights = [source.config.weight_at(step) for source in self.sources]
        total = sum_in_order(weights)
        return [weight / total for weight in weights]

    def _settle_accounts(self) -> None:
        """Restart the accounts when weights change; each source keeps its lead or lag."""
        accounts = [cursor.tokens + phase for cursor, phase in zip(self._cursors, self._phases, strict=True)]
        active = [n for n, weight in enumerate(self._weights) if weight and not self._has_ended(n)]
        total, weights = (sum_in_order(values[n] for n in active) for values in (accounts, self._weights))
        for number, (cursor, phase) in enumerate(zip(self._cursors, self._phases, strict=True)):
            lag = total * self._weights[number] / weights - accounts[number] if number in active else 0.0
            cursor.tokens = round(-lag - phase)

    def _has_ended(self, number: int) -> bool:
        source, cursor = self.sources[number], self._cursors[number]
        return not source.config.repeat and source.position(cursor.epoch, self.number, cursor.ordinal) is None

    def _ratio(self, number: int) -> float:
        """Return how much of its share a source has had: tokens drawn over weight."""
        return (self._cursors[number].tokens + self._phases[number]) / self._weights[number]

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
        """Take the next position of a source; one that repeats skips epochs in which the lane's range is empty."""
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
            position = pending.position
            if position not in self._skipped_documents and position[1:] not in source.too_long:
                log.warning("lane %d skipped %s", self.number, error)
                self._skipped_documents[position] = None
            return None


def lanes_of_rank(rank: int, world_size: int, lanes: int, may_idle: bool = False) -> range:
    """Return the lanes that a rank owns, nearly as many as any other; with `may_idle` some ranks may own none."""
    if world_size > lanes and not may_idle:
        raise ValueError(f"{world_size} ranks, but data.lanes={lanes}: use at most one rank a lane, or more lanes")
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)
