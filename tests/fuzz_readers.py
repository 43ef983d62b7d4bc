"""Each reader of `data/` over files that may be mutated: what passes is returned, what is bad is counted."""

import json
import os
import random
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data.arrangement import OrderConfig
from data.captions import CaptionTokens
from data.dataset import DataSet, open_data
from data.documents import ImageSegment, check_document, decode_document, document_sizes, encode_record
from data.lanes import Lane
from data.manifest import Manifest, shard_entry
from data.pictures import decode_picture
from data.raw import read_raw
from data.shard_index import ShardIndex, index_path
from data.shards import BadRecord, BadRecords, Record, index_shard, read_at, read_shard, write_shard
from data.source import SourceConfig
from data.tokenizer import Tokenizer, train_tokenizer
from tests import raw_files
from tests.fuzz_limits import Watch, check
from tests.raw_files import picture
from tests.sources import data_config, interleaved, make_source, pairs, texts
from tests.tars import Shard

SIZES = ((16, 16), (8, 24))  # of decoded pictures
MAX_MESSAGE = 2000  # characters of an error
REASONS = {
    # of tar files and their members
    *("truncated", "broken header", "oversized member", "oversized record", "unsafe member name", "duplicate member"),
    *("member is not a file", "member name is not UTF-8", "sparse member"),
    # of encoded shards
    *("checksum", "unreadable shard", "unreadable index", "no tokens and no image", "empty document", "wrong array"),
    *("wrong segments", "wrong captions", "wrong roles", "too many segments", "missing image", "undecodable array"),
    "no target",
    *("several kinds of one image", "another kind of image"),
    *("non-finite latents", "longer than a sequence"),
    *("latent variance out of range", "token id out of range", "latent grid not tiled by patches"),
    # of raw files
    *("duplicate key", "no picture", "empty picture", "undecodable picture", "oversized picture", "empty caption"),
    *("no caption", "no text", "undecodable caption", "undecodable segments", "undecodable text", "empty text"),
    *("oversized text",),
}


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
        add_captions_and_roles(self.encoded)
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
        # Of several captions another may be drawn where a damaged index gives a record another number.
        again = [source.read(0, epoch, *place) for place in self.pieces for epoch in range(20) if place[0] == 2]
        self.tokens = [piece.input_ids.tobytes() for piece in [*self.pieces.values(), *again]]
        self.raw_documents = self._from_raw(self.raw / "raw.tar")
        for pack, suffix in ((raw_files.gz, ".gz"), (raw_files.zst, ".zst"), (raw_files.plain, "")):
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
            check_document(document, self.tokenizer.vocab_size, "moments", 2, "here", 2)
        except BadRecord as error:
            self.bad(error.reason, str(error))
            return None
        self.passed += 1
        parts = []
        for segment in document.segments + document.captions:
            parts.append(segment.role.encode())
            if isinstance(segment, ImageSegment):
                mean, logvar = np.split(segment.array.astype(np.float64), 2)
                check(len(mean) == 2 and mean.size and np.isfinite(mean).all(), "means")
                check((np.abs(logvar) <= 30).all(), "log variances")
                parts.append(b"image %r " % (segment.array.shape,) + segment.array.tobytes())
            else:
                ids = segment.token_ids
                is_good = ids.dtype == np.int64 and len(ids) and 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size
                check(is_good, "token ids")
                parts.append(b"text " + ids.tobytes())
        return b"|".join([*parts, bytes(document.caption_kinds)])

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


def add_captions_and_roles(folder: Path) -> None:
    """Add a shard of pictures with captions of two kinds, and of an edit, to an encoded data set."""
    captions, moments = [np.arange(5, 5 + n) for n in (2, 5, 3)], np.ones((4, 4, 4), np.float16)
    kinds = [[0, 1, 1], [0, 0, 0], [1, 0, 1]]
    shard, tokens = folder / "00002.tar", CaptionTokens()
    records = [encode_record(f"c{i}", [moments * i], b"{}", captions, caption_kinds=k) for i, k in enumerate(kinds)]
    edit = encode_record("edit", [moments, captions[0], moments], b"{}", roles=("context", "context", "target"))
    write_shard(shard, [*records, edit])
    index = index_shard(shard, partial(document_sizes, captions=tokens), BadRecords(0))
    index.save(index_path(shard))
    manifest = Manifest.load(folder)
    entries = (*manifest.shards, shard_entry(shard, index, tokens))
    replace(manifest, shards=entries, captions={"short": 1.0, "long": 2.0}).save()


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


def raised_by_us(error: BaseException) -> bool:
    """Whether an error was raised in `data/`: a refusal and no accident somewhere below."""
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent.name == "data"
