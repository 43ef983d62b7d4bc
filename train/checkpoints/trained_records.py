"""Which records a model was trained on, by their keys, so that held-out data is refused if it is among them (P10).

A key is a hash of a record's contents, independent of the file it was encoded from; data indexed before such keys has
crc32 and length instead, which recognise only records of the same name. A run looks for the held-out keys among all of
its own. A checkpoint stores the keys, of more than SAMPLE records only those below a bound, so that the model can be
evaluated where its training data is missing. A million records cost 0.3 CPU-seconds and 60 MB of indices at the start
of a run, split over its ranks.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from data.manifest import Manifest
from data.shards import BadRecord, content_key, read_at
from train.console import say
from train.distributed.ranks import Ranks

T = TypeVar("T")

TRAINED_FILE = "trained.keys"  # in checkpoints and exports
SAMPLE = 1 << 20  # keys that a checkpoint stores, about: 8 MiB
SHARED = 0.01  # share of held-out documents that may be training data: texts repeat, and 32-bit sums collide
EVERY_KEY = (1 << 64) - 1
THREADS = 16  # that read indices


@dataclass(frozen=True)
class TrainedRecords:
    """`keys` uint64, sorted: those of all records trained on that are at most `bound`."""

    keys: np.ndarray
    bound: int = EVERY_KEY

    @classmethod
    def read(cls, sources: Iterable[Manifest], heldout: dict[str, str], ranks: Ranks) -> "TrainedRecords":
        """Return what a run's checkpoints store of its records. Collective.

        Raises ValueError naming a folder of `heldout` that holds training records.
        """
        sources, held = list(sources), _read_heldout(heldout, ranks)
        records = sum(manifest.records for manifest in sources)
        bound = EVERY_KEY if records <= SAMPLE else EVERY_KEY * SAMPLE // records
        asked = _sorted(keys.ravel() for keys in held.values())

        def read(manifest: Manifest, shard: int) -> tuple[np.ndarray, np.ndarray]:
            keys = manifest.load_index(shard).keys
            place = np.searchsorted(asked, keys)  # three times as fast as isin, which sorts both again
            return keys[keys <= np.uint64(bound)], keys[np.append(asked, np.uint64(0))[place] == keys]

        parts = _over_shards(read, sources, ranks)
        stored, found = (_sorted(part[i] for part in parts) for i in (0, 1))
        cls(found)._refuse_shared(held, heldout, ranks)
        return cls(stored, bound)

    def __or__(self, other: "TrainedRecords") -> "TrainedRecords":
        bound = min(self.bound, other.bound)
        return TrainedRecords(_sorted(keys[keys <= np.uint64(bound)] for keys in (self.keys, other.keys)), bound)

    def check(self, heldout: dict[str, str], ranks: Ranks) -> None:
        """Raise ValueError naming a folder of `heldout` that holds records trained on. Collective."""
        self._refuse_shared(_read_heldout(heldout, ranks), heldout, ranks)

    def _refuse_shared(self, held: dict[str, np.ndarray], folders: dict[str, str], ranks: Ranks) -> None:
        for name, keys in held.items():
            covered = keys <= np.uint64(self.bound)
            shared = covered & np.isin(keys, self.keys)
            # A training record has one of a held-out record's two keys: hash or sum.
            share = (shared.sum(0) / np.maximum(covered.sum(0), 1)).sum()
            if share > SHARED:
                raise ValueError(
                    f"held-out source {name}: {100 * min(share, 1):.0f} % of the documents in {folders[name]} are "
                    f"training data too, such as document {int(shared.any(1).argmax())}; expected none (by chance at "
                    f"most {100 * SHARED:.0f} %): name data that the run does not train on"
                )
            if share and ranks.is_first:
                say(f"held-out source {name}: {100 * share:.2g} % of its documents are training data too, by chance")

    def to_bytes(self) -> bytes:
        return np.concatenate([np.array([self.bound], "<u8"), self.keys.astype("<u8")]).tobytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> "TrainedRecords":
        """Parse what `to_bytes` wrote; raise ValueError for anything else."""
        numbers = np.frombuffer(content, dtype="<u8")
        if not len(numbers) or (numbers[2:] < numbers[1:-1]).any():
            raise ValueError(f"{TRAINED_FILE}: expected a bound and sorted keys; write it again from the run")
        return cls(numbers[1:], int(numbers[0]))


def _sorted(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Return the distinct keys, sorted; ten times as fast as np.unique."""
    keys = np.sort(np.concatenate([np.zeros(0, np.uint64), *parts]))
    return keys[np.append(True, keys[1:] != keys[:-1])[: len(keys)]]


def _read_heldout(folders: dict[str, str], ranks: Ranks) -> dict[str, np.ndarray]:
    """Return uint64 [R, 2] of each folder: every record's key by contents and by crc32 and length. Collective."""

    def read(manifest: Manifest, shard: int) -> np.ndarray:
        index, name = manifest.load_index(shard), manifest.shards[shard].name
        contents = index.contents
        if contents is None:  # an older index: held-out data is small enough to read
            read_bytes = partial(manifest.store.read, name)
            keys = [content_key(read_at(read_bytes, span, f"{name}#{i}")) for i, span in enumerate(index.spans)]
            contents = np.array(keys, dtype=np.uint64)
        return np.stack([contents, index.sums], axis=1)

    return {
        name: np.concatenate([np.zeros((0, 2), np.uint64), *_over_shards(read, [Manifest.load(folder)], ranks)])
        for name, folder in folders.items()
    }


def _over_shards(read: Callable[[Manifest, int], T], sources: Iterable[Manifest], ranks: Ranks) -> list[T]:
    """Return `read(manifest, shard)` of every shard, in order; each rank reads its share. Collective.

    A shard that cannot be read is named and left out: training may skip it too.
    """
    shards = [(manifest, shard) for manifest in sources for shard in range(len(manifest.shards))]

    def attempt(place: tuple[Manifest, int]) -> T | None:
        try:
            return read(*place)
        except (BadRecord, OSError) as error:
            say(f"no held-out data is compared with {place[0].shard_path(place[1])}: {error}")
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        parts = ranks.gather(list(pool.map(attempt, shards[ranks.rank :: ranks.world_size])))
    return [part for i in range(len(shards)) if (part := parts[i % len(parts)][i // len(parts)]) is not None]
