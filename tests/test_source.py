"""Each epoch a source gives every document to one lane, and weights add up to the same bits everywhere."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from data.documents import seed_from
from data.source import Source, sum_in_order
from data.tokenizer import Tokenizer
from tests.sources import data_config
from tests.test_lanes import open_lanes


def positions(source: Source, epoch: int, lane: int) -> list[tuple[int, int]]:
    found = (source.position(epoch, lane, ordinal) for ordinal in itertools.count())
    return list(itertools.takewhile(lambda position: position is not None, found))


@pytest.mark.parametrize("lanes", [1, 4, 6, 7])
def test_each_epoch_gives_every_document_to_one_lane_by_its_first_token(
    pairs_folder: Path, tokenizer: Tokenizer, lanes: int
) -> None:
    """Against the rule: permute the shards, lay documents end to end, cut at equal tokens, deal the ranges out."""
    data, _ = open_lanes(data_config(tokenizer, {"a": pairs_folder}, lanes=lanes), seed=5)
    source = data.sources[0]
    lengths = {
        shard: source.manifest.load_index(shard).document_tokens(2).tolist()
        for shard in range(len(source.manifest.shards))
    }
    total = sum(map(sum, lengths.values()))
    orders, dealt = set(), set()
    for epoch in range(6):
        order = np.random.default_rng(seed_from("epoch", 5, epoch, 0)).permutation(len(lengths)).tolist()
        orders.add(tuple(order))
        ranges: list[list[tuple[int, int]]] = [[] for _ in range(lanes)]
        begin = 0
        for shard in order:
            for record, length in enumerate(lengths[shard]):
                ranges[next(n for n in range(lanes) if begin < total * (n + 1) // lanes)].append((shard, record))
                begin += length
        found = [positions(source, epoch, lane) for lane in range(lanes)]
        parts = [ranges.index(sorted(lane, key=lambda place: (order.index(place[0]), place[1]))) for lane in found]
        assert sorted(parts) == list(range(lanes))  # each range is one lane's
        dealt.add(tuple(parts))
        for lane, part in zip(found, parts, strict=True):
            for block in range(0, len(lane), 8):  # shuffled, but only inside blocks
                assert sorted(lane[block : block + 8]) == sorted(ranges[part][block : block + 8])
            tokens = sum(lengths[shard][record] for shard, record in lane)
            assert abs(tokens - total / lanes) <= max(map(max, lengths.values())) + 1
    assert len(orders) > 1 and (len(dealt) > 1 or lanes == 1)


def test_weights_add_up_to_the_same_bits_under_every_python() -> None:
    """P2, P4: the mix depends on them and a resume compares them; `sum` gives 1.0 from Python 3.12 on."""
    assert sum_in_order([0.1] * 10) == sum_in_order(iter([0.1] * 10)) == 0.9999999999999999
    assert sum_in_order([]) == 0
