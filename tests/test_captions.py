"""Of several captions one is drawn: by weight, the same on any rank and after a resume, another in another epoch."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.arrangement import OrderConfig, arrange
from data.captions import CaptionTokens
from data.dataset import DataConfig, open_data
from data.documents import TextSegment, check_document, decode_document, document_sizes, encode_record
from data.manifest import Manifest, shard_entry
from data.shard_index import index_path
from data.shards import BadRecord, BadRecords, Record, index_shard, write_shard
from data.source import SourceConfig, SourceOrderConfig
from data.storage import Store
from data.tokenizer import Tokenizer
from tests.arrays import npy
from tests.sources import data_config, latent_spec, make_source, texts
from tests.test_lanes import as_bytes, open_lanes
from tests.test_loader import run
from train.state import differences

KINDS = {"short": 1.0, "long": 3.0}
KEEP = OrderConfig(caption_first=1, caption_dropout=0)
MOMENTS = np.ones((4, 4, 4), np.float16)  # 4 tokens in patches of 2


def several(count: int, longest: int = 8, seed: int = 0) -> list[Record]:
    """Return pictures with one to four captions each, as versions before kinds of captions wrote them."""
    rng = np.random.default_rng((seed, 7))
    records = []
    for i in range(count):
        captions = [rng.integers(4, 270, rng.integers(1, longest + 1), np.int32) for _ in range(rng.integers(1, 5))]
        moments = (rng.integers(-64, 64, (4, 4, 4)) / 16).astype(np.float16)
        records.append(encode_record(f"{i:06d}", [moments], b"{}", captions))
    return records


def picture(number: int, *kinds: tuple[int, int]) -> Record:
    """Return a picture with captions of these (kind, length); a caption's tokens say its kind and place: 10, 11, 20."""
    captions = [np.full(length, 10 * (kind + 1) + place, np.int32) for place, (kind, length) in enumerate(kinds)]
    image, numbers = MOMENTS + np.float16(number % 7), [kind for kind, _ in kinds]
    return encode_record(f"{number:06d}", [image], b"{}", captions, caption_kinds=numbers)


def mixed(count: int, long: tuple[int, int] = (20, 40), seed: int = 0) -> list[Record]:
    """Return pictures of which each has one or two short captions, and nine in ten a long one."""
    rng = np.random.default_rng((seed, 8))
    several = []
    for i in range(count):
        short = [(0, int(rng.integers(1, 6))) for _ in range(rng.integers(1, 3))]
        several.append(picture(i, *short, *([(1, int(rng.integers(*long)))] if rng.random() < 0.9 else [])))
    return several


def drawn(record: Record, epochs: int, weights: Sequence[float], room: int | None = None) -> list[int | None]:
    """Return the tokens of the caption drawn from a record in each epoch, None for none."""
    document = decode_document(record, "here")
    origin = {"seed": 0, "source": 0, "shard": 0, "record": 0, "weights": weights, "room": room}
    found = [arrange(document, KEEP, epoch=epoch, **origin).segments for epoch in range(epochs)]
    return [next((int(s.token_ids[0]) for s in segments if isinstance(s, TextSegment)), None) for segments in found]


def written(
    folder: Path,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    shard_size: int = 50,
    captions: Mapping[str, float] | None = None,
) -> Path:
    """Write encoded records as a data set, of these kinds of captions."""
    folder.mkdir(parents=True)
    entries = []
    for number, first in enumerate(range(0, len(records), shard_size)):
        shard = folder / f"{number:05d}.tar"
        write_shard(shard, records[first : first + shard_size])
        tokens = CaptionTokens()
        index = index_shard(shard, lambda record, tokens=tokens: document_sizes(record, tokens), BadRecords(0))
        index.save(index_path(shard))
        entries.append(shard_entry(shard, index, tokens if captions else None))
    store, spec = Store(str(folder)), latent_spec(2)
    names = {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    Manifest(store=store, latent_spec=spec, shards=tuple(entries), captions=dict(captions or {}), **names).save()
    return folder


def test_data_of_before_kinds_of_captions_keeps_its_hash_and_its_draws(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Both computed by the version before: runs on such data resume."""
    folder = written(tmp_path / "old", tokenizer, several(120))
    manifest = replace(Manifest.load(folder), tokenizer_hash="t", vocab_size=280)
    assert manifest.content_hash == "dc3f6910f9b04c2e"
    data, lanes = open_lanes(data_config(tokenizer, {"old": folder}), seed=3)
    rows = [as_bytes(lane.next_row()) for _ in range(40) for lane in lanes]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == "d2f00f1b54345361"
    said = data.fingerprint(1)["source 0"]
    assert said == f"{Manifest.load(folder).content_hash} weight 1.0 repeat True"


def test_a_kind_is_drawn_by_weight_and_then_each_of_its_captions_is_as_likely() -> None:
    """Within four standard deviations over 4,000 epochs. A missing kind falls to the others; weight 0 is not drawn."""
    draws = 4000
    three = [picture(0, (0, 1), (1, 2), (1, 3), (2, 4)), picture(0, (1, 2), (2, 3)), picture(0, (0, 2))]
    cases = [
        (three[0], (1, 2, 5), {10: 1 / 8, 21: 1 / 8, 22: 1 / 8, 33: 5 / 8}),
        (three[0], (0, 0.5, 0.1), {21: 5 / 12, 22: 5 / 12, 33: 1 / 6}),
        (three[1], (1, 2, 5), {20: 2 / 7, 31: 5 / 7}),
        (three[2], (1e-9, 2, 5), {10: 1.0}),
        (three[2], (0, 2, 5), {None: 1.0}),
    ]
    for record, weights, shares in cases:
        found = Counter(drawn(record, draws, weights))
        assert found.keys() == shares.keys()
        for caption, share in shares.items():
            assert abs(found[caption] - draws * share) <= 4 * math.sqrt(draws * share * (1 - share)), (weights, caption)


def test_a_caption_that_fits_is_preferred_to_one_that_does_not() -> None:
    record, weights = picture(0, (0, 3), (0, 30), (1, 20), (2, 5), (2, 50)), (1, 2, 0)
    free = drawn(record, 300, weights)
    assert set(free) == {10, 11, 22}
    for room, fitting in ((49, {10, 11, 22}), (20, {10, 22}), (19, {10}), (2, {10, 11, 22})):
        found = drawn(record, 300, weights, room)
        assert set(found) == fitting, "weight 0 is not drawn though it fits, and if none fits any is"
        assert all(a == b for a, b in zip(free, found, strict=True) if a in fitting), "one that fits is drawn as before"


def test_captions_of_wrong_kinds_are_refused_by_reason() -> None:
    good = picture(0, (0, 1), (1, 2))
    wrong = [[], [0], [0, 1, 0], [0, -1], [-(2**31), 0]]
    for kinds in wrong:
        with pytest.raises(BadRecord, match=r"here: wrong captions \(kinds .* of 2 captions\)"):
            decode_document({**good, "caption_kinds.npy": npy(np.array(kinds, np.int32))}, "here")
    for array in (np.zeros(2), np.zeros((1, 2), np.int32), np.zeros(2, np.int64)):
        with pytest.raises(BadRecord, match="wrong array"):
            decode_document({**good, "caption_kinds.npy": npy(array)}, "here")
    for kinds, known in (([0, 1], 1), ([0, 1], 0), ([2**31 - 1, 0], 2)):
        document = decode_document({**good, "caption_kinds.npy": npy(np.array(kinds, np.int32))}, "here")
        with pytest.raises(
            BadRecord, match=rf"wrong captions \(kind {max(kinds)}, but the manifest names {known} kinds"
        ):
            check_document(document, 300, "moments", 2, "here", known)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("kinds") / "a", tokenizer, mixed(150), captions=KINDS)


def config_of(tokenizer: Tokenizer, folder: Path, order: OrderConfig = KEEP, **source: Any) -> DataConfig:
    return data_config(tokenizer, {"a": SourceConfig(path=str(folder), **source)}, order=order)


@pytest.mark.filterwarnings("ignore::UserWarning:torchdata")
def test_any_number_of_ranks_and_a_resume_give_the_same_captions_and_each_epoch_others(
    folder: Path, tokenizer: Tokenizer
) -> None:
    """P3 and P4."""
    config = config_of(tokenizer, folder, OrderConfig())
    batches, states = run(config, 6)
    assert run(config, 6, world_size=3)[0] == batches
    assert run(config, 3, world_size=3, first_step=4, states=states[2])[0] == batches[3:]
    data, _ = open_lanes(config)
    pieces = [[data.sources[0].read(0, epoch, 0, n).input_ids.tobytes() for n in range(50)] for epoch in (0, 1)]
    assert 10 < sum(a != b for a, b in zip(*pieces, strict=True)) < 50


def shown(config: DataConfig) -> Counter:
    """Count the captions by kind that one epoch of the data shows."""
    data, _ = open_lanes(config)
    ids = [data.sources[0].read(0, 0, *divmod(n, 50)).input_ids[1] for n in range(150)]
    return Counter(int(first) // 10 for first in ids)


def test_weights_may_change_at_training_and_are_part_of_what_a_resume_compares(
    folder: Path, tokenizer: Tokenizer
) -> None:
    encoded, other = config_of(tokenizer, folder), config_of(tokenizer, folder, captions={"short": 1.0})
    found = shown(encoded)
    assert 0.55 < found[2] / 150 < 0.8 and found[1] + found[2] == 150  # nine in ten have both, then three in four
    assert shown(other) == {1: 150}, "a kind left out has weight 0"
    said = [open_data(config, 0, 2).fingerprint(1) for config in (encoded, other)]
    assert said[0]["source 0"].endswith(" repeat True captions {'short': 1.0, 'long': 3.0}")
    (change,) = differences(*said).values()
    assert "captions {'short': 1.0, 'long': 3.0}, is " in change and "{'short': 1.0, 'long': 0.0}" in change


def test_names_that_the_data_lacks_are_refused_with_a_remedy(
    folder: Path, pairs_folder: Path, tokenizer: Tokenizer
) -> None:
    for path, given, message in (
        (folder, {"short": 1.0, "lnog": 1.0}, r"no captions lnog in this data; expected some of \['short', 'long'\]"),
        (pairs_folder, {"a": 1.0}, r"data.sources.a.captions=\{'a': 1.0\}: this data has no kinds .* caption_keys=\{"),
    ):
        with pytest.raises(ValueError, match=message):
            open_data(config_of(tokenizer, path, captions=given), 0, 2)
    for given in ({"a": 0.0}, {"a": -1.0, "b": 2.0}, {"a": math.nan}):
        with pytest.raises(ValueError, match=r"captions=.*: expected finite weights, 0 or more, and one above 0"):
            SourceConfig(path="a", captions=given)
    with pytest.raises(ValueError, match=r"caption_dropout=1.5: expected a share in \[0, 1\]"):
        SourceOrderConfig(caption_dropout=1.5)


def test_each_source_may_have_an_order_of_its_own(folder: Path, pairs_folder: Path, tokenizer: Tokenizer) -> None:
    alone = SourceConfig(path=str(folder), order=SourceOrderConfig(caption_dropout=1.0))
    last = SourceConfig(path=str(pairs_folder), order=SourceOrderConfig(caption_first=0.0))
    common = {"c": SourceConfig(path=str(pairs_folder))}
    data = open_data(data_config(tokenizer, {"a": alone, "b": last, **common}, order=KEEP), 0, 2)
    boi, firsts = tokenizer.special.boi, []
    for source in data.sources:
        pieces = [source.read(0, 0, 0, record) for record in range(7)]
        firsts.append({"image" if piece.input_ids[1] == boi else "text" for piece in pieces})
        if source.number == 0:
            assert {len(piece) for piece in pieces} == {8}
    assert firsts == [{"image"}, {"image"}, {"text"}]
    said = data.fingerprint(1)
    assert said["source 0"].endswith("} caption_dropout 1.0") and said["source 1"].endswith(" True caption_first 0.0")
    assert said["source 2"].endswith("repeat True") and said["order"] == str(KEEP)


def test_image_share_counts_the_captions_drawn_and_each_sources_own_dropout(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Against the mean over 10 epochs of what the source gives; half a percent is what the sums may be off."""
    words = SourceConfig(path=str(make_source(tmp_path / "words", tokenizer, texts(20))))
    for weights, dropout in (({}, None), ({"short": 1.0}, None), ({"short": 1.0, "long": 1.0}, 0.5)):
        order = SourceOrderConfig(caption_dropout=dropout)
        source = SourceConfig(path=str(folder), captions=weights, order=order)
        config = data_config(tokenizer, {"a": source, "b": words}, order=KEEP, image_share=0.1)
        data = open_data(config, 0, 2)
        read = [data.sources[0].read(0, epoch, *divmod(n, 50)) for epoch in range(10) for n in range(150)]
        assert all(len(piece.images) == 1 for piece in read)
        share = 4 * len(read) / sum(map(len, read))
        assert data.sources[0].config.weight * share == pytest.approx(0.1, rel=0.03)
    manifest = Manifest.load(folder)
    old = replace(manifest, shards=tuple(replace(shard, caption_tokens={}) for shard in manifest.shards))
    longest = sum(shard.tokens(2) for shard in old.shards)
    assert old.image_token_share(2) == 600 / longest, "shards without the sums count the longest, as they did"


def test_a_document_is_too_long_only_if_no_caption_that_may_be_drawn_fits(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [picture(0, (0, 3), (1, 90)), picture(1, (0, 70), (1, 80)), picture(2, (0, 80)), picture(3, (1, 60))]
    records += [picture(4 + i, (0, 4), (1, 5)) for i in range(4)]
    path = written(tmp_path / "long", tokenizer, records, captions=KINDS)
    for weights, expected in (({}, {1, 2, 3}), ({"long": 1.0}, {0, 1, 3}), ({"short": 1.0}, {1, 2})):
        source = open_data(config_of(tokenizer, path, captions=weights), 0, 2).sources[0]
        assert source.too_long == {(0, record) for record in expected}
        for record in range(8):
            if record in expected:
                with pytest.raises(BadRecord, match="longer than a sequence"):
                    source.read(0, 0, 0, record)
            else:
                assert len({len(source.read(0, epoch, 0, record)) for epoch in range(9)}) <= 2
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["captions"], manifest["shards"][0]["caption_tokens"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    source = open_data(config_of(tokenizer, path), 0, 2).sources[0]  # bad records are counted when they are met
    assert not source.too_long
    with pytest.raises(BadRecord, match="wrong captions"):
        source.read(0, 0, 0, 0)


def test_rows_are_full_on_a_mix_of_short_and_long_captions(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """And every lane meets each document once an epoch, though ranges count the longest captions."""
    path = written(tmp_path / "mix", tokenizer, mixed(600, long=(30, 120)), captions={"short": 1, "long": 1})
    words = make_source(tmp_path / "words", tokenizer, texts(300, lengths=(5, 300)))
    sources = {"a": SourceConfig(path=str(path)), "b": SourceConfig(path=str(words))}
    _, lanes = open_lanes(data_config(tokenizer, sources, sequence_length=256, look_ahead=16))
    fill = np.mean([np.mean(lane.next_row().document_ids > 0) for _ in range(60) for lane in lanes])
    print(f"fill {fill:.4f}")
    assert fill >= 0.98
    once = {"a": SourceConfig(path=str(path), repeat=False)}
    _, lanes = open_lanes(data_config(tokenizer, once, sequence_length=256, look_ahead=16))
    rows, met = [], 0
    for lane in lanes:
        rows.append(0)
        while (row := lane.next_row()) is not None:
            rows[-1] += 1
            met += len(row.images)
    print(f"rows of each lane's epoch {rows}")
    assert met == 600 and max(rows) - min(rows) <= 0.25 * max(rows), "of 150 documents each, half of them short"
