"""Held-out data is compared with training record by record, wherever the training data is (P10)."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.documents import encode_record
from data.manifest import Manifest, shard_entry
from data.shard_index import index_path
from data.shards import content_key
from data.tokenizer import Tokenizer
from tests.ranks import run_ranks
from tests.runs import assert_refused, settings
from tests.sources import make_source, pairs, texts
from train import encode
from train.checkpoints import trained_records
from train.checkpoints.trained_records import TrainedRecords
from train.distributed.ranks import Ranks, alone


@pytest.fixture
def source(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Makes a data set of a name from documents, in shards of the given sizes or in one."""
    return lambda name, documents, *sizes: make_source(tmp_path / name, tokenizer, documents, shard_sizes=sizes)


def _encoded(folder: Path, tokenizer: Tokenizer, lines: Sequence[str], files: int) -> Path:
    """Encode texts, dealt out to so many files."""
    folder.mkdir()
    for number in range(files):
        of_file = "".join(json.dumps({"text": line}) + "\n" for line in lines[number::files])
        (folder / f"part{number}of{files}.jsonl").write_text(of_file)
    encode.main([f"inputs=[{folder}]", f"output={folder}/encoded", f"tokenizer={tokenizer.path}"])
    return folder / "encoded"


def test_the_same_texts_from_another_number_of_files_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """Keys, shards and bytes differ, what the records hold does not."""
    lines = [f"{i} large red circles beside {i * i} small blue squares" for i in range(40)]
    train, held = (_encoded(tmp_path / f"in{files}", tokenizer, lines, files) for files in (1, 3))
    other = _encoded(tmp_path / "other", tokenizer, [line + " again" for line in lines], 1)
    TrainedRecords.read([Manifest.load(train)], {"other": str(other)}, alone())
    argv = settings(tmp_path / "run", tokenizer, {"texts": train, "pairs": sources["pairs"]})
    argv += ["evaluation.interval_steps=4", f"evaluation.heldout.twin={held}"]
    assert_refused((argv, ["held-out source twin: 100 % of the documents", "training data too, such as document 0"]))


def test_a_key_is_that_of_the_contents() -> None:
    ids, moments = np.arange(5, dtype=np.int32), np.ones((4, 2, 2), np.float16)
    key = content_key(encode_record("a", [ids, moments], b"{}"))
    assert key == content_key(encode_record("b/c", [ids, moments], b'{"line": 3}'))
    others = [[ids[:4], moments], [ids, moments * 2], [moments, ids], [ids], [ids, moments, ids[:1]]]
    assert len({key, *(content_key(encode_record("a", other, b"{}")) for other in others)}) == 6


def _check(ranks: Ranks, sources: list[Path], held: Path) -> tuple[bytes, str]:
    """Return what is carried, and how a carried copy and the data itself refuse `held`, which must be alike."""
    manifests, said = [Manifest.load(source) for source in sources], []
    carried = TrainedRecords.read(manifests, {}, ranks)
    for check in (
        lambda: TrainedRecords.read(manifests, {"held": str(held)}, ranks),
        lambda: TrainedRecords.from_bytes(carried.to_bytes()).check({"held": str(held)}, ranks),
    ):
        try:
            check()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    assert said[0] == said[1]
    return carried.to_bytes(), said[0]


def test_a_record_in_a_hundred_is_chance_and_more_is_refused_alike_on_any_ranks(
    source: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    documents = pairs(200) + texts(300, lengths=(20, 40))
    train = [source("a", documents[:200], 7, 80, 113), source("b", documents[200:])]
    fresh = texts(400, seed=9, lengths=(20, 40))
    for shared in (0, 4, 5):
        mixed = documents[198 : 198 + shared] + fresh[shared:]
        held = source(f"held{shared}", mixed, 100, 300)
        found = _check(alone(), train, held)
        assert ("held: 1 % of its documents are training data too" in capsys.readouterr().out) == (shared == 4)
        assert shared != 5 or run_ranks(_check, 3, train, held) == [found] * 3
        assert ("held-out source held: 1 % of the documents" in found[1]) == (shared == 5)


def _as_of_old(folder: Path) -> Path:
    """Take the keys of contents out of a data set's indices, which earlier versions did not write."""
    manifest, entries = Manifest.load(folder), []
    for number, entry in enumerate(manifest.shards):
        shard = folder / entry.name
        index = replace(manifest.load_index(number), contents=None)
        index.save(index_path(shard))
        entries.append(shard_entry(shard, index))
    replace(manifest, shards=tuple(entries)).save()
    assert Manifest.load(folder).load_index(0).contents is None
    return folder


def test_data_indexed_by_an_earlier_version_is_compared_by_what_its_index_says(
    tmp_path: Path, source: Callable[..., Path]
) -> None:
    """Records under their old names, in any shards; and a sum that is equal by chance refuses nothing."""

    documents = pairs(150)
    old, new = _as_of_old(source("old", documents, 150)), source("new", documents, 150)
    for number, (train, held) in enumerate([(old, old), (old, new), (new, old)]):
        renewed = Path(shutil.copytree(held, tmp_path / f"copy{number}"))
        assert "100 % of the documents" in _check(alone(), [train], renewed)[1], (train, held)
    held, manifest = source("held", pairs(150, seed=5), 150), Manifest.load(old)
    index = manifest.load_index(0)
    spans = np.array(index.spans)
    spans[3, 1:] = Manifest.load(held).load_index(0).spans[7, 1:]
    replace(index, spans=spans).save(index_path(old / "00000.tar"))
    replace(manifest, shards=(shard_entry(old / "00000.tar", replace(index, spans=spans)),)).save()
    assert _check(alone(), [old], held)[1] == ""


def test_a_sample_of_many_records_is_carried_and_knows_what_it_knows(
    source: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained_records, "SAMPLE", 200)
    documents = texts(2000, lengths=(20, 30))
    train = Manifest.load(source("train", documents, 1000, 1000))
    carried = TrainedRecords.from_bytes(TrainedRecords.read([train], {}, alone()).to_bytes())
    assert 150 < len(carried.keys) < 250 and carried.bound == pytest.approx(2**64 / 10)
    half = source("half", documents[500:900] + texts(400, seed=3, lengths=(20, 30)))
    fresh = source("fresh", texts(400, seed=4, lengths=(20, 30)))
    carried.check({"fresh": str(fresh)}, alone())
    with pytest.raises(ValueError, match=r"held-out source half: [3-7]\d % of the documents"):
        carried.check({"half": str(half)}, alone())
    few = source("few", documents[:9] + texts(400, seed=4, lengths=(20, 30)))
    with pytest.raises(ValueError, match="held-out source few: 2 % of the documents"):  # the data itself knows them all
        TrainedRecords.read([train], {"few": str(few)}, alone())


def test_records_of_two_trainings_are_known_as_far_as_both_were_listed() -> None:
    """Weights go on from a run to the next, and what they were trained on with them."""
    low, high = TrainedRecords(np.array([1, 5, 9], np.uint64), 10), TrainedRecords(np.array([5, 7, 2**63], np.uint64))
    both = low | high
    assert (both.keys.tolist(), both.bound) == ([1, 5, 7, 9], 10) and both.keys.dtype == np.uint64
    assert (high | high).keys.tolist() == high.keys.tolist()


def test_what_is_no_list_of_keys_is_refused() -> None:
    for content in (b"", b"123", np.array([5, 4, 3], "<u8").tobytes()):
        with pytest.raises(ValueError):
            TrainedRecords.from_bytes(content)


def test_a_shard_without_an_index_is_named_and_the_rest_compared(
    tmp_path: Path, source: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train = source("train", texts(40, lengths=(20, 30)), 10, 30)
    held = Path(shutil.copytree(train, tmp_path / "held"))
    (train / "00000.tar.idx").write_bytes(b"")
    with pytest.raises(ValueError, match="75 % of the documents"):
        TrainedRecords.read([Manifest.load(train)], {"held": str(held)}, alone())
    assert "no held-out data is compared with" in (said := capsys.readouterr().out) and "00000.tar" in said
