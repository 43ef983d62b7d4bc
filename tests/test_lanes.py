"""A lane is the same stream on any rank: order, exactly-once, mixing, resume."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data.source
from data.arrangement import OrderConfig
from data.dataset import DataConfig, DataSet, open_data
from data.lane_state import LaneState
from data.lanes import Lane, lanes_of_rank
from data.layout import IGNORE, Piece
from data.packing import PackedSequence
from data.source import Source, SourceConfig
from data.tokenizer import Tokenizer
from tests.sources import Content, data_config, interleaved, make_source, pairs, texts

KEEP_CAPTIONS = OrderConfig(caption_first=0.5, caption_dropout=0)


def open_lanes(config: DataConfig, seed: int = 0, states: list[LaneState] | None = None) -> tuple[DataSet, list[Lane]]:
    data = open_data(config, seed, patch_size=2)
    states = states or [None] * config.lanes
    return data, [Lane(number, data.sources, data.settings, states[number]) for number in range(config.lanes)]


def open_source(
    folder: Path,
    tokenizer: Tokenizer,
    documents: list[Content],
    shards: list[int] | None = None,
    repeat: bool = True,
    **changes: Any,
) -> tuple[DataSet, list[Lane]]:
    """Write documents to `folder` / a, and open its lanes."""
    make_source(folder / "a", tokenizer, documents, shard_sizes=shards)
    source = SourceConfig(path=str(folder / "a"), repeat=repeat)
    return open_lanes(data_config(tokenizer, {"a": source}, **changes))


def as_bytes(row: PackedSequence | None) -> list | None:
    """All of a row, comparable."""
    if row is None:
        return None
    arrays = [value.tobytes() for value in vars(row).values() if isinstance(value, np.ndarray)]
    return [*arrays, [(image.array.tobytes(), image.before_caption) for image in row.images]]


def stream(lanes: list[Lane], steps: int) -> list[list]:
    return [[as_bytes(lane.next_row()) for lane in lanes] for _ in range(steps)]


def recorded(lanes: list[Lane], steps: int) -> tuple[list[list[LaneState]], list[list]]:
    """The lanes' states before each step, and their rows."""
    pairs = [([lane.state() for lane in lanes], stream(lanes, 1)[0]) for _ in range(steps)]
    return [states for states, _ in pairs], [rows for _, rows in pairs]


def until_the_end(lanes: list[Lane]) -> list[PackedSequence]:
    return [row for lane in lanes for row in iter(lane.next_row, None)]


def content_of(rows: list[PackedSequence]) -> tuple[Counter, Counter]:
    """What the rows hold, whatever the order: images, and text targets."""
    images = Counter(image.array.tobytes() for row in rows for image in row.images)
    return images, Counter(int(label) for row in rows for label in row.labels if label != IGNORE)


def content_of_documents(documents: list[Content], tokenizer: Tokenizer) -> tuple[Counter, Counter]:
    """The same by the rule: each token once, BOI once an image, EOS once a document."""
    parts = [part for document in documents for part in document if part is not None]
    images = Counter(part.tobytes() for part in parts if part.ndim == 3)
    tokens = Counter(int(token) for part in parts if part.ndim == 1 for token in part)
    tokens[tokenizer.special.boi] += images.total()
    tokens[tokenizer.special.eos] += len(documents)
    return images, +tokens


@pytest.fixture
def mixed(pairs_folder: Path, texts_folder: Path, tokenizer: Tokenizer) -> DataConfig:
    """Pictures and texts, three tokens to one, for ever."""
    sources = {
        "pairs": SourceConfig(path=str(pairs_folder), weight=3),
        "texts": SourceConfig(path=str(texts_folder), weight=1),
    }
    return data_config(tokenizer, sources)


# ---- the order ----


def test_the_order_depends_on_the_seed_and_the_epoch(mixed: DataConfig) -> None:
    streams = [stream(open_lanes(mixed, seed)[1], 5) for seed in (0, 0, 1)]
    assert streams[0] == streams[1] != streams[2]
    source = open_lanes(mixed)[0].sources[0]
    assert len({tuple(source.position(epoch, 0, i) for i in range(8)) for epoch in range(6)}) == 6


@pytest.mark.parametrize("lanes", [4, 6])
def test_every_document_is_read_once_an_epoch(mixed: DataConfig, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several epochs of two sources of unequal size and length, mixed: no epoch repeats or leaves out a document."""
    reads: Counter = Counter()

    read = Source.read

    def recorded_read(source: Source, lane: int, *place: int) -> Piece:
        reads[source.number, *place] += 1
        return read(source, lane, *place)

    monkeypatch.setattr(Source, "read", recorded_read)
    data, readers = open_lanes(replace(mixed, lanes=lanes))
    while min(cursor.epoch for lane in readers for cursor in lane.state().cursors) < 3:
        for lane in readers:
            lane.next_row()
    assert set(reads.values()) == {1}
    for source in data.sources:
        everything = {(s, r) for s, entry in enumerate(source.manifest.shards) for r in range(entry.records)}
        for epoch in range(3):
            assert {key[2:] for key in reads if key[:2] == (source.number, epoch)} == everything


@pytest.mark.parametrize("lanes", [1, 4, 6])
def test_without_repetition_every_token_and_image_comes_exactly_once(
    tmp_path: Path, tokenizer: Tokenizer, lanes: int
) -> None:
    """P2 over a whole data set, documents longer than a row included; then the lanes have ended, and stay so."""
    documents = pairs(20, seed=3) + texts(20, lengths=(1, 200), seed=4) + interleaved(20, images=8)
    make_source(tmp_path / "a", tokenizer, documents[:25], shard_sizes=[3, 17, 5])
    make_source(tmp_path / "b", tokenizer, documents[25:], shard_sizes=[15, 20])
    sources = {name: SourceConfig(path=str(tmp_path / name), repeat=False) for name in "ab"}
    _, readers = open_lanes(data_config(tokenizer, sources, lanes=lanes, order=KEEP_CAPTIONS))
    rows = until_the_end(readers)
    assert content_of(rows) == content_of_documents(documents, tokenizer)
    assert [lane.next_row() for lane in readers] == [None] * lanes


def test_a_text_longer_than_a_row_is_not_passed_over_for_ever(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Though documents that fill each row to its end always stand by."""
    short = [(np.full(6, 10, np.int32), None)] * 60  # 8 tokens each with BOS and EOS
    long = [(np.arange(20, 220, dtype=np.int32), None)]
    _, (lane,) = open_source(tmp_path, tokenizer, short[:30] + long + short[30:], lanes=1, shuffle_block=1)
    rows = [lane.next_row() for _ in range(12)]
    assert {int(t) for row in rows for t in row.labels} >= set(range(20, 220))


def test_rows_are_nearly_full_when_there_is_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The paper's mix: 256-token images with captions, texts of log-normal length, half the tokens each, S = 4096."""
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(5.5, 1.2, 80), 1, 20000).astype(int)
    make_source(tmp_path / "texts", tokenizer, [(rng.integers(4, 270, n, dtype=np.int32), None) for n in sizes])
    make_source(tmp_path / "pairs", tokenizer, pairs(80, grids=[(32, 32)], lengths=(5, 40), channels=1))
    sources = {name: SourceConfig(path=str(tmp_path / name)) for name in ("texts", "pairs")}
    _, readers = open_lanes(data_config(tokenizer, sources, sequence_length=4096, look_ahead=16))
    rows = [lane.next_row() for _ in range(8) for lane in readers]
    fill = np.mean([np.mean(row.document_ids > 0) for row in rows])
    print(f"fill {fill:.4f}")
    assert fill >= 0.98


def test_pictures_alone_leave_less_than_a_picture_of_each_row_empty(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A caption and its picture are one piece: 270 tokens of 4096 at most stay empty, less with the look-ahead."""
    documents = pairs(80, grids=[(32, 32)], lengths=(5, 40), channels=1)
    _, readers = open_source(tmp_path, tokenizer, documents, sequence_length=4096, look_ahead=16)
    fill = np.mean([np.mean(lane.next_row().document_ids > 0) for _ in range(8) for lane in readers])
    print(f"fill of pairs alone {fill:.4f}")
    assert 0.93 < fill < 1


def test_a_lane_without_a_document_in_this_epoch_takes_part_in_the_next(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """One text of 5,000 tokens and nine of one: in each epoch two of four lanes have nothing."""
    _, readers = open_source(tmp_path, tokenizer, texts(1, lengths=(5000, 5000)) + texts(9, lengths=(1, 1)))
    assert all(row is not None for row in (lane.next_row() for lane in readers))
    assert max(cursor.epoch for lane in readers for cursor in lane.state().cursors) > 0


def test_caption_order_and_dropout_are_drawn_anew_each_epoch(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """One picture, ten epochs: each of the three layouts comes."""
    order = OrderConfig(caption_first=0.5, caption_dropout=0.3)
    _, (lane,) = open_source(tmp_path, tokenizer, pairs(1), lanes=1, order=order)
    row = lane.next_row()
    while lane.state().cursors[0].epoch < 10:
        row = lane.next_row()
    boi = tokenizer.special.boi
    assert len(row.images) > 3
    starts = np.flatnonzero(row.input_ids == tokenizer.special.bos)
    assert len({int(row.input_ids[start + 1]) == boi for start in starts}) == 2
    assert len({image.before_caption for image in row.images}) == 2


# ---- the mix ----


def shares_of(lane: Lane, rows: int) -> np.ndarray:
    """The share of all tokens of documents with pictures, and of texts, in the lane's next rows."""
    counts = np.zeros(2)
    for _ in range(rows):
        row = lane.next_row()
        with_image = np.unique(row.document_ids[row.image_ids >= 0])  # captions count as their picture's source
        of_pairs = int(np.isin(row.document_ids, with_image).sum())
        counts += of_pairs, int((row.document_ids > 0).sum()) - of_pairs
    return counts / counts.sum()


def test_shares_are_exact_to_a_thousandth_after_1000_sequences_and_so_after_a_change(mixed: DataConfig) -> None:
    """From the first step on, from a change on, and from one that wakes a source or puts it to rest."""
    pairs_, texts_ = mixed.sources.values()
    changes = {"1001": 0.5, "2001": 0.0}
    sources = {"pairs": replace(pairs_, weight_from=changes), "texts": texts_}
    config = replace(mixed, sources=sources, lanes=1, sequence_length=512, order=KEEP_CAPTIONS)
    _, (lane,) = open_lanes(config)
    for rows, expected in ((1000, 3 / 4), (1000, 1 / 3), (50, 0)):
        assert shares_of(lane, rows)[0] == pytest.approx(expected, abs=1e-3)
    sleeping = {"pairs": replace(pairs_, weight=0, weight_from={"301": 1}), "texts": texts_}
    _, (lane,) = open_lanes(replace(config, sources=sleeping))
    assert shares_of(lane, 300)[0] == 0 and shares_of(lane, 1000)[0] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("before", [0.01, 1e-6])
def test_a_source_that_was_rare_has_its_share_at_once_when_its_weight_grows(mixed: DataConfig, before: float) -> None:
    """And one that had ended long before does not count."""
    pairs_, texts_ = mixed.sources.values()
    ended = replace(texts_, repeat=False)
    sources = {"pairs": replace(pairs_, weight=before, weight_from={"31": 1}), "texts": replace(texts_, weight=1)}
    config = replace(mixed, sources={**sources, "ended": ended}, lanes=1, sequence_length=512, order=KEEP_CAPTIONS)
    _, (lane,) = open_lanes(config)
    shares_of(lane, 30)
    assert shares_of(lane, 200)[0] == pytest.approx(0.5, abs=0.02)


def test_a_lane_continues_from_its_state_around_a_change_of_weights(mixed: DataConfig) -> None:
    """Also when the change of a step to come was written into the config only after the stop."""
    changed = replace(mixed.sources["pairs"], weight_from={"4": 0.25, "7": 8})
    config = replace(mixed, sources={**mixed.sources, "pairs": changed})
    _, readers = open_lanes(config)
    states, expected = recorded(readers, 10)
    for step in range(10):
        assert stream(open_lanes(config, states=states[step])[1], 10 - step) == expected[step:], step
    _, readers = open_lanes(mixed)
    assert stream(readers, 3) == expected[:3] and stream(readers, 7) != expected[3:]
    _, readers = open_lanes(mixed)
    stream(readers, 3)
    assert stream(open_lanes(config, states=[lane.state() for lane in readers])[1], 7) == expected[3:]


def test_weights_that_leave_nothing_to_read_are_refused(mixed: DataConfig) -> None:
    both = {name: replace(source, weight_from={"5": 0}) for name, source in mixed.sources.items()}
    with pytest.raises(ValueError, match="every weight is 0 from step 5 on; expected one above 0"):
        replace(mixed, sources=both)
    for step, weight in (("1", 1.0), ("x", 1.0), ("5", -1.0), ("5", float("nan"))):
        with pytest.raises(ValueError, match="expected a step, 2 or more, and a weight, 0 or more"):
            SourceConfig(path="a", weight_from={step: weight})
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="leave the source out instead"):
            SourceConfig(path="a", weight=value)
    with pytest.raises(ValueError, match=r"image_share=0.5 and weight_from both decide the mix"):
        replace(mixed, image_share=0.5, sources={"a": SourceConfig(path="a", weight_from={"5": 1})})


def test_lanes_do_not_all_begin_with_the_same_source(
    pairs_folder: Path, texts_folder: Path, tokenizer: Tokenizer
) -> None:
    config = data_config(tokenizer, {"a": pairs_folder, "b": texts_folder}, lanes=40)
    _, readers = open_lanes(config)
    stream(readers, 1)
    begun = [lane.state().pending[0].source for lane in readers]
    assert 5 < sum(begun) < 35


def test_a_source_that_ends_hands_its_share_to_the_others(mixed: DataConfig) -> None:
    finite = replace(mixed.sources["pairs"], repeat=False)
    data, readers = open_lanes(replace(mixed, sources={**mixed.sources, "pairs": finite}))
    rows = [lane.next_row() for _ in range(60) for lane in readers]
    assert None not in rows
    images = Counter(image.array.tobytes() for row in rows for image in row.images)
    assert set(images.values()) == {1} and len(images) == data.sources[0].manifest.records
    assert not any(row.images for row in rows[-40:])
    assert np.mean([np.mean(row.document_ids > 0) for row in rows[-40:]]) > 0.95


# ---- resume ----


def test_a_lane_continues_from_its_state_at_any_step(mixed: DataConfig, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """States that went through JSON when their lanes had gone on, everything opened again; texts cut many times too."""
    make_source(tmp_path / "a", tokenizer, texts(12, lengths=(150, 400)))
    for config in (mixed, data_config(tokenizer, {"a": tmp_path / "a"})):
        _, readers = open_lanes(config)
        states, expected = recorded(readers, 30)
        for step in range(30):
            read_back = [LaneState.from_json(json.loads(json.dumps(state.to_json()))) for state in states[step]]
            num_steps = 19 if step == 11 else min(3, 30 - step)
            found = stream(open_lanes(config, states=read_back)[1], num_steps)
            assert found == expected[step : step + num_steps], step
    assert max(pending.cut for state in states for lane in state for pending in lane.pending) > 2 * 64


def test_resume_reads_only_what_is_pending(mixed: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    _, readers = open_lanes(mixed)
    stream(readers, 17)
    states = [lane.state() for lane in readers]
    reads = []
    read_at = data.source.read_at
    monkeypatch.setattr(data.source, "read_at", lambda *args: reads.append(args[2]) or read_at(*args))
    _, resumed = open_lanes(mixed, states=states)
    assert len(reads) == sum(len(state.pending) for state in states) <= 4 * mixed.look_ahead
    assert stream(readers, 1) == stream(resumed, 1)


# ---- lanes and ranks ----


def test_ranks_own_every_lane_once_and_nearly_equal_shares() -> None:
    for lanes in range(1, 20):
        for world_size in range(1, lanes + 1):
            owned = [lanes_of_rank(rank, world_size, lanes) for rank in range(world_size)]
            assert [lane for part in owned for lane in part] == list(range(lanes))
            assert max(map(len, owned)) - min(map(len, owned)) <= 1
    with pytest.raises(ValueError, match=r"5 ranks, but data.lanes=4: use at most one rank a lane, or more lanes"):
        lanes_of_rank(0, 5, 4)
    assert sorted(lane for rank in range(5) for lane in lanes_of_rank(rank, 5, 4, may_idle=True)) == [0, 1, 2, 3]


@pytest.mark.parametrize("weights", [(3, 1), (1, 1), (0.2, 5)])
def test_tokens_are_shared_by_weight(mixed: DataConfig, weights: tuple[float, float]) -> None:
    """By exact accounts: however long it runs, each lane is off by what is pending at most."""
    named = zip(mixed.sources.items(), weights, strict=True)
    config = replace(mixed, sources={name: replace(source, weight=weight) for (name, source), weight in named})
    _, readers = open_lanes(config)
    share = weights[0] / sum(weights)
    for lane in readers:
        assert abs(shares_of(lane, 100)[0] - share) < (mixed.look_ahead + 2) / 100
