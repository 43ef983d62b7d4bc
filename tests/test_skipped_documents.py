"""Bad documents are skipped, counted and named, and nothing else of the data set is lost."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.dataset import DataConfig, open_data
from data.documents import ImageKind
from data.lane_state import LaneState
from data.lanes import Lane
from data.manifest import Manifest
from data.source import SourceConfig
from data.tokenizer import Tokenizer
from tests.sources import Content, data_config, make_source, pairs, texts
from tests.test_lanes import (
    KEEP_CAPTIONS,
    content_of,
    content_of_documents,
    open_lanes,
    open_source,
    recorded,
    stream,
    until_the_end,
)


def damage(folder: Path, shard: int, records: list[int]) -> None:
    """Flip a bit in the middle of each of a shard's records."""
    manifest = Manifest.load(folder)
    spans = manifest.load_index(shard).spans
    data = bytearray(Path(manifest.shard_path(shard)).read_bytes())
    for record in records:
        data[int(spans[record, 0] + spans[record, 1] // 2)] ^= 1
    Path(manifest.shard_path(shard)).write_bytes(data)


@pytest.fixture
def damaged(tmp_path: Path, tokenizer: Tokenizer) -> tuple[DataConfig, list[Content]]:
    """A finite data set of 60 documents of which two are damaged, and the good ones."""
    documents = pairs(30, seed=7) + texts(30, seed=8)
    make_source(tmp_path / "a", tokenizer, documents, shard_sizes=[20, 25, 15])
    damage(tmp_path / "a", 0, [3])
    damage(tmp_path / "a", 1, [24])
    config = data_config(tokenizer, {"a": SourceConfig(path=str(tmp_path / "a"), repeat=False)}, order=KEEP_CAPTIONS)
    return config, [document for i, document in enumerate(documents) if i not in (3, 44)]


def skipped(lanes: list[Lane]) -> tuple[dict[str, int], list[str]]:
    states = [lane.state() for lane in lanes]
    names = [name for state in states for name in state.skipped_names]
    return dict(sum((Counter(state.skipped) for state in states), Counter())), names


def test_a_corrupt_record_is_skipped_counted_and_named(
    damaged: tuple[DataConfig, list[Content]], tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """P7: nothing else is lost, and the lane's next document takes its place."""
    config, good = damaged
    _, readers = open_lanes(config)
    assert content_of(until_the_end(readers)) == content_of_documents(good, tokenizer)
    counts, names = skipped(readers)
    folder = config.sources["a"].path
    assert counts == {"checksum": 2}
    assert sorted(names) == [f"{folder}/00000.tar#3: checksum", f"{folder}/00001.tar#24: checksum"]
    assert all(name in caplog.text for name in names)


def test_a_resume_skips_what_was_skipped(damaged: tuple[DataConfig, list[Content]]) -> None:
    """Even when the record can be read by then: its place in the order has passed."""
    config, _ = damaged
    _, readers = open_lanes(config)
    states, rows = recorded(readers, 12)
    step = next(i for i, state in enumerate(states) if sum(sum(s.skipped.values()) for s in state) == 2)
    damage(Path(config.sources["a"].path), 0, [3])  # the same bit again: healed
    damage(Path(config.sources["a"].path), 1, [24])
    _, resumed = open_lanes(config, states=states[step])
    assert stream(resumed, 12 - step) == rows[step:]
    assert skipped(resumed) == skipped(readers)


def test_a_vanished_shard_is_skipped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Gone after the start-up check: its documents are counted one by one, the others come all."""
    documents = pairs(30, seed=7) + texts(30, seed=8)
    _, readers = open_source(tmp_path, tokenizer, documents, shards=[20, 25, 15], repeat=False, order=KEEP_CAPTIONS)
    (tmp_path / "a" / "00001.tar").unlink()
    rows = until_the_end(readers)
    assert content_of(rows) == content_of_documents(documents[:20] + documents[45:], tokenizer)
    counts, names = skipped(readers)
    assert counts == {"unreadable shard": 25} and "00001.tar#" in names[0] and "No such file" in names[0]


def test_a_truncated_shard_loses_only_its_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = pairs(20, seed=7)
    data, readers = open_source(tmp_path, tokenizer, documents, repeat=False, order=KEEP_CAPTIONS)
    spans = data.sources[0].manifest.load_index(0).spans
    with open(tmp_path / "a" / "00000.tar", "r+b") as file:
        file.truncate(int(spans[17, 0]) + 600)
    assert content_of(until_the_end(readers)) == content_of_documents(documents[:17], tokenizer)
    assert skipped(readers)[0] == {"truncated": 3}


def test_a_lost_index_stops_the_lane_with_its_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Without it the order is not known, and another order would break every promise."""
    _, readers = open_source(tmp_path, tokenizer, texts(20))
    (tmp_path / "a" / "00000.tar.idx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00000.tar.idx: unreadable index \(its checksum differs"):
        readers[0].next_row()


def test_a_document_that_no_sequence_can_hold_is_known_from_the_start(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """By what may not be cut, so no text; a lane that meets it neither counts it nor names it again."""
    (_, image), long_text = pairs(1)[0], np.full(70, 9, np.int32)
    documents = [*pairs(8), (long_text, image), (long_text, None), (image, long_text), (long_text[:54], image)]
    data, readers = open_source(tmp_path, tokenizer, documents, shards=[5, 7], lanes=2, order=KEEP_CAPTIONS)
    assert data.sources[0].too_long == {(1, 3), (1, 5)}  # the last is 54 + 4 patches + BOS, EOS, BOI, EOI: 62 of 64
    names = [f"{tmp_path / 'a'}/00001.tar#{record}: longer than a sequence" for record in (3, 5)]
    assert data.too_long == names
    stream(readers, 30)
    assert skipped(readers)[0]["longer than a sequence"] > 4 and not caplog.text
    assert all(lane.state().skipped_documents == [] for lane in readers)


@pytest.mark.parametrize("kind", ["latents", "pixels"])
def test_too_long_a_document_is_known_from_the_start_whatever_its_image_is(
    tmp_path: Path, tokenizer: Tokenizer, kind: ImageKind
) -> None:
    """A shard is examined if its largest record has room for it, by the bytes that such an image takes."""
    images = [image for _, image in pairs(2, kind=kind)]
    documents = [*pairs(3, kind=kind), (np.full(56, 9, np.int32), images[0]), (np.full(57, 9, np.int32), images[1])]
    folder = make_source(tmp_path / "a", tokenizer, documents, kind=kind)
    data = open_data(data_config(tokenizer, {"a": folder}, lanes=2), 0, 2)
    assert data.sources[0].too_long == {(0, 4)}  # 57 + 4 patches + BOS, EOS, BOI, EOI: 65 of 64


def test_a_conversation_that_no_sequence_can_hold_is_known_from_the_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """It has context, so it is not cut, though it has no image."""
    answer = np.full(2, 9, np.int32)
    talks = [(np.full(length, 9, np.int32), answer) for length in (5, 60, 61)]  # with BOS and EOS 64 and 65 of 64
    folder = make_source(tmp_path / "a", tokenizer, talks, roles=("context", "target"))
    replace(Manifest.load(folder), chat_hash=tokenizer.chat_hash).save()
    data = open_data(data_config(tokenizer, {"a": folder}, lanes=2), 0, 2)
    assert data.sources[0].too_long == {(0, 2)}


def test_a_bad_document_counts_once_however_often_its_lane_meets_it(
    damaged: tuple[DataConfig, list[Content]], caplog: pytest.LogCaptureFixture
) -> None:
    """Across resumes too; a state of an earlier version, which lists none, starts the count again."""
    config, _ = damaged
    config = replace(config, lanes=1, sources={"a": replace(config.sources["a"], repeat=True)})
    _, (lane,) = open_lanes(config)
    stream([lane], 20)
    _, (lane,) = open_lanes(config, states=[lane.state()])
    stream([lane], 60)
    state = lane.state().to_json()
    assert state["skipped"]["checksum"] > 2 and sorted(state["skipped_documents"]) == [(0, 0, 3), (0, 1, 24)]
    assert len(caplog.records) == 2
    del state["skipped_documents"]
    _, (lane,) = open_lanes(config, states=[LaneState.from_json(state)])
    stream([lane], 40)
    assert len(lane.state().skipped_documents) == 2


def test_a_lane_with_nothing_left_to_read_stops_instead_of_searching(tmp_path: Path, tokenizer: Tokenizer) -> None:
    _, readers = open_source(tmp_path, tokenizer, texts(10))
    (tmp_path / "a" / "00000.tar").unlink()
    with pytest.raises(ValueError, match=r"lane 2 skipped 1000 documents in a row \({'unreadable shard': 1000}\)"):
        readers[2].next_row()
