"""What all ranks of a run must have in common, as names and short values, and the message that reports a difference.

Compared are every setting, the source code, the versions of torch and numpy, and the contents of the data (P10). A rank
may have its own device number, its own paths to the same contents, and its own settings of how (not what) it reads:
each program lists those keys. Rejected: comparing one digest, which says that ranks differ but not in what.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.nested import leaves

MAX_VALUE_LENGTH = 100  # characters


def facts_of(config: Any, own: Collection[str] = ()) -> dict[str, str]:
    """Return a config dataclass as names and values, except for the keys (or patterns) in which ranks may differ."""
    settings = leaves(dataclasses.asdict(config))
    return {key: str(value) for key, value in settings if not any(fnmatchcase(key, pattern) for pattern in own)}


def program_facts() -> dict[str, str]:
    """Return what identifies this version of the program: a digest of its sources, and its libraries' versions."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in ("data", "model", "train") for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    versions = {"torch": torch.__version__.partition("+")[0], "numpy": np.__version__}
    return {"code of data/, model/, train/": digest.hexdigest()[:12], **versions}


def difference(facts_by_rank: Mapping[int, Mapping[str, str]]) -> str | None:
    """Return one sentence naming what differs, the values and the ranks; None if all ranks agree."""
    differences = []
    for name in dict.fromkeys(name for facts in facts_by_rank.values() for name in facts):
        by_value: dict[str, list[int]] = {}
        for rank, facts in facts_by_rank.items():
            by_value.setdefault(facts.get(name, "nothing"), []).append(rank)
        if len(by_value) > 1:
            values = (f"{_shorten(value)} on {_list_ranks(ranks)}" for value, ranks in by_value.items())
            differences.append(f"{name} is {', '.join(values)}")
    if not differences:
        return None
    return f"the ranks disagree: {first_few(differences)}. Start all ranks with the same command, code and data"


def first_few(items: Sequence[str], separator: str = "; ", most: int = 8) -> str:
    """Return the items for a message: `most` of them, and how many more there are."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def _shorten(value: str) -> str:
    if len(value) <= MAX_VALUE_LENGTH:
        return value
    return f"{value[:MAX_VALUE_LENGTH]}... ({hashlib.sha256(value.encode()).hexdigest()[:8]})"


def _list_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{' ...' * (len(ranks) > 8)}"
