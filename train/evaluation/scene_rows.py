"""Rows that train.scenes writes, edits or questions about pictures: read as encoding reads them, and their scores."""

from collections.abc import Callable, Iterable, Sequence
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

    Raises ValueError for rows that train.scenes does not write or whose pictures are missing, FileNotFoundError for a
    folder without any.
    """
    kinds: dict[str, list[T]] = {}
    bad = BadRecords(max_fraction=0.0)
    for name in expand([folder], (".jsonl",), quiet=True):
        for document in read_raw(Path(name), name, bad):
            try:
                for item in items_of(document):
                    kinds.setdefault(item.kind, []).append(item)
            except OTHER_FORM as error:
                raise ValueError(
                    f"{option}={folder}: {document.where} is no row of train.scenes ({type(error).__name__}: {error}); "
                    f"expected what its num_{option} or num_heldout_{option} writes"
                ) from None
    bad.check(final=True)
    counts = {kind: min(per_kind, len(items)) for kind, items in kinds.items()}
    return [items[i * len(items) // counts[kind]] for kind, items in kinds.items() for i in range(counts[kind])]


def shares(option: str, items: Sequence[Item], right: Sequence[bool]) -> dict[str, Score]:
    """Return the shares of right items, `OPTION/all` and `OPTION/KIND`."""
    found: dict[str, list[bool]] = {"all": [*right]}
    for item, is_right in zip(items, right, strict=True):
        found.setdefault(item.kind, []).append(is_right)
    return {f"{option}/{name}": share(sum(of), len(of)) for name, of in found.items()}
