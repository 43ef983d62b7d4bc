"""Rows that train.scenes writes, edits or questions about pictures: read as encoding reads them, and their scores."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from data.inputs import expand
from data.raw import read_raw
from data.raw_document import RawDocument
from data.shards import BadRecords
from train.evaluation.scores import Score, share
from train.evaluation.texts import OTHER_FORM


class Item(Protocol):
    """One edit or question."""

    @property
    def kind(self) -> str: ...


T = TypeVar("T", bound=Item)


def read_items(option: str, folder: str, per_kind: int, items_of: Callable[[RawDocument], Iterable[T]]) -> list[T]:
    """Read at most `per_kind` items of each kind, evenly spaced, from a folder's .jsonl.

    Raises ValueError for rows that train.scenes does not write or whose pictures are missing, and for none;
    FileNotFoundError for a folder without a file.
    """
    kinds: dict[str, list[T]] = {}
    try:
        for item in _items_in(folder, items_of):
            kinds.setdefault(item.kind, []).append(item)
    except (FileNotFoundError, PermissionError) as error:
        raise type(error)(f"{option}={folder}: {error}") from None
    except ValueError as error:
        expectation = f"expected what num_{option} or num_heldout_{option} of train.scenes writes"
        raise ValueError(f"{option}={folder}: {error}; {expectation}") from None
    counts = {kind: min(per_kind, len(items)) for kind, items in kinds.items()}
    return [items[i * len(items) // counts[kind]] for kind, items in kinds.items() for i in range(counts[kind])]


def _items_in(folder: str, items_of: Callable[[RawDocument], Iterable[T]]) -> Iterator[T]:
    bad = BadRecords(max_fraction=0.0, options=False)
    for name in expand([folder], (".jsonl",), quiet=True):
        for document in read_raw(Path(name), name, bad):
            try:
                items = [*items_of(document)]
            except OTHER_FORM as error:
                found = f"{document.where} is no row of train.scenes ({type(error).__name__}: {error})"
                raise ValueError(found) from None
            yield from items
    bad.check(final=True)


def shares(option: str, items: Sequence[Item], right: Sequence[bool]) -> dict[str, Score]:
    """Return the shares of right items, `OPTION/all` and `OPTION/KIND`."""
    found: dict[str, list[bool]] = {"all": [*right]}
    for item, is_right in zip(items, right, strict=True):
        found.setdefault(item.kind, []).append(is_right)
    return {f"{option}/{name}": share(sum(of), len(of)) for name, of in found.items()}
