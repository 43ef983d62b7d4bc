"""Damaged, joined and odd archives: the members around the damage are read, and nothing is lost in silence."""

import io
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from data.shards import MAX_RECORD_BYTES, write_shard
from tests.tars import pax
from tests.test_shards import by_webdataset, header, members, read_all, reasons, save


def pairs(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Return members of records, none of which fills whole blocks."""
    numbers = range(first, first + count)
    return [(f"{i:04d}.{ext}", f"{ext} {i} ".encode() * 90) for i in numbers for ext in ("png", "txt")]


def keys(*numbers: range) -> list[str]:
    return [f"{i:04d}" for some in numbers for i in some]


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
