"""An index keeps a shard's spans and sizes, and a damaged or hostile one is refused."""

import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from data.documents import document_sizes, encode_record
from data.shard_index import ShardIndex, index_path
from data.shards import BadRecord, BadRecords, index_shard, write_shard
from tests.arrays import npy, npy_of, zipped
from tests.test_shards import no_sizes, raw_records


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


GOOD_INDEX = {
    "spans": np.zeros((2, 3), np.int64),
    "text_tokens": np.ones(2, np.int64),
    "grid_starts": np.array([0, 1, 1], np.int64),
    "grids": np.ones((1, 2), np.int32),
}


def index_of(changes: dict[str, bytes], form: int = zipfile.ZIP_STORED) -> bytes:
    return zipped({**{name: npy(array) for name, array in GOOD_INDEX.items()}, **changes}, form)


def refuse_index(data: bytes) -> None:
    with pytest.raises(BadRecord, match=r"^here: unreadable index"):
        ShardIndex.parse(data, "here")


@pytest.mark.parametrize(
    "text", ["{'descr': (", "(\n  1", "-" * 9000 + "1", "'" * 9, "__import__('os').mkdir('executed')"]
)
def test_an_index_is_never_parsed_as_python(text: str) -> None:
    """numpy raised TokenError and MemoryError for these, and they ended a run."""
    assert len(ShardIndex.parse(index_of({}), "here")) == 2
    for version in (b"\1\0", b"\2\0"):
        refuse_index(index_of({"spans": npy_of(text, version=version)}))


def test_an_index_takes_no_more_memory_than_it_has_bytes() -> None:
    """Whatever shape it claims, and compressed or not; nor does it hold what is no array."""
    huge = npy_of("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 3), }", bytes(48))
    sparse = npy_of("{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000, 3), }")
    others = [npy(np.zeros((2, 3), ">i8")), npy(np.asfortranarray(np.zeros((2, 3))))]
    for content in (huge, sparse, b"", b"no array", *others):
        refuse_index(index_of({"spans": content}))
    for contents in (np.zeros(3, np.uint64), np.zeros(2, np.int64), np.zeros((2, 2), np.uint64)):  # of two records
        refuse_index(index_of({"contents": npy(contents)}))
    for form in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        refuse_index(index_of({"grids": npy(np.ones((1 << 20, 2), np.int32))}, form))


def test_an_index_that_points_outside_itself_is_refused() -> None:
    """By a zip64 offset that fits no C integer."""
    data = index_of({})
    place, end = data.rindex(b"PK\1\2"), data.rindex(b"PK\5\6")
    name = data[place + 46 : end]
    entry = data[place : place + 30] + struct.pack("<H", 12) + data[place + 32 : place + 42] + b"\xff" * 4
    directory = data[data.index(b"PK\1\2") : place] + entry + name + struct.pack("<HHQ", 1, 8, 1 << 63)
    tail = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 4, 4, len(directory), data.index(b"PK\1\2"), 0)
    hostile = data[: data.index(b"PK\1\2")] + directory + tail
    assert zipfile.ZipFile(io.BytesIO(hostile)).infolist()[-1].header_offset == 1 << 63
    refuse_index(hostile)


@pytest.mark.parametrize(
    "change",
    [
        *({"spans": spans} for spans in (np.zeros((2, 2), np.int64), np.zeros((3, 3), np.int64), np.zeros((2, 3)))),
        *({"text_tokens": np.array(tokens)} for tokens in ([0, 0, 0], [1, -1], [1, 1 << 62])),
        *({"grid_starts": np.array(starts)} for starts in ([0, 1, 2], [0, 2, 1])),
        *({"grids": np.array([grid], np.int32)} for grid in ([0, 4], [-4, -4], [2**31 - 1, 2**31 - 1])),
        {"grids": np.array([[object(), 1]])},
    ],
)
def test_an_index_of_inconsistent_or_absurd_arrays_is_refused(change: dict[str, np.ndarray]) -> None:
    """The sums of absurd sizes overflow, and lanes would begin anywhere."""
    refuse_index(index_of({name: npy(array) for name, array in change.items()}))
