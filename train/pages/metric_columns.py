"""The rows of a run's metrics.jsonl as columns: read and parsed once, whatever number of sections looks at them.

A run of 100,000 steps has 10,000 rows of some sixty numbers. As arrays they take little memory, and a chart of one
number touches nothing else. Rejected: a list of rows, which each chart would walk through again.
"""

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.strict_json import loads

CHUNK = 1000  # lines parsed together
LARGEST = 1e300  # of an integer
MOST_STEPS = 1 << 53  # what a float64 holds exactly


class Series(NamedTuple):
    """One number over the run: of the rows that have it, not null; values may be nan or infinite."""

    steps: np.ndarray  # float64 [R]
    values: np.ndarray  # float64 [R]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> "Series":
        known = np.isfinite(self.values)
        return Series(self.steps[known], self.values[known])


NOTHING = Series(np.empty(0), np.empty(0))


class Columns:
    """Numbers by name. `num_rows` counts the rows with a step, `unreadable` the lines that are no JSON object."""

    def __init__(self, path: Path) -> None:
        """Read a file; none is a file without rows."""
        self.num_rows = self.unreadable = 0
        self._parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._series: dict[str, Series] = {}
        self._words: dict[str, list[str]] = {}
        if not path.is_file():
            return
        with path.open("rb") as file:
            while lines := list(islice(file, CHUNK)):
                rows, unreadable = _parse(lines)
                self.unreadable += unreadable
                self._add([row for row in rows if type(step := row.get("step")) is int and 0 <= step <= MOST_STEPS])

    def _add(self, rows: list[dict[str, Any]]) -> None:
        self.num_rows += len(rows)
        steps = np.array([row["step"] for row in rows], dtype=np.float64)
        for name in dict.fromkeys(name for row in rows for name in row):
            found = [row.get(name) for row in rows]
            try:
                values = np.array(found, dtype=np.float64)  # null becomes nan
                if values.ndim > 1:
                    raise TypeError("lists of equal lengths")
            except (ValueError, TypeError, OverflowError):  # some are no numbers
                self._words.setdefault(name, []).extend(value for value in found if isinstance(value, str))
                found = [value if isinstance(value, float) or type(value) is int else None for value in found]
                found = [value if value is None or abs(value) < LARGEST or value != value else None for value in found]
                values = np.array(found, dtype=np.float64)
            if None in found:
                there = np.array([value is not None for value in found])
                if not there.any():
                    continue
                self._parts.setdefault(name, []).append((steps[there], values[there]))
            else:
                self._parts.setdefault(name, []).append((steps, values))

    @property
    def names(self) -> list[str]:
        """Return the names of all numbers, in the order in which they first appeared."""
        return list(self._parts)

    def matching(self, pattern: str) -> dict[str, str]:
        """Return the names that match a regular expression, by the text of its group."""
        found = [re.fullmatch(pattern, name) for name in self._parts]
        return {match[1]: match[0] for match in found if match}

    def __getitem__(self, name: str) -> Series:
        """Return a series, empty if no row has it."""
        if name not in self._series:
            parts = self._parts.get(name)
            self._series[name] = Series(*map(np.concatenate, zip(*parts, strict=True))) if parts else NOTHING
        return self._series[name]

    def rows(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return the rows again, one a step, of some numbers alone."""
        found: dict[int, dict[str, Any]] = {}
        for name in names:
            for step, value in zip(self[name].steps.astype(int).tolist(), self[name].values.tolist(), strict=True):
                found.setdefault(step, {"step": step})[name] = value
        return [found[step] for step in sorted(found)]

    def words(self, name: str) -> list[str]:
        """Return the texts that rows have under a name."""
        return self._words.get(name, [])

    def last(self, name: str) -> float | None:
        """Return the newest finite value, None without one."""
        series = self[name].finite
        return float(series.values[-1]) if len(series) else None


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON objects of a file and its number of unreadable lines; none where there is no file."""
    return _parse(path.read_bytes().splitlines() if path.is_file() else [])


def _parse(lines: list[bytes]) -> tuple[list[dict[str, Any]], int]:
    try:
        rows = loads(b"[" + b",".join(lines) + b"]")  # one call is faster than one a line
    except (ValueError, RecursionError):
        rows = []
    if len(rows) != len(lines):
        rows = [_parsed(line) for line in lines]
    objects = [row for row in rows if isinstance(row, dict)]
    return objects, len(lines) - len(objects)


def _parsed(line: bytes) -> Any:
    try:
        return loads(line)
    except (ValueError, RecursionError):
        return None
