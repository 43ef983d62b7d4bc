"""Of several captions one is drawn: by weight, the same on any rank and after a resume, another in another epoch."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.documents import document_sizes, encode_record
from data.manifest import Manifest, shard_entry
from data.shard_index import index_path
from data.shards import BadRecords, Record, index_shard, write_shard
from data.storage import Store
from data.tokenizer import Tokenizer
from tests.sources import data_config, latent_spec
from tests.test_lanes import as_bytes, open_lanes


def several(count: int, longest: int = 8, seed: int = 0) -> list[Record]:
    """Return pictures with one to four captions each, as versions before kinds of captions wrote them."""
    rng = np.random.default_rng((seed, 7))
    records = []
    for i in range(count):
        captions = [rng.integers(4, 270, rng.integers(1, longest + 1), np.int32) for _ in range(rng.integers(1, 5))]
        moments = (rng.integers(-64, 64, (4, 4, 4)) / 16).astype(np.float16)
        records.append(encode_record(f"{i:06d}", [moments], b"{}", captions))
    return records


def written(folder: Path, tokenizer: Tokenizer, records: Sequence[Record], shard_size: int = 50) -> Path:
    """Write encoded records as a data set."""
    folder.mkdir(parents=True)
    entries = []
    for number, first in enumerate(range(0, len(records), shard_size)):
        shard = folder / f"{number:05d}.tar"
        write_shard(shard, records[first : first + shard_size])
        index = index_shard(shard, document_sizes, BadRecords(0))
        index.save(index_path(shard))
        entries.append(shard_entry(shard, index))
    store, spec = Store(str(folder)), latent_spec(2)
    names = {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    Manifest(store=store, latent_spec=spec, shards=tuple(entries), **names).save()
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
