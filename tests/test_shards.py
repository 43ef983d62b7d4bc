"""Shards read back what was written, agree with webdataset and tarfile, and bad bytes are typed, counted errors."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
import zstandard

from data.documents import decode_document
from data.shard_index import index_path
from data.shards import (
    BadRecord,
    BadRecords,
    Record,
    atomic_write,
    index_shard,
    parse_record,
    read_at,
    read_shard,
    write_shard,
)
from tests.arrays import npy

LONG = "folder/" + "long" * 60  # does not fit a plain tar header


def raw_records(count: int, seed: int = 0) -> list[Record]:
    """Records of pictures and captions, some with names and contents that need care."""
    rng = random.Random(seed)
    names = ["plain", "a/b", "with space", "ümlaut", LONG, "x" * 99]
    return [
        {
            "__key__": f"{names[i % len(names)]}-{i}".encode(),
            "png": rng.randbytes(rng.randrange(3000)),
            "txt": f"caption {i}".encode() * rng.randrange(3),
            "meta.json": b"{}",
        }
        for i in range(count)
    ]


def read_span(path: Path, span: np.ndarray) -> Record:
    with path.open("rb") as file:
        return read_at(lambda offset, length: os.pread(file.fileno(), length, offset), span, "here")


def no_sizes(record: Record) -> tuple[int, list[tuple[int, int]]]:
    return 0, []


def read_all(path: Path, max_fraction: float = 1.0) -> tuple[list[Record], BadRecords]:
    bad = BadRecords(max_fraction)
    return list(read_shard(path, bad)), bad


def by_webdataset(path: Path) -> list[Record]:
    """What a plain WebDataset makes of a shard: the oracle."""
    samples = list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))
    for sample in samples:
        sample["__key__"] = sample["__key__"].encode()
        del sample["__url__"], sample["__local_path__"]
    return samples


def members(*items: tuple[str, bytes | tarfile.TarInfo], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar of (name, contents or a ready header) members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, contents in items:
            if isinstance(contents, tarfile.TarInfo):
                contents.name = name
                archive.addfile(contents)
            else:
                archive.addfile(header(tarfile.REGTYPE, name, len(contents)), io.BytesIO(contents))
    return buffer.getvalue()


def header(kind: bytes, name: str = "", size: int = 0, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    return info


def save(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def reasons(data: bytes, path: Path) -> tuple[list[str], dict[str, int]]:
    """Return the keys that are read from a tar, and what was counted as bad."""
    records, bad = read_all(save(path, data))
    assert bad.seen == len(records) + bad.reasons.total() and len(bad.failed) + len(bad.files) == 1
    return [record["__key__"].decode() for record in records], dict(bad.reasons)


def test_what_is_written_is_read_in_order_also_by_a_plain_webdataset(tmp_path: Path) -> None:
    written = raw_records(20)
    write_shard(tmp_path / "a.tar", written)
    records, bad = read_all(tmp_path / "a.tar", max_fraction=0)
    assert records == written == by_webdataset(tmp_path / "a.tar") and bad.seen == 20
    index = index_shard(tmp_path / "a.tar", no_sizes, BadRecords(0))
    assert [read_span(tmp_path / "a.tar", span) for span in index.spans[::-1]] == written[::-1]


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, raw_records(20))
        index_shard(tmp_path / name, no_sizes, BadRecords(0)).save(index_path(tmp_path / name))
        os.utime(tmp_path / name, (0, 0))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert (tmp_path / "a.tar.idx").read_bytes() == (tmp_path / "b.tar.idx").read_bytes()


def test_we_read_shards_that_webdataset_wrote(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(5):
            writer.write({"__key__": f"{LONG}{i}", "txt": f"caption {i}", "json": {"i": i}, "cls": i})
    records, bad = read_all(tmp_path / "a.tar", max_fraction=0)
    assert records == by_webdataset(tmp_path / "a.tar") and len(records) == 5 and bad.seen == 5


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_we_read_what_tarfile_writes_as_webdataset_does(tmp_path: Path, form: int) -> None:
    """Folders, names without extension, upper case, webdataset's meta data and empty members included."""
    long = LONG if form != tarfile.USTAR_FORMAT else "folder/" * 20 + "x"
    data = members(
        ("folder", header(tarfile.DIRTYPE)),
        ("README", b"no extension"),
        ("__meta__/about.txt", b"not a record"),
        ("folder/a.JPG", b"1" * 512),
        ("folder/a.txt", b""),
        (long, header(tarfile.DIRTYPE)),
        (f"{long}/b.jpg", b"2" * 513),
        (f"{long}/b.seg.png", b"3"),
        (f"{long}/none", b"no extension"),
        ("dots.in/a.folder/c.d.e", b"4"),
        ("ümlaut.txt", "ü".encode()),
        ("./d.txt", b"5"),
        ("new\nline.txt", b"6"),
        form=form,
    )
    path = save(tmp_path / "a.tar", data)
    records, bad = read_all(path, max_fraction=0)
    expected = by_webdataset(path)
    assert records == expected and len(records) == 6 and not bad.reasons
    assert len(index_shard(path, no_sizes, BadRecords(0))) == 6


def test_the_end_of_a_shard_ends_its_last_record_only_with_the_archive(tmp_path: Path) -> None:
    """At each cut: the records that are provably complete, all bytes theirs, and one counted tail.

    Only of a tar that ends just behind a record of the same members as others, is the last one kept, with a remark.
    """
    written = raw_records(6)
    write_shard(tmp_path / "whole.tar", written)
    data = (tmp_path / "whole.tar").read_bytes()
    spans = index_shard(tmp_path / "whole.tar", no_sizes, BadRecords(0)).spans
    end = int(spans[-1, 0] + spans[-1, 1])
    cuts = {0, 1, 511, 512, 513, end - 1, end}
    cuts |= {int(start) + delta for start in spans[:, 0] for delta in (-513, -1, 0, 1, 511, 512, 1024, 1500) if start}
    for cut in sorted(cuts):
        records, bad = read_all(save(tmp_path / "cut.tar", data[:cut]))
        # A record is complete once the first header of the next one is whole: from there on its name is known.
        assert records == written[: len(records)], cut
        ends = [int(start + length) for start, length, _ in spans]
        assert sum(stop + 3 * 512 + 512 <= cut for stop in ends[:-1]) <= len(records), cut
        indexed = index_shard(tmp_path / "cut.tar", no_sizes, BadRecords(1))
        assert indexed.spans.tolist() == spans[: len(records)].tolist()
        if cut in ends[1:]:
            assert bad.noted == {"file without an end-of-archive block, perhaps cut": 1}, cut
            assert not bad.reasons and bad.lost_share() == 0, cut
        elif cut < 512:
            assert len(bad.failed) == 1 and not bad.reasons, cut
        else:
            assert all(stop + 512 <= cut for stop in ends[: len(records)]), cut
            assert dict(bad.reasons) == {"truncated": 1} and bad.seen == len(records) + 1, cut
            assert bad.lost_share() == 1, cut
    for cut in (end + 1, end + 511, end + 512, end + 1024, len(data)):
        assert read_all(save(tmp_path / "cut.tar", data[:cut]), max_fraction=0)[0] == written


def test_every_flipped_bit_of_a_record_is_found(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", raw_records(3))
    data = (tmp_path / "a.tar").read_bytes()
    spans = index_shard(tmp_path / "a.tar", no_sizes, BadRecords(0)).spans
    rng = random.Random(0)
    for _ in range(100):
        number = rng.randrange(3)
        offset, length, _ = spans[number].tolist()
        flipped = bytearray(data)
        flipped[offset + rng.randrange(length)] ^= 1 << rng.randrange(8)
        save(tmp_path / "b.tar", flipped)
        with pytest.raises(BadRecord, match="checksum"):
            read_span(tmp_path / "b.tar", spans[number])


def test_a_shard_shorter_than_its_index_is_truncated(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", raw_records(3))
    spans = index_shard(tmp_path / "a.tar", no_sizes, BadRecords(0)).spans
    os.truncate(tmp_path / "a.tar", int(spans[2, 0]) + 700)
    read_span(tmp_path / "a.tar", spans[1])
    with pytest.raises(BadRecord, match="truncated"):
        read_span(tmp_path / "a.tar", spans[2])
    for hostile in ([0, 1 << 50, 0], [-5, 10, 0], [0, -1, 0], [1 << 60, 10, 0]):
        with pytest.raises(BadRecord):
            read_span(tmp_path / "a.tar", np.array(hostile))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "it is an empty file"),
        (bytes(10240), "it is nothing but zeros"),
        (b"not a tar", "in 9 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><title>404</title>" + b" " * 5000, "an HTML page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML page"),
        (gzip.compress(bytes(2000), mtime=0), "it is gzip"),
        (zstandard.compress(bytes(2000)), "it is zstd"),
        (bz2.compress(bytes(2000)), "it is bzip2"),
        (lzma.compress(bytes(2000)), "it is xz"),
        (b"PK\3\4" + bytes(3000), "it is a zip archive"),
        (b'{"text": "a"}\n' * 5000, "it is JSON"),
        (b"PAR1" + bytes(600), "it is a Parquet file"),
        (members(("README", b"1")), "in 10240 bytes"),
    ],
)
def test_what_holds_no_record_is_a_failed_file_named_as_what_it_looks_like(
    tmp_path: Path, data: bytes, what: str
) -> None:
    """It has a budget of its own, and counts for nothing in that of records."""
    good, bad = save(tmp_path / "good.tar", members(("a.txt", b"1"))), BadRecords(0.0)
    assert not list(read_shard(save(tmp_path / "a.tar", data), bad)) and len(list(read_shard(good, bad))) == 1
    assert len(bad.failed) == 1 and "a.tar: no record" in bad.failed[0] and what in bad.failed[0]
    with pytest.raises(ValueError, match=r"nothing .* from 1 of 2 input files, more than max_failed_files=0"):
        bad.check(final=True)
    bad.max_failed_files = 1
    bad.check(final=True)


def test_pickled_arrays_are_refused_unread(tmp_path: Path) -> None:
    """P11: neither tokens nor moments are ever unpickled."""

    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    for name in ("tokens.npy", "moments.npy"):
        for content in (npy(np.array([Bomb()], dtype=object)), pickle.dumps(Bomb())):
            with pytest.raises(BadRecord, match=r"wrong array|undecodable array"):
                decode_document({"__key__": b"a", name: content}, "here")
    assert not (tmp_path / "executed").exists()


def test_bad_records_stop_past_their_share(tmp_path: Path) -> None:
    bad = BadRecords(max_fraction=0.1)
    for i in range(190):
        bad.seen += 1
        if i % 10 == 3:
            bad.add(BadRecord("broken", f"record {i}"))
        bad.check()
    assert bad.summary() == "broken: 19"
    bad.check(final=True)
    bad.add(BadRecord("other", "record x"))
    with pytest.raises(ValueError, match=r"20 of 190 records .* max_bad_fraction=0.1: broken: 19, other: 1"):
        bad.check()
    few = BadRecords(max_fraction=0.1, seen=2)
    few.add(BadRecord("broken", "a"))
    few.check()  # too early to judge
    with pytest.raises(ValueError, match="1 of 2"):
        few.check(final=True)


def test_what_is_lost_counts_by_its_bytes_and_a_cut_file_whole(tmp_path: Path) -> None:
    bad = BadRecords(max_fraction=0.1, seen=1000, files=[(1000, 0.0)] * 98 + [(1000, 0.5)])
    bad.add(BadRecord("broken", "a"))
    assert bad.lost_share() == pytest.approx(0.5 / 99)
    bad.check(final=True)
    bad.files.append((10, 1.0))  # however few bytes are left of it
    assert bad.lost_share() == pytest.approx(1.49 / 99.99, rel=0.01)
    bad.files += [(5000, 1.0)] * 2
    with pytest.raises(ValueError, match=r"1 of 1000 .* 10\.\d+ % of the data, in which 3 files that end too early"):
        bad.check(final=True)


@pytest.mark.parametrize("key", ["a.b", "../a", "/a", "", "a/.b", "__x__/a"])
def test_a_key_that_would_not_read_back_is_not_written(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="rename the record"):
        write_shard(tmp_path / "a.tar", [{"__key__": key.encode(), "txt": b""}])
    with pytest.raises(ValueError, match="repeats"):  # neighbours of one key would read back as one record
        write_shard(tmp_path / "a.tar", [{"__key__": b"a", "txt": b""}] * 2)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")

    def failing() -> Iterable[Record]:
        yield {"__key__": b"a", "txt": b""}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a", failing())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "before"}
    with atomic_write(tmp_path / "a") as file:
        file.write(b"after")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "after"}


def test_a_span_of_two_records_is_refused() -> None:
    with pytest.raises(BadRecord, match="duplicate member"):
        parse_record(members(("a.txt", b"1"), ("b.png", b"2")), "here")
