"""Whatever becomes of a file: typed and counted errors, in bounded time and memory, and nothing runs (P7, P11).

Mutated files go through every reader in a process of their own (tests/fuzz.py). Below are the cases by name that once
got through: what they cost, whom they reach, and what must become of them.
"""

import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import base_plus_ext

from data.dataset import open_data
from data.documents import MAX_SEGMENTS, decode_document, encode_record
from data.lanes import Lane
from data.manifest import Manifest
from data.pictures import MAX_SCANS, decode_picture
from data.raw import MAX_MEMBER_BYTES, captions_of, read_raw
from data.shards import MAX_RECORD_BYTES, BadRecord, BadRecords, Record, read_at, read_shard, write_shard
from data.source import SourceConfig
from data.tar import key_of
from data.tokenizer import Tokenizer
from tests import raw_files
from tests.arrays import npy
from tests.fuzz_readers import REASONS
from tests.sources import data_config, make_source, texts
from tests.tars import member, pax, tar
from tests.test_shards import reasons

ROOT = Path(__file__).parent.parent


def fuzz(first: int, count: int, timeout_s: float) -> Iterator[dict[str, Any]]:
    """Run cases and yield what the processes say, a process that died being one that says so of its last case."""
    seed, end = first, first + count
    while seed < end:
        command = [sys.executable, "-m", "tests.fuzz", str(seed), str(end - seed)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
        lines = [json.loads(line) for line in process.stdout.splitlines()]
        yield from lines
        if lines and "reasons" in lines[-1]:
            return
        begun = [line["seed"] for line in lines if "what" in line]
        assert begun, f"no case was run: {process.stderr}"
        yield {"seed": begun[-1], "wrong": f"exit status {process.returncode}\n{process.stderr[-2000:]}"}
        seed = begun[-1] + 1


def check_cases(first: int, count: int, timeout_s: float) -> Counter:
    """Run cases, fail with seed, mutation and error of those that went wrong, and return the errors by reason."""
    lines = list(fuzz(first, count, timeout_s))
    whats = {line["seed"]: line["what"] for line in lines if "what" in line}
    wrong = [f"seed {line['seed']}: {whats[line['seed']]}\n{line['wrong']}" for line in lines if "wrong" in line]
    assert not wrong, "\n".join([*wrong[:10], f"{len(wrong)} cases; replay with `python -m tests.fuzz SEED`"])
    assert sorted(whats) == list(range(first, first + count))
    reasons = sum((Counter(line["reasons"]) for line in lines if "reasons" in line), Counter())
    print(f"{count} cases, {lines[-1]['passed']} documents passed, slowest {lines[-1]['slowest']}: {reasons}")
    return reasons


def test_mutated_files_give_only_counted_errors() -> None:
    """300 cases; where a record passes it is what it was, or no reader without a checksum could know."""
    reasons = check_cases(0, 300, timeout_s=200)
    assert len(reasons) > 20 and {"checksum", "truncated", "broken header", "unreadable index"} <= set(reasons)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_mutated_files_give_only_counted_errors() -> None:
    """And every reason occurs but those that take an absent file or other settings."""
    others = {"unreadable shard", "longer than a sequence", "latent grid not tiled by patches"}
    assert not REASONS - others - set(check_cases(1000, 10_000, timeout_s=1700))


# ---- cases by name ----


def reason(call: Callable[[], Any]) -> str:
    with pytest.raises(BadRecord) as caught:
        call()
    return caught.value.reason


def test_keys_are_webdatasets() -> None:
    """For all names of up to seven of these characters."""
    for name in ("".join(letters) for n in range(8) for letters in itertools.product("aB./", repeat=n)):
        key, extension = base_plus_ext(name)
        assert key_of(name) == ((None, "") if key is None else (key, extension.lower())), name


def test_a_name_of_many_slashes_takes_no_time(tmp_path: Path) -> None:
    """webdataset's rule as a regular expression took 7 s for each."""
    begun = time.process_time()
    parts = [member(name, b"1") for name in (b"a/" * 32_000, b"a/" * 32_000 + b"x.txt", b"a/" * 32_000 + b"y.txt") * 5]
    keys, bad = reasons(tar(parts), tmp_path / "a.tar")
    assert len(keys) == 10 and not bad and time.process_time() - begun < 1


def test_a_long_name_with_a_line_break_is_whole(tmp_path: Path) -> None:
    """It was cut there, so that the member had no extension and its record vanished uncounted."""
    records = [{"__key__": key, "txt": b"1"} for key in (b"a", b"x" * 200 + b"\ny", b"c")]
    write_shard(tmp_path / "a.tar", records)
    assert list(read_shard(tmp_path / "a.tar", BadRecords(0))) == records
    other = pax(b"comment=7 path=no\n13 path=no.txt\n", b"path=yes.txt") + member(b"no.txt", b"1")
    assert reasons(tar([other]), tmp_path / "b.tar") == (["yes"], {})


@pytest.mark.parametrize(
    "record", [b"7 path=x.txt\n", b"99 path=x.txt\n", b"0 path=x.txt\n", b"9" * 60_000, b"size=-5", b"size=1_0"]
)
def test_a_pax_header_that_cannot_be_followed_costs_the_records_beside_it(tmp_path: Path, record: bytes) -> None:
    """Other readers would see another name, size or contents of its member; so its record may be either."""
    parts, broken = [member(name + b".txt", b"1") for name in (b"a", b"b", b"c", b"d", b"e")], pax(record)
    assert reasons(tar([*parts[:2], broken, *parts[2:]]), tmp_path / "a.tar") == (["a", "e"], {"broken header": 2})
    assert reasons(tar([*parts[:2], broken]), tmp_path / "a.tar") == (["a"], {"broken header": 1})


def test_an_errors_message_is_short_and_of_one_line(tmp_path: Path) -> None:
    """It goes to terminals and logs, and into the lanes' state in checkpoints."""
    error = BadRecord("broken", "a.tar/" + "k" * 100_000, "\x1b[31m\nshard: all is well\ud800" + "d" * 100_000)
    assert len(str(error)) < 1100 and str(error).isprintable() and ": broken (\\x1b[31m\\nshard" in str(error)
    many = tar([member(b"a.%d" % i, b"1") for i in range(5000)] + [member(b"b.\x1b[2Jtxt", b"1")])
    (tmp_path / "a.tar").write_bytes(many)
    bad = BadRecords(1.0)
    assert not list(read_raw(tmp_path / "a.tar", "ümlaut.tar", bad)) and bad.reasons["no picture"] == 2
    assert all(len(name) < 1100 and name.isprintable() and name.startswith("ümlaut.tar/") for name in bad.names)


def test_a_span_takes_no_memory_for_what_is_not_there() -> None:
    """Of a gigabyte that an index claims, the last byte is asked for first; and no offset is too large to ask for."""
    asked = []

    def absent(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return b""

    assert reason(lambda: read_at(absent, np.array([0, MAX_RECORD_BYTES, 0]), "here")) == "truncated"
    for offset in (1 << 62, 2**63 - 1, 2**63 - 600):
        span = np.array([offset, 1024, 0])
        assert reason(lambda span=span: read_at(absent, span, "here")) == "oversized record"
    assert asked == [(MAX_RECORD_BYTES - 1, 1)]


def test_a_document_of_endless_segments_is_refused() -> None:
    """As objects they take a hundred times their bytes: a record of a gigabyte would have taken them all."""

    def record(count: int) -> Record:
        ones = np.ones(count, np.int32)
        return {"__key__": b"a", "tokens.npy": npy(ones), "segments.npy": npy(ones)}

    assert len(decode_document(record(MAX_SEGMENTS), "here").segments) == MAX_SEGMENTS
    begun = time.process_time()
    assert reason(lambda: decode_document(record(1 << 23), "here")) == "too many segments"
    assert time.process_time() - begun < 1


def test_raw_documents_have_no_more_segments_than_encoded_ones(tmp_path: Path) -> None:
    members = [json.dumps({"segments": ["x"] * count}).encode() for count in (MAX_SEGMENTS, MAX_SEGMENTS + 1)]
    write_shard(tmp_path / "a.tar", ({"__key__": b"%d" % i, "json": data} for i, data in enumerate(members)))
    bad = BadRecords(1.0)
    (document,) = read_raw(tmp_path / "a.tar", "a.tar", bad)
    assert dict(bad.reasons) == {"too many segments": 1}
    encoded = encode_record("a", [np.array([5], np.int32)] * len(document.segments), b"{}")
    assert len(decode_document(encoded, "here").segments) == MAX_SEGMENTS


def test_a_json_or_caption_without_end_is_refused_unparsed(tmp_path: Path) -> None:
    """Lists take 25 times their bytes: a member of a gigabyte would have taken all memory."""
    bomb = b"[" + b"[]," * (MAX_MEMBER_BYTES // 3) + b"1]"
    records: list[Record] = [
        {"__key__": b"a", "jpg": b"x", "txt": b"caption", "json": bomb},
        {"__key__": b"b", "jpg": b"x", "json": bomb},
        {"__key__": b"c", "jpg": b"x", "txt": b"x" * (MAX_MEMBER_BYTES + 1)},
    ]
    write_shard(tmp_path / "a.tar", records)
    bad, begun = BadRecords(1.0), time.process_time()
    assert not list(read_raw(tmp_path / "a.tar", "a.tar", bad)) and dict(bad.reasons) == {"oversized text": 3}
    assert time.process_time() - begun < 1
    assert all(reason(lambda record=record: captions_of(record, "here")) == "oversized text" for record in records[1:])


def test_a_zstd_bomb_is_read_past_in_no_more_time_than_it_unpacks(tmp_path: Path) -> None:
    """Each read copied all that was left of 128 MB: 10 KB took 9 s."""
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(raw_files.zst_bomb(300 << 20) + raw_files.zst(b'\n{"text": "after"}\n'))
    bad, begun = BadRecords(1.0), time.process_time()
    assert [document.segments for document in read_raw(path, str(path), bad)] == [("after",)]
    assert dict(bad.reasons) == {"oversized text": 1} and time.process_time() - begun < 3


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_compressed_file_of_nothing_is_a_failed_one(tmp_path: Path, suffix: str) -> None:
    """Compressed, no lines are some bytes all the same."""
    path, pack = tmp_path / f"a{suffix}", raw_files.gz if suffix.endswith("gz") else raw_files.zst
    for content, expected in ((b"", "it is an empty file"), (pack(b""), "it is without lines")):
        path.write_bytes(content)
        bad = BadRecords(1.0)
        assert not list(read_raw(path, str(path), bad)) and not bad.reasons
        assert bad.failed == [f"{path}: no text; {expected}"]


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    """Each of 95 bytes takes a pass over all pixels: a megabyte took minutes."""
    whole, many, too_many, endless = (raw_files.many_scans(n, (64, 48)) for n in (0, MAX_SCANS - 6, MAX_SCANS, 3000))
    hidden = b"\xff\xee" + (2 + 3000).to_bytes(2, "big") + b"\xff\xda" * 1500  # in a segment of an application
    for data in (whole, many, whole[:2] + hidden + whole[2:]):
        decode_picture(data, [(16, 16)], "here")
    for data in (too_many, endless):
        assert reason(lambda data=data: decode_picture(data, [(16, 16)], "here")) == "oversized picture"


def test_a_lack_of_memory_is_not_the_pictures_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped for it, a picture would be in the data set or not by what else the node does."""

    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", exhausted)
    with pytest.raises(MemoryError):
        decode_picture(raw_files.blank_png(8, 8, 4), [(16, 16)], "here")


def test_a_large_picture_with_alpha_takes_two_copies_of_its_pixels(tmp_path: Path) -> None:
    """Four would be a gigabyte in each of the encoder's threads; and the bits are those of the whole at once."""
    side = 5000
    (tmp_path / "large.png").write_bytes(raw_files.blank_png(side, side, 4))
    (tmp_path / "small.png").write_bytes(raw_files.blank_png(8, 8, 4))
    program = """
import re, sys
from pathlib import Path
from data.pictures import decode_picture
for path in sys.argv[1:]:
    decode_picture(Path(path).read_bytes(), [(16, 16)], "here")
    print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])  # rusage's is the parent's, too
"""
    command = [sys.executable, "-c", program, str(tmp_path / "small.png"), str(tmp_path / "large.png")]
    small, large = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert (int(large) - int(small)) * 1024 < 3 * 4 * side * side
    noise = np.random.default_rng(0).integers(0, 256, (30, 4500, 4), dtype=np.uint8)
    white = Image.new("RGBA", (4500, 30), "white")
    expected = np.asarray(Image.alpha_composite(white, Image.fromarray(noise)).convert("RGB"))
    data = raw_files.encoded(Image.fromarray(noise))
    assert np.array_equal(decode_picture(data, [(30, 4500)], "here"), expected)


# ---- known, in files that are not the readers' own ----


@pytest.mark.parametrize(
    "change", [{"text_tokens": 1 << 61, "records": 1 << 61}, {"grids": {"4x4": 1 << 61}}, {"name": "a" * 300}]
)
def test_a_manifest_of_absurd_entries_is_refused_at_start(
    tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any]
) -> None:
    folder = make_source(tmp_path / "a", tokenizer, texts(10), shard_sizes=[5, 5])
    fields = json.loads((folder / "manifest.json").read_text())
    fields["shards"][0] |= change
    (folder / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises((ValueError, FileNotFoundError)):
        open_data(data_config(tokenizer, {"a": folder}), seed=0, patch_size=1)


def test_a_damaged_index_is_skipped_with_and_without_reading_ahead(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = make_source(tmp_path / "a", tokenizer, texts(60), shard_sizes=[20, 20, 20])
    damaged = bytearray((folder / "00001.tar.idx").read_bytes())
    damaged[500] ^= 1
    (folder / "00001.tar.idx").write_bytes(damaged)
    skipped = []
    source = SourceConfig(path=str(folder), repeat=False)
    for read_ahead in (0, 3):
        data = open_data(data_config(tokenizer, {"a": source}, lanes=1, read_ahead=read_ahead), seed=0, patch_size=1)
        lane = Lane(0, data.sources, data.settings)
        while lane.next_row() is not None:
            pass
        skipped.append(lane.state().skipped)
    assert skipped == [{"unreadable index": 20}] * 2
    assert Manifest.load(folder).records == 60
