"""Rows that train.scenes writes, edits or questions about pictures, read for an evaluation."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from data.inputs import expand
from data.pictures import decode_picture
from train.evaluation.texts import OTHER_FORM, read_lines


class Item(Protocol):
    """One edit or question."""

    @property
    def kind(self) -> str: ...

    @property
    def pictures(self) -> tuple[Path, ...]: ...


T = TypeVar("T", bound=Item)
Row = dict[str, Any]


def read_items(option: str, folder: str, per_kind: int, items_of: Callable[[Row, Path], Iterable[T]]) -> list[T]:
    """Read at most `per_kind` items of each kind, evenly spaced, from a folder's .jsonl.

    `items_of` makes items of a row and of the folder that its pictures' names start from. Raises ValueError for rows
    that train.scenes does not write, for none, and for missing pictures, FileNotFoundError for a folder without a file.
    """
    kinds: dict[str, list[T]] = {}
    for name in expand([folder], (".jsonl",), quiet=True):
        for number, line in read_lines(Path(name)):
            try:
                for item in items_of(json.loads(line), Path(name).parent):
                    kinds.setdefault(item.kind, []).append(item)
            except OTHER_FORM as error:
                raise ValueError(
                    f"{option}={folder}: {name}:{number} is no row of train.scenes ({type(error).__name__}: {error}); "
                    f"expected what its num_{option} or num_heldout_{option} writes"
                ) from None
    if not kinds:
        raise ValueError(f"{option}={folder}: holds no {option}; expected what train.scenes writes with num_{option}")
    counts = {kind: min(per_kind, len(items)) for kind, items in kinds.items()}
    chosen = [items[i * len(items) // counts[kind]] for kind, items in kinds.items() for i in range(counts[kind])]
    if missing := [path for item in chosen for path in item.pictures if not path.is_file()]:
        raise ValueError(
            f"{option}={folder}: {len(missing)} pictures are missing, such as {missing[0]}; expected those that its "
            "rows name"
        )
    return chosen


def read_picture(path: Path, resolution: int) -> np.ndarray:
    """Return a picture file's pixels, uint8 [resolution, resolution, 3]; raise ValueError where there are none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); expected the picture that its row names"
        ) from None
    return decode_picture(data, [(resolution, resolution)], str(path))
