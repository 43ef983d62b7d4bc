"""What train.view prints: facts, remarks and aligned tables, or the same as JSON.

Values are formatted here and nowhere else. Texts come from a data set or a checkpoint, so control characters are
escaped: they could rewrite the terminal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.bad_records import printable

Value = str | int | float | None


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Value]]

    def text(self) -> str:
        """Return aligned lines: columns of numbers to the right, others to the left."""
        columns = []
        for name, *values in zip(self.head, *self.rows, strict=True):
            cells = [name, *map(formatted, values)]
            side = "<" if any(isinstance(value, str) for value in values) else ">"
            columns.append([f"{cell:{side}{max(map(len, cells))}}" for cell in cells])
        return "\n".join([self.title, *("  ".join(line).rstrip() for line in zip(*columns, strict=True))])

    def records(self) -> list[dict[str, Value]]:
        return [dict(zip(self.head, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class View:
    """What there is to say of a data set or of checkpoints."""

    facts: Mapping[str, Value]
    remarks: list[str]  # what is damaged, missing or left out
    tables: list[Table]
    pictures: list[tuple[np.ndarray, str]] = field(default_factory=list)  # uint8 [H, W, 3] with its caption
    damaged: bool = False  # a checkpoint did not verify

    def text(self) -> str:
        width = max(map(len, self.facts))
        facts = [f"{name:<{width}}  {formatted(value)}" for name, value in self.facts.items()]
        remarks = [f"view: {formatted(remark)}" for remark in self.remarks]
        return "\n".join([*facts, *remarks, *(f"\n{table.text()}" for table in self.tables)])

    def record(self) -> dict[str, Any]:
        tables = {table.title: table.records() for table in self.tables}
        return {"facts": self.facts, "remarks": self.remarks, "tables": tables}


def formatted(value: Value) -> str:
    """Return a value as people read it, on one line."""
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return printable(" ".join((value or "").split()))
