"""Mutated files through every reader, each case under limits: `python -m tests.fuzz SEED [COUNT]` replays.

A process of its own, so that a hang, a crash or a huge allocation ends a case and not the test run. It prints a JSON
object before each case, one for each failure and a last one that counts; tests/test_fuzz.py starts it and reads them.
"""

import io
import json
import logging
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.documents import document_sizes
from data.layout import Piece
from data.manifest import Manifest, shard_entry
from data.pictures import decode_picture
from data.shard_index import ShardIndex, index_path
from data.shards import BadRecords, index_shard
from tests import mutations, raw_files
from tests.damage import Mutation
from tests.fuzz_limits import check, limits
from tests.fuzz_readers import SIZES, Readers, raised_by_us, suppress_bad


class Cases(Readers):
    """What must hold of mutated files, and the cases of the seeds."""

    def through_shard(self, name: str, mutation: Mutation) -> None:
        path, number, whole = self.encoded / name, sorted(self.shards).index(name), self.documents[name]
        before = self.reasons.total()
        found = self._from_shard(path)
        self._compare(found, whole, mutation, self.reasons.total() > before)
        self._by_old_index(path, number)
        self._read_lanes(self.data)  # damaged after the start
        self._start()
        bad = BadRecords(1.0)
        index = index_shard(path, document_sizes, bad)
        self._count(bad, len(index))
        buffer = io.BytesIO()
        np.savez(buffer, **vars(index))
        again = ShardIndex.parse(buffer.getvalue(), "here", zlib.crc32(buffer.getvalue()))
        check(all(np.array_equal(array, vars(again)[name]) for name, array in vars(index).items()), "index")
        check(self._from_index(path, index) == found, "by an index of its own a shard is another")
        if len(index):
            self._vouch(path, buffer.getvalue(), index)
            self._start(other_documents=True)

    def _compare(self, found: dict[str, list], whole: dict[str, list], mutation: Mutation, are_counted: bool) -> None:
        """Check what came without an index against what the whole file gives."""
        touched = mutation.touched
        for key, documents in found.items():
            check(key not in mutation.refused, f"{key} passed, and must not")
            is_known = all(document in whole.get(key, []) for document in documents)
            check(is_known or touched is None or key in touched, f"{key} passed as what it never was")
        if touched is not None:
            lost = set(whole) - set(found) - touched - mutation.dropped
            check(not lost or are_counted, f"{lost} neither passed nor are counted")

    def _by_old_index(self, path: Path, number: int) -> None:
        """By its old index every byte of a mutated shard is the old one, or an error."""
        whole = self.documents[path.name]
        for key, documents in self._from_index(path, ShardIndex.parse(self.files[path.name + ".idx"], "here")).items():
            check(documents == whole.get(key), f"{key} passed its checksum as what it never was")
        for (shard, record), piece in self.pieces.items():
            if shard == number:
                with suppress_bad(self):
                    found = self.data.sources[0].read(0, 0, shard, record)
                    check(equal(found, piece), f"record {record} passed its checksum as what it never was")

    def _vouch(self, path: Path, index_bytes: bytes, index: ShardIndex | None = None) -> None:
        """Write an index next to a shard, and its checksum into the manifest: a data set with a hostile maker."""
        with self.watch.off():
            index_path(path).write_bytes(index_bytes)
            manifest = Manifest.load(self.encoded)
            old = next(entry for entry in manifest.shards if entry.name == path.name)
            new = replace(old, index_crc32=zlib.crc32(index_bytes)) if index is None else shard_entry(path, index)
            replace(manifest, shards=tuple(new if entry is old else entry for entry in manifest.shards)).save()

    def through_index(self, name: str, mutation: Mutation) -> None:
        shard = self.encoded / name.removesuffix(".idx")
        with suppress_bad(self):
            ShardIndex.parse(mutation.data, "here", zlib.crc32(self.files[name]))
            check(mutation.data == self.files[name], "another index passed its checksum")
        self._start()
        with suppress_bad(self):
            index = ShardIndex.parse(mutation.data, "here")
            lengths = index.document_tokens(2)
            check(len(lengths) == len(index) and (lengths >= 2).all(), "document_tokens")
            for key, documents in self._from_index(shard, index).items():
                is_known = all(document in self.documents[shard.name].get(key, []) for document in documents)
                check(is_known, f"{key} passed as what it never was")
        self._vouch(shard, mutation.data)
        self._start()

    def through_manifest(self, _: str, __: Mutation) -> None:
        try:
            Manifest.load(self.encoded)
        except (ValueError, FileNotFoundError) as error:
            check(str(self.encoded) in str(error) and raised_by_us(error), f"no refusal of ours: {error!r}")
        self._start()

    def through_raw(self, name: str, mutation: Mutation) -> None:
        before = self.reasons.total()
        found = self._from_raw(self.raw / name)
        whole = self.raw_documents if name == "raw.tar" else self.line_documents
        self._compare(found, whole, mutation, self.reasons.total() > before)

    def through_the_rest(self, data: bytes) -> None:
        """Give a file to the readers of all other kinds."""
        with suppress_bad(self):
            ShardIndex.parse(data, "here")
        with suppress_bad(self):
            decode_picture(data, SIZES, "here")
        if len(data) > 1 << 20:
            return
        for name in ("x.tar", "x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.txt", "manifest.json"):
            with self.watch.off():
                (self.raw / name).write_bytes(data)
            if name != "manifest.json":
                self._from_raw(self.raw / name)
        with suppress(FileNotFoundError, ValueError):
            Manifest.load(self.raw)

    # ---- cases ----

    def case(self, seed: int) -> tuple[str, Mutation, Callable[[str, Mutation], None]]:
        """Return the case of a seed: which file, how it is mutated and who reads it."""
        rng = random.Random(seed)
        kind = rng.choice(["shard"] * 10 + ["raw"] * 6 + ["index"] * 4 + ["manifest"] * 3 + ["lines"] * 3)
        if kind == "shard":
            name, other = rng.sample(sorted(self.shards), 2)
            mutate = rng.choice(mutations.SHARD_MUTATIONS)
            return name, mutate(rng, self.shards[name], self.shards[other]), self.through_shard
        if kind == "raw":
            mutation = rng.choice(mutations.RAW_MUTATIONS)(rng, self.raw_shard, self.shards["00000.tar"])
            return "raw.tar", mutation, self.through_raw
        if kind == "index":
            name = f"{rng.choice(sorted(self.shards))}.idx"
            return name, rng.choice(mutations.INDEX_MUTATIONS)(rng, self.files[name]), self.through_index
        if kind == "manifest":
            return "manifest.json", mutations.damaged_json(rng, self.files["manifest.json"]), self.through_manifest
        suffix, pack = rng.choice([(".gz", raw_files.gz), (".zst", raw_files.zst), ("", raw_files.plain)])
        return f"lines.jsonl{suffix}", raw_files.hostile_lines(rng, self.lines, pack), self.through_raw

    def run(self, seed: int) -> str | None:
        """Run the case of a seed; return what went wrong, None if nothing did."""
        name, mutation, through = self.case(seed)
        print(json.dumps({"seed": seed, "what": f"{name}: {mutation.what}"}), flush=True)
        ((self.encoded if name in self.files else self.raw) / name).write_bytes(mutation.data)
        self.watch.is_on, self.watch.seen = True, []
        try:
            with limits():
                through(name, mutation)
                self.through_the_rest(mutation.data)
            check(not self.watch.seen, f"a reader did {self.watch.seen}")
            found = {path.name for folder in (self.folder, Path()) for path in folder.iterdir()}
            check(found == {"encoded", "raw", "here", "t.model"}, f"files appeared: {found}")
        except BaseException:
            return traceback.format_exc(limit=-6)
        finally:
            self.watch.is_on = False
            self._clean()
        return None


def equal(a: Piece, b: Piece) -> bool:
    """Whether two documents are the same, to the bit."""
    images = [[image.segment.array.tobytes() for image in piece.images] for piece in (a, b)]
    return np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels) and images[0] == images[1]


def main(first: int, count: int) -> None:
    """Run the cases of the seeds from `first` on, and print what comes of them."""
    sys.dont_write_bytecode = True
    logging.disable()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "here").mkdir()
        os.chdir(folder / "here")
        readers = Cases(folder)
        sys.addaudithook(readers.watch.audit)
        slowest = (0.0, first)
        for seed in range(first, first + count):
            begun = time.process_time()
            if (wrong := readers.run(seed)) is not None:
                print(json.dumps({"seed": seed, "wrong": wrong}), flush=True)
            slowest = max(slowest, (round(time.process_time() - begun, 2), seed))
        os.chdir("/")
    print(json.dumps({"reasons": readers.reasons, "passed": readers.passed, "slowest": slowest}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int((sys.argv[2:] or ["1"])[0]))
