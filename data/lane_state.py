"""The state of a lane: a few ints a source and the positions of pending documents, never contents.

It travels with each batch and is saved by lane in a checkpoint's lanes.json, so it does not depend on ranks or workers.
"""

from dataclasses import astuple, dataclass, field
from typing import Any

Position = tuple[int, int, int]  # (source, shard, record) of a document


@dataclass
class Cursor:
    """Where a lane stands in one source."""

    epoch: int = 0
    ordinal: int = 0  # next document of the lane's range
    tokens: int = 0  # drawn since the weights last changed: the running account that holds the mix


@dataclass(frozen=True)
class Pending:
    """A document that was drawn and is not used up: its position, and how many of its tokens are used."""

    source: int
    epoch: int
    shard: int
    record: int
    cut: int = 0

    @property
    def position(self) -> Position:
        return self.source, self.shard, self.record


@dataclass(frozen=True)
class LaneState:
    rows: int = 0  # sequences made so far
    cursors: list[Cursor] = field(default_factory=list)  # by source
    pending: list[Pending] = field(default_factory=list)  # oldest first
    skipped: dict[str, int] = field(default_factory=dict)  # documents by reason, counted whenever one is met
    skipped_names: list[str] = field(default_factory=list)  # the last few
    skipped_documents: list[Position] = field(default_factory=list)  # each once, in the order in which they were met

    def to_json(self) -> dict[str, Any]:
        """Return what lanes.json holds of a lane."""
        records = {name: [list(astuple(each)) for each in getattr(self, name)] for name in ("cursors", "pending")}
        return {**vars(self), **records}

    @classmethod
    def from_json(cls, value: Any) -> "LaneState":
        """Return the state that `to_json` gave; raise ValueError for anything else."""
        try:
            state = cls(
                rows=value["rows"],
                cursors=[Cursor(*ints) for ints in value["cursors"]],
                pending=[Pending(*ints) for ints in value["pending"]],
                skipped=dict(value["skipped"]),
                skipped_names=list(value["skipped_names"]),
                # Absent in older checkpoints: their skipped documents are counted when met again.
                skipped_documents=[(s, shard, record) for s, shard, record in value.get("skipped_documents", [])],
            )
            places = [*map(astuple, state.cursors), *map(astuple, state.pending), *state.skipped_documents]
            numbers = [state.rows, *state.skipped.values(), *(number for place in places for number in place)]
            if wrong := [number for number in numbers if type(number) is not int]:
                raise TypeError(f"{wrong[0]!r}, expected a whole number")
            if not all(isinstance(name, str) for name in state.skipped_names):
                raise TypeError("skipped_names, expected strings")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not the state of a lane ({type(error).__name__}: {error}); it is damaged") from None
        return state
