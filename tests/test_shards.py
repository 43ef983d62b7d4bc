"""Shards read back what was written, agree with webdataset and tarfile, and bad bytes are typed, counted errors."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import random
import subprocess
import tarfile
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
import zstandard

from data.documents import decode_document, document_sizes, encode_record
from data.shard_index import ShardIndex, index_path
from data.shards import (
    MAX_RECORD_BYTES,
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
from tests.mutations import npy, pax

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


def test_an_index_keeps_sizes_and_reads_back(tmp_path: Path) -> None:
    """Lengths by the slow count: BOS, text, EOS, and for each image BOI, patches, EOI."""
    rng = np.random.default_rng(0)
    grids, lengths = [(4, 4), (2, 8), None, (6, 4)], [0, 5, 1, 7]
    records = []
    for grid, length in zip(grids, lengths, strict=True):
        moments = [] if grid is None else [rng.normal(size=(4, *grid)).astype(np.float16)]
        records.append(encode_record(f"{len(records)}", [np.arange(length, dtype=np.int32), *moments], b"{}"))
    write_shard(tmp_path / "a.tar", records)
    path = index_path(tmp_path / "a.tar")
    index_shard(tmp_path / "a.tar", document_sizes, BadRecords(0)).save(path)
    index = ShardIndex.parse(path.read_bytes(), "here")
    assert index.text_tokens.tolist() == lengths
    assert index.grids.tolist() == [list(grid) for grid in grids if grid]
    for patch_size in (1, 2):
        patches = [1 + (grid[0] // patch_size) * (grid[1] // patch_size) + 1 if grid else 0 for grid in grids]
        expected = [1 + length + 1 + count for length, count in zip(lengths, patches, strict=True)]
        assert index.document_tokens(patch_size).tolist() == expected


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", raw_records(5))
    index_shard(tmp_path / "a.tar", no_sizes, BadRecords(0)).save(tmp_path / "a.tar.idx")
    data = (tmp_path / "a.tar.idx").read_bytes()
    crc32 = zlib.crc32(data)
    assert len(ShardIndex.parse(data, "here", crc32)) == 5
    with pytest.raises(BadRecord, match="unreadable index"):
        ShardIndex.parse(data[:100] + bytes([data[100] ^ 1]) + data[101:], "here", crc32)
    for wrong in (b"", b"PK\x03\x04", data[:-30], pickle.dumps([1]), np.arange(3).tobytes()):
        with pytest.raises(BadRecord, match="unreadable index"):
            ShardIndex.parse(wrong, "here")


def test_hostile_members_cost_their_own_record_only(tmp_path: Path) -> None:
    """Each is counted by reason; their neighbours are read."""
    cases = [("unsafe member name", [(name, b"1")]) for name in ("../x.txt", "/etc/x.txt", "a/../../x.txt")]
    cases += [("duplicate member", [("x.txt", b"1"), (name, b"2")]) for name in ("x.TXT", "x.__key__")]
    cases += [("member is not a file", [("x.txt", header(tarfile.SYMTYPE, target="/etc/passwd"))])]
    cases += [("member name is not UTF-8", [("x\udcff.txt", b"1")])]
    for reason, hostile in cases:
        data = members(("a.txt", b"before"), *hostile, ("b.txt", b"after"), form=tarfile.GNU_FORMAT)
        assert reasons(data, tmp_path / "a.tar") == (["a", "b"], {reason: 1}), hostile


def test_headers_that_claim_absurd_sizes_are_refused_without_reading(tmp_path: Path) -> None:
    for size in (MAX_RECORD_BYTES + 1, 1 << 60):
        claim = header(tarfile.REGTYPE, "x.txt", size).tobuf(tarfile.GNU_FORMAT)
        data = members(("a.txt", b"1"))[:1024] + claim + bytes(1024)
        assert reasons(data, tmp_path / "a.tar") == (["a"], {"oversized member": 1})
    long_name = header(tarfile.GNUTYPE_LONGNAME, "././@LongLink", 1 << 29).tobuf()
    data = members(("a.txt", b"1"), ("b.txt", b"2"))[:2048] + long_name + bytes(1024)
    assert reasons(data, tmp_path / "a.tar") == (["a"], {"truncated": 1})


def test_a_link_or_folder_that_claims_contents_does_not_hide_what_follows(tmp_path: Path) -> None:
    """tarfile gives links and folders no contents, whatever their header says; nor do we."""
    path = save(tmp_path / "a.tar", header(tarfile.DIRTYPE, "folder", 512).tobuf() + members(("a.txt", b"1")))
    assert read_all(path, max_fraction=0)[0] == by_webdataset(path) == [{"__key__": b"a", "txt": b"1"}]


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


# ---- damaged, joined and odd archives ----


def pairs(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Return members of records, none of which fills whole blocks."""
    numbers = range(first, first + count)
    return [(f"{i:04d}.{ext}", f"{ext} {i} ".encode() * 90) for i in numbers for ext in ("png", "txt")]


def keys(*numbers: range) -> list[str]:
    return [f"{i:04d}" for some in numbers for i in some]


def test_joined_archives_are_read_on(tmp_path: Path) -> None:
    """As by tarfile with ignore_zeros; a key on both sides of the end of an archive is two records."""
    data = members(*pairs(3)) + members(*pairs(3, first=2)) + bytes(1 << 20) + members(*pairs(1, first=9))
    path = save(tmp_path / "a.tar", data)
    records, bad = read_all(path, max_fraction=0)
    with tarfile.open(path, ignore_zeros=True) as archive:
        contents = [archive.extractfile(info).read() for info in archive]
    assert [record[ext] for record in records for ext in ("png", "txt")] == contents
    assert [record["__key__"].decode() for record in records] == keys(range(3), range(2, 5), range(9, 10))
    assert bad.files == [(len(data), 0.0)] and not bad.noted


def test_behind_the_end_of_an_archive_nothing_is_silent(tmp_path: Path) -> None:
    data = members(*pairs(3)) + b"x" * 1000
    records, bad = read_all(save(tmp_path / "a.tar", data))
    assert len(records) == 3 and dict(bad.reasons) == {"broken header": 1}
    assert bad.lost_share() == pytest.approx(1000 / len(data), rel=0.05)


@pytest.mark.parametrize("damaged", [0, 1, 100, 101, 198, 199])
def test_a_damaged_header_costs_the_records_beside_it(tmp_path: Path, damaged: int) -> None:
    """Its own, and the neighbour that may have members among the lost bytes; tarfile finds the rest."""
    data = bytearray(members(*pairs(100)))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        info = archive.getmembers()[damaged]
    data[info.offset + 148 : info.offset + 156] = b"99999\0 \0"
    records, bad = read_all(save(tmp_path / "a.tar", data))
    with tarfile.open(tmp_path / "a.tar", ignore_zeros=True) as archive:
        contents = {info.name: archive.extractfile(info).read() for info in archive}
    read = {f"{r['__key__'].decode()}.{ext}": r[ext] for r in records for ext in ("png", "txt")}
    assert len(contents) == 199 and read.items() <= contents.items()
    number = damaged // 2
    lost = {number, number + damaged % 2} if damaged % 2 else {number - 1, number}
    assert [record["__key__"].decode() for record in records] == keys([i for i in range(100) if i not in lost])
    assert bad.seen == len(records) + bad.reasons["broken header"] and bad.reasons.total() <= 2
    assert bad.lost_share() == pytest.approx(1536 / len(data), rel=0.5)
    assert f"a.tar@{info.offset}" in bad.names[0]


def test_a_header_inside_a_members_contents_is_none(tmp_path: Path) -> None:
    """Neither in a whole archive nor in a cut member; only after damage can the two not be told apart."""
    inner = members(("inner.txt", b"1"), ("other.txt", b"2"))
    data = bytearray(members(("a.txt", b"1"), ("b.tar", inner), ("b.txt", b"2"), ("c.txt", b"3"), ("d.txt", b"4")))
    assert reasons(bytes(data), tmp_path / "a.tar") == (["a", "b", "c", "d"], {})
    assert reasons(bytes(data[: 2048 + len(inner) // 2]), tmp_path / "a.tar") == (["a"], {"truncated": 1})
    data[1024] ^= 1
    assert reasons(bytes(data), tmp_path / "a.tar") == (["other", "b", "c", "d"], {"broken header": 2})


@pytest.mark.parametrize("form", ["posix", "gnu", "oldgnu"])
def test_a_sparse_member_costs_its_own_record(tmp_path: Path, form: str) -> None:
    """As GNU tar writes them, with more holes than an old header holds."""
    for name, contents in pairs(4):
        (tmp_path / name).write_bytes(contents)
    with (tmp_path / "0002.txt").open("wb") as file:
        for hole in range(40):
            file.seek(hole * 65536)
            file.write(b"words")
    command = ["tar", "--sparse", "--sort=name", f"--format={form}", "-cf", tmp_path / "a.tar", "-C", tmp_path]
    subprocess.run([*command, *(name for name, _ in pairs(4))], check=True)
    assert (tmp_path / "a.tar").stat().st_size < 1 << 19  # it is sparse
    records, bad = read_all(tmp_path / "a.tar")
    assert [record["__key__"] for record in records] == [b"0000", b"0001", b"0003"]
    assert dict(bad.reasons) == {"sparse member": 1} and bad.lost_share() == 0


def test_what_file_managers_write_is_left_out_by_name_and_counted(tmp_path: Path) -> None:
    """So are members that are part of no record, none of them silently; folders hold nothing."""
    members_of = [[("photos/._" + name, b"\0\5\26\7"), (f"photos/{name}", contents)] for name, contents in pairs(3)]
    odd = ["photos/.DS_Store", "Thumbs.db", "a/desktop.ini", "__MACOSX/photos/._0000.png", "x/__MACOSX/0.txt"]
    data = members(
        ("photos", header(tarfile.DIRTYPE)),
        *(member for some in members_of for member in some),
        *((name, b"1") for name in [*odd, "README", "__meta__/x.txt"]),
    )
    data = pax(b"comment=0123456789", kind=tarfile.XGLTYPE) + data
    records, bad = read_all(save(tmp_path / "a.tar", data), max_fraction=0)
    assert [record["__key__"].decode() for record in records] == [f"photos/{key}" for key in keys(range(3))]
    others = ("global header", "name without extension", "webdataset's meta data")
    assert bad.noted == {"file of macOS or Windows": 3 + 3 + len(odd)} | dict.fromkeys(others, 1)
    assert f"file of macOS or Windows: 11, such as {tmp_path}/a.tar/photos/._0000.png" in bad.remarks()
    for key in ("__MACOSX/a", "x/__MACOSX/a"):
        with pytest.raises(ValueError, match="rename the record"):
            write_shard(tmp_path / "b.tar", [{"__key__": key.encode(), "txt": b""}])


def test_sizes_in_pax_headers_and_in_base_256_are_followed(tmp_path: Path) -> None:
    """As tarfile does; a size of more than the file costs what follows, one of more than a record itself alone."""
    after = members(("b.txt", b"2"), ("c.txt", b"3"))
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        data = header(tarfile.REGTYPE, "a.txt", 1 << 33).tobuf(form)  # octal digits hold no more than 8 GiB
        assert reasons(data + after, tmp_path / "a.tar") == ([], {"oversized member": 1})
        with open(save(tmp_path / "a.tar", data), "r+b") as file:
            file.seek(len(data) + (1 << 33))
            file.write(after)
        records, bad = read_all(tmp_path / "a.tar")
        assert [record["__key__"] for record in records] == [b"b", b"c"]
        assert dict(bad.reasons) == {"oversized record": 1} and bad.lost_share() == 0


def test_no_kind_of_member_is_silent_or_ends_a_shard(tmp_path: Path) -> None:
    """Links, devices, long names, names of any bytes: counted by reason, and the neighbours are read."""
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE]
    for number, kind in enumerate([*kinds, b"V", b"D", b"M", b"Z"]):
        odd = [("b.txt", header(kind, target="a.txt")), ("link", header(kind))]
        data = members(("a.txt", b"1"), *odd, ("c.txt", b"3"))
        records, bad = read_all(save(tmp_path / f"{number}.tar", data))
        assert [record["__key__"] for record in records] == [b"a", b"c"], kind
        assert dict(bad.reasons) == {"member is not a file": 1} and bad.noted == {"name without extension": 1}
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        endless = members(("a.txt", b"1"), ("b" * 66_000 + ".txt", b"2"), ("c.txt", b"3"), ("d.txt", b"4"), form=form)
        assert reasons(endless, tmp_path / "a.tar") == (["d"], {"oversized member": 2})


@pytest.mark.parametrize("block", ["magic", "broken", "zeros", "x"])
def test_finding_the_next_header_takes_time_in_proportion_to_the_bytes(tmp_path: Path, block: str) -> None:
    """Of blocks that almost are headers, of damage before each member, of ends before each."""
    good, most = members(("a.txt", b""))[:512], 1 << 21
    almost = good[:148] + b"0000000\0" + good[156:]
    blocks = {"magic": almost, "broken": almost + good, "zeros": bytes(512) + good, "x": b"x" * 512}[block]
    seconds = []
    for size in (most // 8, most):
        path = save(tmp_path / "a.tar", good + blocks * (size // len(blocks)))
        begun = time.process_time()
        read_all(path)
        seconds.append(time.process_time() - begun)
    assert seconds[1] < max(1.0, 16 * seconds[0])


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
