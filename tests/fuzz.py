"""Mutated files through every reader, each case under limits: `python -m tests.fuzz SEED [COUNT]` replays.

A process of its own, so that a hang, a crash or a huge allocation ends a case and not the test run. It prints a JSON
object before each case, one for each failure and a last one that counts; tests/test_fuzz.py starts it and reads them.
"""

import io
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import DataSet, open_data
from data.documents import ImageSegment, OrderConfig, check_document, decode_document, document_sizes
from data.lanes import Lane
from data.manifest import Manifest, shard_entry
from data.packing import Piece
from data.pictures import decode_picture
from data.raw import read_raw
from data.shard_index import ShardIndex, index_path
from data.shards import BadRecord, BadRecords, Record, index_shard, read_at, read_shard, write_shard
from data.source import SourceConfig
from data.tokenizer import Tokenizer, train_tokenizer
from tests import mutations
from tests.mutations import Mutation, Shard, picture
from tests.sources import data_config, interleaved, make_source, pairs, texts

CPU_S = 2.0  # a case may take, in all readers together
MEMORY_MIB = 512  # of address space a case may take beyond what the process has
SIZES = ((16, 16), (8, 24))  # of decoded pictures
MAX_MESSAGE = 2000  # characters of an error
REASONS = {
    # of tar files and their members
    *("truncated", "broken header", "oversized member", "oversized record", "unsafe member name", "duplicate member"),
    *("member is not a file", "member name is not UTF-8", "sparse member"),
    # of encoded shards
    *("checksum", "unreadable shard", "unreadable index", "no tokens and no moments", "empty document", "wrong array"),
    *("wrong segments", "wrong captions", "too many segments", "missing image", "undecodable array"),
    *("non-finite latents", "longer than a sequence"),
    *("latent variance out of range", "token id out of range", "latent grid not tiled by patches"),
    # of raw files
    *("duplicate key", "no picture", "empty picture", "undecodable picture", "oversized picture", "empty caption"),
    *("no caption", "no text", "undecodable caption", "undecodable segments", "undecodable text", "empty text"),
    *("oversized text",),
}
# What no reader may do: Python's audit events of writing (besides opening to write), running and unpickling.
FORBIDDEN = (
    *("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "shutil.", "os.system", "os.exec"),
    *("os.fork", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect"),
)


def check(condition: Any, what: str) -> None:
    """Raise an error if a reader did what it must not."""
    if not condition:
        raise AssertionError(what)


@dataclass
class Watch:
    """Notes, while it is on, what no reader may do."""

    is_on: bool = False
    seen: list[str] = field(default_factory=list)

    def audit(self, event: str, arguments: tuple) -> None:
        if not self.is_on:
            return
        flags = arguments[2] if event == "open" else 0
        if (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {str(arguments)[:200]}")

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the harness itself write."""
        was_on, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = was_on


@contextmanager
def limits() -> Iterator[None]:
    """Bound memory and time; more than CPU_S of CPU time fails, much more or a minute of waiting kills the process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    begun = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (used + (MEMORY_MIB << 20), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(begun + 3 * CPU_S), resource.RLIM_INFINITY))
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU):
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    check(time.process_time() - begun < CPU_S, f"{time.process_time() - begun:.1f} s of CPU time")


class Readers:
    """Real files, and what their readers make of mutated ones; errors are counted in `reasons`."""

    def __init__(self, folder: Path):
        self.folder, self.encoded, self.raw = folder, folder / "encoded", folder / "raw"
        self.reasons, self.passed, self.watch = Counter(), 0, Watch()
        train_tokenizer((f"a large red circle beside {i} small squares" for i in range(200)), folder / "t.model", 300)
        self.tokenizer = Tokenizer(folder / "t.model")
        documents = [*pairs(4, seed=1), *interleaved(3, seed=1), *texts(3, seed=1)]
        documents += [*interleaved(2, seed=2), *pairs(2, seed=2)]
        make_source(self.encoded, self.tokenizer, documents, shard_sizes=[10, 4])
        self.files = {path.name: path.read_bytes() for path in sorted(self.encoded.iterdir())}
        self.shards = {name: Shard.of(data) for name, data in self.files.items() if name.endswith(".tar")}
        self.raw.mkdir()
        write_shard(self.raw / "raw.tar", raw_records())
        self.raw_shard = Shard.of((self.raw / "raw.tar").read_bytes())
        self.lines = [json.dumps({"text": f"line {i} " + "ü🎉" * (i % 5)}).encode() + b"\n" for i in range(40)]
        self._remember()

    def _remember(self) -> None:
        """Keep what whole files give."""
        self.data = self._open()
        source = self.data.sources[0]
        self.documents, self.pieces = {}, {}
        for number, entry in enumerate(source.manifest.shards):
            self.documents[entry.name] = self._from_shard(self.encoded / entry.name)
            self.pieces |= {(number, record): source.read(0, 0, number, record) for record in range(entry.records)}
        self.tokens = [piece.input_ids.tobytes() for piece in self.pieces.values()]
        self.raw_documents = self._from_raw(self.raw / "raw.tar")
        for pack, suffix in ((mutations.gz, ".gz"), (mutations.zst, ".zst"), (mutations.plain, "")):
            path = self.raw / f"lines.jsonl{suffix}"
            path.write_bytes(pack(b"".join(self.lines)))
            self.line_documents = self._from_raw(path)
        assert (len(self.raw_documents), len(self.line_documents)) == (5, 40) and not self.reasons, self.reasons
        self._read_lanes(self.data)
        self._clean()

    def _clean(self) -> None:
        """Put the files back as they were."""
        for path in (*self.raw.iterdir(), *self.encoded.iterdir()):
            path.unlink()
        for name, data in self.files.items():
            (self.encoded / name).write_bytes(data)

    # ---- one reader each: what passes is returned, what is bad is counted ----

    def bad(self, reason: str, message: str) -> None:
        """Count an error that may be raised, unless its reason is new or its message unfit for a log."""
        check(reason in REASONS, f"a new reason {reason!r}")
        check(len(message) <= MAX_MESSAGE and message.isprintable(), f"an unfit message {message[:300]!r}")
        self.reasons[reason] += 1

    def _count(self, bad: BadRecords, read: int) -> None:
        check(bad.seen == read + bad.reasons.total(), f"{bad.seen} records seen, {read} read, {bad.reasons} bad")
        check(set(bad.reasons) <= REASONS, f"new reasons in {bad.reasons}")
        said = [*bad.names, *bad.remarks()]
        check(all(len(n) <= MAX_MESSAGE and n.isprintable() for n in said), f"unfit remarks {str(said)[:300]}")
        self.reasons += bad.reasons + Counter({"failed file": len(bad.failed)})
        self.reasons += Counter(what for what in bad.noted if what.startswith("file without an end"))

    def _document(self, record: Record) -> bytes | None:
        """Return as bytes a document that may be trained on, None for a bad one."""
        try:
            document = decode_document(record, "here")
            check_document(document, self.tokenizer.vocab_size, 2, "here")
        except BadRecord as error:
            self.bad(error.reason, str(error))
            return None
        self.passed += 1
        parts = []
        for segment in document.segments:
            if isinstance(segment, ImageSegment):
                mean, logvar = np.split(segment.moments.astype(np.float64), 2)
                check(len(mean) == 2 and mean.size and np.isfinite(mean).all(), "means")
                check((np.abs(logvar) <= 30).all(), "log variances")
                parts.append(b"image %r " % (segment.moments.shape,) + segment.moments.tobytes())
            else:
                ids = segment.token_ids
                is_good = ids.dtype == np.int64 and len(ids) and 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size
                check(is_good, "token ids")
                parts.append(b"text " + ids.tobytes())
        return b"|".join(parts)

    def _from_shard(self, path: Path) -> dict[str, list[bytes]]:
        """Return a shard's good documents by key."""
        bad, found, read = BadRecords(1.0), {}, 0
        for record in read_shard(path, bad):
            read += 1
            if (document := self._document(record)) is not None:
                found.setdefault(record["__key__"].decode(), []).append(document)
        self._count(bad, read)
        return found

    def _from_index(self, path: Path, index: ShardIndex) -> dict[str, list[bytes]]:
        """Return by key the good documents that an index finds in a shard."""
        found: dict[str, list[bytes]] = {}
        with path.open("rb") as file:
            for span in index.spans:
                with suppress_bad(self):
                    record = read_at(lambda offset, length: os.pread(file.fileno(), length, offset), span, "here")
                    if (document := self._document(record)) is not None:
                        found.setdefault(record.get("__key__", b"").decode(), []).append(document)
        return found

    def _from_raw(self, path: Path) -> dict[str, list[tuple]]:
        """Return a raw file's good documents by key: their texts, and their pictures' pixels."""
        bad, found, read = BadRecords(1.0), {}, 0
        for document in read_raw(path, str(path), bad):
            read += 1
            try:
                where = document.where
                parts = [s if isinstance(s, str) else decode_picture(s, SIZES, where) for s in document.segments]
            except BadRecord as error:
                self.bad(error.reason, str(error))
                continue
            pixels = [part for part in parts if not isinstance(part, str)]
            check(all(p.dtype == np.uint8 and p.shape in {(*size, 3) for size in SIZES} for p in pixels), "pixels")
            json.dumps(document.info)  # as the encoder does
            self.passed += 1
            parts = tuple(part if isinstance(part, str) else part.tobytes() for part in parts)
            found.setdefault(document.key, []).append(parts)
        self._count(bad, read)
        return found

    def _open(self) -> DataSet:
        """Start as a run does."""
        order = OrderConfig(caption_first=1.0, caption_dropout=0.0)  # a record is one document, whatever the epoch
        source = SourceConfig(path=str(self.encoded), repeat=False)
        config = data_config(self.tokenizer, {"a": source}, lanes=2, sequence_length=192, order=order)
        return open_data(config, seed=0, patch_size=2)

    def _start(self, other_documents: bool = False) -> None:
        """Start as a run does and, unless that is refused, read all lanes."""
        try:
            data = self._open()
        except (ValueError, FileNotFoundError) as error:
            check(raised_by_us(error) and str(error), f"no refusal of ours: {error!r}")
            self.reasons["start refused"] += 1
        else:
            self._read_lanes(data, other_documents)

    def _read_lanes(self, data: DataSet, other_documents: bool = False) -> None:
        """Read all lanes to their ends; no document but those of the whole files unless `other_documents`."""
        for number in range(2):
            lane = Lane(number, data.sources, data.settings)
            try:
                for rows in range(1000):
                    if (row := lane.next_row()) is None:
                        break
                    ids = [row.input_ids[row.document_ids == i].tobytes() for i in range(1, row.document_ids.max() + 1)]
                    check(0 <= row.input_ids.min() <= row.input_ids.max() < self.tokenizer.vocab_size, "token ids")
                    is_known = other_documents or all(any(i in tokens for tokens in self.tokens) for i in ids)
                    check(is_known and rows < 100, "a lane of documents that never were, or without end")
            except BadRecord as error:  # an index that says where lanes begin
                self.bad(error.reason, str(error))
            except ValueError as error:
                check(str(error).startswith("lane ") and raised_by_us(error), f"no refusal of ours: {error!r}")
                self.reasons["lane ended"] += 1
            state = lane.state()
            json.dumps(state.to_json())
            check(set(state.skipped) <= REASONS, f"new reasons in {state.skipped}")
            check(all(len(name) <= MAX_MESSAGE for name in state.skipped_names), "a long name in a lane's state")
            self.reasons.update(state.skipped)
        data.sources[0].manifest.store.forget()

    # ---- what must hold of a mutated file ----

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
        suffix, pack = rng.choice([(".gz", mutations.gz), (".zst", mutations.zst), ("", mutations.plain)])
        return f"lines.jsonl{suffix}", mutations.hostile_lines(rng, self.lines, pack), self.through_raw

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


@contextmanager
def suppress_bad(readers: Readers) -> Iterator[None]:
    """Count a bad record instead of raising it."""
    try:
        yield
    except BadRecord as error:
        readers.bad(error.reason, str(error))


def raw_records() -> list[dict[str, bytes]]:
    """Return records of every kind that the encoder takes."""
    rng = random.Random(0)
    listed = json.dumps({"segments": ["before", {"image": "0.png"}, "", {"image": "1.jpg"}, "end"]}).encode()
    return [
        {"__key__": b"a", "jpg": picture(rng, "JPEG"), "txt": b" one"},
        {"__key__": b"b", "png": picture(rng, "PNG", "RGBA"), "json": b'{"caption": "two", "url": "u"}'},
        {"__key__": b"c", "webp": picture(rng, "WEBP"), "txt": "drei ü".encode(), "json": b'{"k": [1]}'},
        {"__key__": b"d", "0.png": picture(rng, "PNG", "L"), "1.jpg": picture(rng, "JPEG"), "json": listed},
        {"__key__": b"e", "jpg": picture(rng, "JPEG", size=(9, 60)), "txt": b"five"},
    ]


def equal(a: Piece, b: Piece) -> bool:
    """Whether two documents are the same, to the bit."""
    images = [[image.segment.moments.tobytes() for image in piece.images] for piece in (a, b)]
    return np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.labels, b.labels) and images[0] == images[1]


def raised_by_us(error: BaseException) -> bool:
    """Whether an error was raised in `data/`: a refusal and no accident somewhere below."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent.name == "data"


def main(first: int, count: int) -> None:
    """Run the cases of the seeds from `first` on, and print what comes of them."""
    sys.dont_write_bytecode = True
    logging.disable()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "here").mkdir()
        os.chdir(folder / "here")
        readers = Readers(folder)
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
