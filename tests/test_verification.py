"""Every kind of damage to an encoded folder is found, named and counted; lost or foreign indices are made anew."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.documents import encode_record
from data.manifest import Manifest, shard_entry
from data.shard_index import index_path
from data.shards import BadRecords, index_shard, write_shard
from data.tokenizer import Tokenizer
from tests.encoding.jobs import Capsys, arguments, contents_of, picture_record, raw_folder
from tests.sources import interleaved, make_source, pairs, texts
from train.encode import main


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    documents = pairs(10, grids=[(4, 4), (4, 8)]) + texts(10) + interleaved(10)
    return make_source(tmp_path_factory.mktemp("whole") / "data", tokenizer, documents, shard_sizes=[7, 13, 10])


def verify(folder: Path, capsys: Capsys) -> tuple[int | None, str]:
    status = main([f"verify={folder}"])
    return status, capsys.readouterr().out


def test_a_whole_folder_verifies(whole: Path, capsys: Capsys) -> None:
    status, printed = verify(whole, capsys)
    assert status == 0 and "verify: 30 records in 3 shards" in printed and "match the manifest" in printed


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _manifest(folder: Path, change: Callable[[dict], None]) -> None:
    fields = json.loads((folder / "manifest.json").read_text())
    change(fields)
    (folder / "manifest.json").write_text(json.dumps(fields))


DAMAGE = {
    "checksum: 1": lambda folder: _flip(folder / "00001.tar", 3000),
    "wrong size: 1": lambda folder: (folder / "00001.tar").write_bytes(b"x" * 512),
    "wrong size: 1; ": lambda folder: (folder / "00001.tar").unlink(),
    "unreadable index: 1": lambda folder: _flip(folder / "00001.tar.idx", 400),
    "unreadable index: 1; ": lambda folder: (folder / "00001.tar.idx").unlink(),
    "token id out of range: 30": lambda folder: _manifest(folder, lambda m: m.update(vocab_size=4)),
    "wrong counts: 1": lambda folder: _manifest(folder, lambda m: m["shards"][1].update(text_tokens=7)),
}


@pytest.mark.parametrize("expected", DAMAGE)
def test_damage_is_counted_and_its_shard_named(tmp_path: Path, whole: Path, capsys: Capsys, expected: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "data")
    DAMAGE[expected](folder)
    status, printed = verify(folder, capsys)
    assert status == 1 and expected.rstrip("; ") in printed, printed
    if "token id" not in expected:
        assert "in 1 of 3 shards" in printed and "damaged: 00001.tar" in printed


def test_records_that_decode_to_nonsense_are_found_though_their_checksums_fit(
    tmp_path: Path, tokenizer: Tokenizer, capsys: Capsys
) -> None:
    """Written so: an index that vouches for what it should not."""
    folder = make_source(tmp_path / "data", tokenizer, pairs(4), shard_sizes=[2, 2])
    nan = encode_record("000002", [np.array([5]), np.full((4, 4, 4), np.nan, np.float16)], b"{}")
    good = encode_record("000003", [np.array([5]), np.zeros((4, 8, 4), np.float16)], b"{}")
    write_shard(folder / "00001.tar", [nan, good])
    index = index_shard(folder / "00001.tar", lambda record: (1, [(4, 4)]), BadRecords(0))
    index.save(index_path(folder / "00001.tar"))
    entry = vars(shard_entry(folder / "00001.tar", index))
    _manifest(folder, lambda m: m["shards"].__setitem__(1, entry))
    status, printed = verify(folder, capsys)
    assert status == 1
    assert "verify: 2 problems in 1 of 2 shards" in printed
    assert "index of another record: 1, non-finite latents: 1" in printed and "00001.tar#0: non-finite" in printed


def test_ranks_share_the_shards(whole: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        found.append(verify(whole, capsys)[1])
    assert "17 records in 2 shards" in found[0] and "13 records in 1 shard" in found[1]


def test_lost_indices_are_made_again_byte_for_byte(
    tmp_path: Path, tokenizer: Tokenizer, vae_folder: Path, capsys: Capsys
) -> None:
    """Of a job's own output: the same indices and the same manifest, measured statistics included."""
    raw = raw_folder(tmp_path / "raw", {"a": [picture_record(i) for i in range(5)], "b": [picture_record(9)]})
    out = tmp_path / "out"
    main(arguments(raw, out, tokenizer, vae=vae_folder))
    before = contents_of(out)
    for path in [*out.glob("*.idx"), *out.glob("*.json")]:
        path.unlink()
    settings = [f"index={out}", f"tokenizer={tokenizer.path}", f"vae={vae_folder}", "resolution=32", "device=cpu"]
    main(settings)
    after = contents_of(out)
    names = [name for name in before if not name.endswith(".tar.json")]
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.idx")}
    main(settings)  # nothing to do
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.idx")} == stamps
    assert verify(out, capsys)[0] == 0


def test_foreign_shards_are_indexed_but_for_what_is_bad(
    tmp_path: Path, tokenizer: Tokenizer, vae_folder: Path, capsys: Capsys
) -> None:
    """Written by somebody else in our record layout; the broken ones cost themselves only."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = [
        encode_record(f"{i:03d}", [np.array([5, 6]), rng.normal(size=(4, 8, 8)).astype(np.float16)], b"{}")
        for i in range(10)
    ]
    del records[3]["moments.npy"], records[3]["tokens.npy"]
    records[5] = encode_record("005", [np.array([10**6])], b"{}")
    write_shard(folder / "x.tar", records)
    with pytest.raises(ValueError, match=r"holds images: give vae=FOLDER"):
        main([f"index={folder}", f"tokenizer={tokenizer.path}"])
    settings = [f"index={folder}", f"tokenizer={tokenizer.path}", f"vae={vae_folder}", "resolution=32", "device=cpu"]
    with pytest.raises(ValueError, match="2 of 10 records are bad"):
        main(settings)
    main([*settings, "max_bad_fraction=0.3"])
    printed = capsys.readouterr().out
    assert "index: 8 records in 1 shard" in printed and "no tokens and no image: 1" in printed
    manifest = Manifest.load(folder)
    good = [record["moments.npy"] for i, record in enumerate(records) if i not in (3, 5)]
    kept = np.stack([np.frombuffer(data[-512:], "<f2").reshape(4, 8, 8) for data in good])
    np.testing.assert_allclose(manifest.latent_spec.mean, kept[:, :2].astype(np.float64).mean((0, 2, 3)), rtol=1e-6)
    assert verify(folder, capsys)[0] == 0


def test_one_thing_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="verify and index: expected one of them"):
        main([f"verify={tmp_path}", f"index={tmp_path}"])
    with pytest.raises(ValueError, match="verify and inputs: expected one of them"):
        main([f"verify={tmp_path}", f"inputs=[{tmp_path}]"])
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json; make it with"):
        main([f"verify={tmp_path}"])
