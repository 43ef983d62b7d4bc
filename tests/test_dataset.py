"""What a run refuses at start: value, expectation, remedy (P10); and a manifest reads back."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.dataset import DataConfig, open_data
from data.documents import KINDS
from data.manifest import LatentSums, Manifest, ShardEntry
from data.shards import BadRecord
from data.storage import Store
from data.tokenizer import Tokenizer, train_tokenizer
from tests.sources import data_config, latent_spec, make_source, pairs, texts

PATCH = 2


def refusal(config: DataConfig, patch_size: int = PATCH, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        open_data(config, 0, patch_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_data_is_refused(tmp_path: Path, texts_folder: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty").mkdir()
    for name, state in (("none", "does not exist"), ("empty", "has no manifest.json")):
        message = refusal(data_config(tokenizer, {"a": tmp_path / name}), kind=FileNotFoundError)
        assert message == f"data folder {tmp_path / name} {state}; make it with `python -m train.encode`"
    assert "name at least one, e.g. data.sources.images.path=FOLDER" in refusal(data_config(tokenizer, {}))
    lost = data_config(tokenizer, {"a": texts_folder})
    message = refusal(replace(lost, tokenizer=str(tmp_path / "none.model")), kind=FileNotFoundError)
    assert "none.model: no such file; train one with `python -m train.tokenizer`" in message


def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = make_source(tmp_path / "a", tokenizer, pairs(5))
    config = data_config(tokenizer, {"a": folder})
    whole = json.loads((folder / "manifest.json").read_text())
    shard, spec = whole["shards"][0], whole["latent_spec"]
    cases = [
        ("{", "is not a manifest this program reads"),
        ("[1]", "is not a manifest this program reads"),
        ("7", "is not a manifest this program reads"),
        ({**whole, "format_version": 99}, "format version 99, this program reads 2"),
        ({**whole, "surprise": 1}, "surprise"),
        ({**whole, "shards": []}, "lists no records; the data set is empty"),
        ({**whole, "shards": [{**shard, "name": "../b.tar"}]}, "expected a file in the manifest's folder"),
        ({**whole, "shards": [{**shard, "records": "9"}]}, "records='9': expected a whole number"),
        ({**whole, "shards": [{**shard, "text_tokens": -1}]}, "text_tokens=-1: expected a whole number"),
        ({**whole, "shards": [{**shard, "grids": {"0x0": 1}}]}, "latent grid '0x0': expected HEIGHTxWIDTH"),
        ({**whole, "vocab_size": "5"}, "vocab_size='5': expected a whole number"),
        ("[" * 100_000, "is not a manifest this program reads"),
        ({**whole, "latent_spec": {**spec, "std": [1.0, 0.0]}}, "expected finite numbers and std > 0"),
        ({**whole, "latent_spec": {**spec, "mean": [1.0]}}, "expected 2 channels"),
        ({**whole, "latent_spec": {**spec, "kind": "video"}}, "latent kind 'video': expected one of moments, latents"),
        ({**whole, "latent_spec": {**spec, "kind": "pixels"}}, "channels 2, stride 8: expected 3 and 1"),
    ]
    for content, expected in cases:
        (folder / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))
        message = refusal(config)
        assert expected in message and str(folder / "manifest.json") in message


def test_shards_that_are_not_those_of_the_manifest_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = make_source(tmp_path / "a", tokenizer, texts(10), shard_sizes=[5, 5])
    config = data_config(tokenizer, {"a": folder})
    with (folder / "00001.tar").open("ab") as file:
        file.write(b"x")
    size = (folder / "00001.tar").stat().st_size
    assert f"{folder / '00001.tar'} is {size} bytes, the manifest says {size - 1}; restore it" in refusal(config)
    (folder / "00001.tar").unlink()
    assert f"{folder / '00001.tar'} is missing; restore it, or encode the data set again" in refusal(config)
    (folder / "00000.tar.idx").unlink()
    assert (
        f"{folder / '00000.tar.idx'} is missing; restore it, or make it again with `python -m train.encode index="
        in refusal(config)
    )


def test_data_of_another_tokenizer_is_refused(tmp_path: Path, texts_folder: Path, tokenizer: Tokenizer) -> None:
    train_tokenizer((f"other words for number {i}" for i in range(100)), tmp_path / "other.model", 300)
    other = Tokenizer(tmp_path / "other.model")
    message = refusal(data_config(other, {"words": texts_folder}))
    assert message == (
        f"data.sources.words was encoded with tokenizer {tokenizer.hash}, but {other.path} is {other.hash}; "
        "name the tokenizer it was encoded with, or encode it again"
    )


def test_latents_of_two_vaes_are_refused(tmp_path: Path, pairs_folder: Path, tokenizer: Tokenizer) -> None:
    other = make_source(tmp_path / "b", tokenizer, pairs(5), vae_hash="b" * 16)
    message = refusal(data_config(tokenizer, {"one": pairs_folder, "two": other}))
    assert message.startswith(
        f"data.sources.two holds latents of VAE {'b' * 16}, other sources hold latents of VAE aaa"
    )
    assert "encode all sources with one vae=" in message


def test_images_of_two_kinds_are_refused(tmp_path: Path, pairs_folder: Path, tokenizer: Tokenizer) -> None:
    """Whatever made them. Between the sources, and a record within one that is not what its manifest says."""
    pixels = make_source(tmp_path / "b", tokenizer, pairs(5, kind="pixels"), kind="pixels")
    latents = make_source(tmp_path / "c", tokenizer, pairs(5, kind="latents"), kind="latents")
    message = refusal(data_config(tokenizer, {"one": pairs_folder, "two": pixels}))
    assert message.startswith("data.sources.two holds pixels, other sources hold latents of VAE aaa")
    assert "data.sources.c holds latents of the deterministic autoencoder aaa" in refusal(
        data_config(tokenizer, {"b": pixels, "c": latents})
    )
    data = open_data(data_config(tokenizer, {"b": pixels}), 0, PATCH)
    assert data.kind == "pixels" and len(data.sources[0].read(0, 0, 0, 0).images) == 1
    whole = json.loads((pixels / "manifest.json").read_text())
    del whole["latent_spec"]["kind"]
    (pixels / "manifest.json").write_text(json.dumps(whole))
    lying = open_data(data_config(tokenizer, {"b": pixels}), 0, PATCH).sources[0]
    with pytest.raises(BadRecord, match="pixels, the manifest says moments") as caught:
        lying.read(0, 0, 0, 0)
    assert caught.value.reason == "another kind of image"


def test_fewer_documents_than_lanes_are_refused(pairs_folder: Path, tokenizer: Tokenizer) -> None:
    config = data_config(tokenizer, {"a": pairs_folder}, lanes=61)
    assert refusal(config) == (
        "data.sources.a has 60 documents, fewer than data.lanes=61; use fewer lanes or more data"
    )
    open_data(replace(config, lanes=60), 0, PATCH)


def test_an_image_longer_than_a_sequence_is_refused(pairs_folder: Path, tokenizer: Tokenizer) -> None:
    config = data_config(tokenizer, {"a": pairs_folder}, sequence_length=11)
    message = refusal(config)
    assert message == (
        "an image of latent grid 4x8 is 12 tokens with BOS, BOI, EOI, EOS, more than data.sequence_length=11; "
        "use longer sequences or larger patches"
    )
    open_data(replace(config, sequence_length=12), 0, PATCH)
    assert "latent grid 4x4 is not a multiple of patch_size=3; choose another patch size" in refusal(config, 3)


@pytest.mark.parametrize("name", ["lanes", "sequence_length", "shuffle_block", "look_ahead", "prefetch_steps"])
def test_numbers_below_their_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"data.{name}=0: expected at least 1"):
        DataConfig(tokenizer="a", **{name: 0})
    for other in ("num_workers", "max_bad_documents"):
        with pytest.raises(ValueError, match=rf"data.{other}=-1: expected 0 or more"):
            DataConfig(tokenizer="a", **{other: -1})


def test_a_manifest_reads_back(pairs_folder: Path) -> None:
    manifest = Manifest.load(pairs_folder)
    assert manifest.records == 60 and [shard.records for shard in manifest.shards] == [31, 7, 22]
    assert manifest.grids() == {(4, 4), (4, 8)}
    for number, shard in enumerate(manifest.shards):
        index = manifest.load_index(number)
        for patch_size in (1, 2, 4):
            assert shard.tokens(patch_size) == index.document_tokens(patch_size).sum()
    again = Manifest.load(pairs_folder)
    assert again == manifest and again.content_hash == manifest.content_hash
    assert replace(manifest, shards=manifest.shards[:2]).content_hash != manifest.content_hash


def test_the_manifest_of_moments_is_the_same_bytes_as_ever_and_names_other_kinds(tmp_path: Path) -> None:
    """The hashes are of the file before there were other kinds: resumes and caches compare them."""
    counts = {"bytes": 9, "index_crc32": 1, "records": 2, "largest_record": 3, "text_tokens": 4}
    shard = ShardEntry(name="a.tar", grids={"4x4": 2}, **counts)
    given = {"tokenizer_hash": "t" * 16, "vocab_size": 280, "shards": (shard,)}
    contents = {}
    for kind in KINDS:
        spec = latent_spec(3 if kind == "pixels" else 2, kind=kind)
        manifest = Manifest(store=Store(str(tmp_path)), latent_spec=spec, **given)
        manifest.save()
        assert Manifest.load(tmp_path) == manifest and manifest.kind_and_channels == (kind, spec.channels)
        contents[kind] = (manifest.content_hash, (tmp_path / "manifest.json").read_bytes())
    assert contents["moments"][0] == "ca7be1ed4a2f9280" and len(set(contents.values())) == 3
    assert hashlib.sha256(contents["moments"][1]).hexdigest()[:16] == "35a888b0b5662b58"
    assert b'"kind": "latents"' in contents["latents"][1] and b"kind" not in contents["moments"][1]


def test_the_statistics_of_each_kind_are_of_its_raw_latents() -> None:
    """Moments add the posterior's variance, pixels count from -1 to 1; against numpy's over all cells."""
    rng = np.random.default_rng(0)
    images = [rng.normal(1, 2, (4, 3, n)).astype(np.float16) for n in (4, 6)]
    pixels = [rng.integers(0, 256, (3, 3, n), dtype=np.uint8) for n in (4, 6)]
    for kind, given in {"moments": images, "latents": images, "pixels": pixels}.items():
        sums = LatentSums.total({"moments": 2, "latents": 4, "pixels": 3}[kind])
        for array in given:
            sums.add(array, kind)
        cells = np.concatenate([array.reshape(len(array), -1).astype(np.float64) for array in given], axis=1)
        if kind == "pixels":
            cells = cells / 127.5 - 1
        mean, std = cells.mean(1), cells.std(1)
        if kind == "moments":
            mean, std = mean[:2], np.sqrt(std[:2] ** 2 + np.exp(cells[2:]).mean(1))
        np.testing.assert_allclose(sums.mean, mean, rtol=1e-9)
        np.testing.assert_allclose(sums.std, std, rtol=1e-9)
