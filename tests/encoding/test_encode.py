"""The encoding job: what comes out of it, and the same bytes however often it is killed."""

import http.server
import json
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset as wds

from data.dataset import open_data
from data.documents import TextSegment, decode_document
from data.lanes import Lane
from data.manifest import Manifest
from data.pictures import to_unit
from data.shards import Record, read_at
from data.tokenizer import Tokenizer
from model.autoencoders import load_latent_space
from model.vae import moments
from tests.encoding.jobs import (
    OUT,
    Capsys,
    Contents,
    Encode,
    arguments,
    contents_of,
    latents_in,
    picture_record,
    pixels_of,
    raw_folder,
    write_times,
)
from tests.sources import data_config, encoded_records
from tests.test_tokenizer import foreign_model
from train.encode import main

pytestmark = pytest.mark.usefixtures("one_thread", "in_an_empty_folder")


@torch.no_grad()
def assert_encoded(found: np.ndarray, vae: torch.nn.Module, number: int) -> None:
    """Compare moments f16 with the VAE on `picture_record(number)`'s picture by itself."""
    expected = moments(vae, torch.from_numpy(to_unit(pixels_of(number)[None])))[0]
    torch.testing.assert_close(torch.from_numpy(found.copy()).float(), expected, rtol=2e-3, atol=2e-3)


# ---- what comes out ----


def test_pictures_become_the_vaes_moments_and_the_captions_tokens(
    raw: Path, encode: Encode, tokenizer: Tokenizer, vae_folder: Path
) -> None:
    """Against the VAE on each picture by itself; same keys, same shards."""
    encode(raw)
    vae = load_latent_space(vae_folder).module
    records = encoded_records(OUT)
    assert [r["__key__"] for r in records] == [f"{i:05d}".encode() for i in range(14)]
    for number, record in enumerate(records):
        document = decode_document(record, "here")
        text, image = document.segments
        assert tokenizer.decode(text.token_ids) == f"a large red circle number {number}"
        assert json.loads(record["json"]) == {"id": number, "caption": f"a large red circle number {number}"}
        assert image.array.shape == (4, 8, 8)
        assert_encoded(image.array, vae, number)


def test_the_manifest_says_what_is_there(raw: Path, encode: Encode, tokenizer: Tokenizer, vae_folder: Path) -> None:
    """Counts, checksums, hashes and the latents' statistics, these against numpy on all latents at once."""
    encode(raw)
    manifest = Manifest.load(OUT)
    manifest.check_files()
    assert [(shard.name, shard.records) for shard in manifest.shards] == [("a.tar", 5), ("b.tar", 3), ("c.tar", 6)]
    assert manifest.tokenizer_hash == tokenizer.hash and manifest.vocab_size == tokenizer.vocab_size
    spec = manifest.latent_spec
    assert spec.vae_hash == load_latent_space(vae_folder).hash
    assert (spec.channels, spec.stride, spec.resolution) == (2, 4, 32)
    mean, logvar = np.split(latents_in(OUT).astype(np.float64), 2, axis=1)
    expected_mean = mean.mean((0, 2, 3))
    expected_variance = (mean**2 + np.exp(logvar)).mean((0, 2, 3)) - expected_mean**2
    np.testing.assert_allclose(spec.mean, expected_mean, rtol=1e-9)
    np.testing.assert_allclose(spec.std, np.sqrt(expected_variance), rtol=1e-9)
    noise = np.random.default_rng(0).normal(size=(200, *mean.shape))
    sampled = mean + np.exp(logvar / 2) * noise
    np.testing.assert_allclose(spec.std, sampled.std((0, 1, 3, 4)), rtol=0.01)
    for number, shard in enumerate(manifest.shards):
        index = manifest.load_index(number)
        assert shard.text_tokens == index.text_tokens.sum() and shard.grids == {"8x8": shard.records}
        with open(OUT / shard.name, "rb") as file:
            for span in index.spans:
                read_at(lambda offset, length: os.pread(file.fileno(), length, offset), span, "here")


def test_training_can_read_it_and_so_can_webdataset(raw: Path, encode: Encode, tokenizer: Tokenizer) -> None:
    encode(raw)
    data = open_data(data_config(tokenizer, {"a": OUT}), 0, patch_size=2)
    assert Lane(0, data.sources, data.settings).next_row().images
    samples = list(wds.WebDataset([str(OUT / f"{name}.tar") for name in "abc"], shardshuffle=False).decode())
    assert len(samples) == 14 and samples[0]["moments.npy"].shape == (4, 8, 8)


def test_text_becomes_tokens(encode: Encode, tokenizer: Tokenizer) -> None:
    """Lines of .jsonl and whole .txt files, dots in their names; no VAE is needed."""
    folder = Path("texts")
    folder.mkdir()
    lines = ["first\nline", "second", "", "third 🎉"]
    (folder / "part.0001.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "story.v2.txt").write_text("once upon a time\n")
    encode(folder, vae=None, max_bad_fraction=0.5)
    records = encoded_records(OUT)
    texts = [tokenizer.decode(decode_document(r, "here").segments[0].token_ids) for r in records]
    assert texts == ["first\nline", "second", "third 🎉", "once upon a time\n"]
    assert [r["__key__"].decode() for r in records] == [*(f"part_0001-{i:08d}" for i in (0, 1, 3)), "story_v2-00000000"]
    manifest = Manifest.load(OUT)
    assert manifest.latent_spec is None and [s.name for s in manifest.shards] == ["part.0001.tar", "story.v2.tar"]


def test_interleaved_documents_keep_their_order(encode: Encode, tokenizer: Tokenizer, vae_folder: Path) -> None:
    """Texts and pictures of one record, among pairs, from the raw tar to the lanes; more of them than a batch."""
    first, second = (picture_record(i)["png"] for i in (1, 2))
    listed = ["one red", {"image": "a.png"}, {"image": "b.png"}, "two blue", {"image": "a.png"}, "three"]
    records: list[Record] = []
    for i in range(30):
        info = json.dumps({"segments": listed, "id": i}).encode()
        records.append({"__key__": f"{i:03d}".encode(), "a.png": first, "b.png": second, "json": info})
        records.append({**picture_record(i), "__key__": f"{i:03d}b".encode()})
    encode(raw_folder(Path("raw"), {"a": records}), OUT)
    found = encoded_records(OUT)
    assert [r["__key__"] for r in found] == [r["__key__"] for r in records]
    vae = load_latent_space(vae_folder).module
    for record in found[::2]:
        segments = decode_document(record, "here").segments
        texts = [tokenizer.decode(s.token_ids) if isinstance(s, TextSegment) else None for s in segments]
        assert texts == ["one red", None, None, "two blue", None, "three"]
        for place, number in ((1, 1), (2, 2), (4, 1)):
            assert_encoded(segments[place].array, vae, number)
    assert len(decode_document(found[1], "here").segments) == 2
    manifest = Manifest.load(OUT)
    assert manifest.shards[0].grids == {"8x8": 120}
    data = open_data(data_config(tokenizer, {"a": OUT}, sequence_length=128), 0, patch_size=2)
    assert len(Lane(0, data.sources, data.settings).next_row().images) >= 3
    others = encode(Path("raw"), Path("out2"), decode_threads=3)
    assert others == contents_of(OUT)


def test_a_list_of_captions_becomes_several_and_what_is_none_is_counted(
    encode: Encode, tokenizer: Tokenizer, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From JSON under a key of its own to what training draws; a job in which the key is missing names it."""
    values: list[object] = [["a red circle", "a round thing"], float("nan"), 7, "null", "a square"]
    records = [picture_record(i, txt=None, json=json.dumps({"TEXT": v}).encode()) for i, v in enumerate(values)]
    raw = raw_folder(Path("raw"), {"a": records})
    with pytest.raises(ValueError, match=r"no caption: 5.*caption_keys={KEY: 1} chooses one of \['TEXT'\]"):
        encode(raw)
    encode(raw, caption_keys={"TEXT": 1}, max_bad_fraction=0.6)
    said, warned = capfd.readouterr()
    assert "2 records in 1 shard in" in said and "skipped no caption: 3" in said
    assert "kept in float32" not in warned, "diffusers' warning of an empty list"
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    encode(raw, caption_keys={"TEXT": 1}, max_bad_fraction=0.6)
    assert "records in" not in capfd.readouterr().out, "torchrun's ranks print the totals once"
    several, one = (decode_document(r, "here") for r in encoded_records(OUT))
    assert [tokenizer.decode(s.token_ids) for s in several.captions] == values[0] and not one.captions
    data = open_data(data_config(tokenizer, {"a": OUT}, lanes=1), 0, patch_size=2)
    lane = Lane(0, data.sources, data.settings)
    drawn = " ".join(tokenizer.decode(lane.next_row().input_ids) for _ in range(40))
    assert all(caption in drawn for caption in ("a red circle", "a round thing", "a square"))


def test_tokens_that_the_tokenizer_does_not_know_are_counted_and_shown(capsys: Capsys) -> None:
    Path("raw").mkdir()
    (Path("raw") / "a.jsonl").write_text('{"text": "some 中 words"}\n{"text": "for number é 1"}\n')
    foreign = Tokenizer(foreign_model(Path("foreign.model")))
    tokens = sum(len(foreign.encode(text)) for text in ("some 中 words", "for number é 1"))
    said = f"encode: warning: {2 / tokens:.2%} of the tokens are unknown to {foreign.path}, such as ['中', 'é']"
    for _ in range(2):  # the second time nothing is left to do
        main(arguments(Path("raw"), OUT, foreign))
        assert said in capsys.readouterr().out
    sidecar = json.loads((OUT / "a.tar.json").read_text())
    del sidecar["words"]  # as earlier versions wrote it
    (OUT / "a.tar.json").write_text(json.dumps(sidecar))
    written = (OUT / "a.tar").stat().st_mtime_ns
    main(arguments(Path("raw"), OUT, foreign))
    assert (OUT / "a.tar").stat().st_mtime_ns == written and "unknown" not in capsys.readouterr().out


def test_pictures_go_into_the_nearest_aspect_bucket(encode: Encode, tokenizer: Tokenizer) -> None:
    """Each grid by its picture's aspect, input order kept though batches fill at different times, a rare size too."""
    sizes = {(32, 32): (8, 8), (64, 40): (6, 10), (40, 64): (10, 6), (70, 63): (8, 8)}
    chosen = [list(sizes)[0 if i % 90 else 1 + i // 90 % 3] for i in range(270)]
    records = [picture_record(i, size=size) for i, size in enumerate(chosen)]
    raw = raw_folder(Path("raw"), {"a": records})
    files = encode(raw, crop="buckets", bucket_multiple=8)
    found = encoded_records(OUT)
    assert [int(r["__key__"]) for r in found] == list(range(270))
    grids = [decode_document(r, "here").segments[1].array.shape[1:] for r in found]
    assert grids == [sizes[size] for size in chosen] and Manifest.load(OUT).latent_spec.resolution == 32
    assert encode(raw, Path("out2"), crop="buckets", bucket_multiple=8, decode_threads=2) == files
    data = open_data(data_config(tokenizer, {"a": OUT}, sequence_length=128), 0, patch_size=2)
    assert data.grids == [(6, 10), (8, 8), (10, 6)]
    with pytest.raises(ValueError, match="bucket_multiple=6: expected a multiple of the VAE's stride 4"):
        encode(raw, crop="buckets", bucket_multiple=6, resolution=36)


def test_inputs_may_lie_anywhere(raw: Path, encode: Encode, expected: Contents) -> None:
    """Globs, braces, an object store and a web server: the bytes of the local files, if not the times they changed."""
    store = fsspec.filesystem("memory")
    for path in raw.iterdir():
        store.pipe(f"/bucket/{path.name}", path.read_bytes())
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(raw))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    inputs = [
        f"{raw}/*.tar",
        f"{raw}/{{a,b,c}}.tar",
        "memory://bucket/*.tar",
        f"http://127.0.0.1:{server.server_port}/{{a,b,c}}.tar",
    ]
    for number, given in enumerate(inputs):
        files = encode(f'["{given}"]', Path(f"out{number}"))
        assert all(files[name] == expected[name] for name in files.keys() | expected if not name.endswith(".tar.json"))
        assert encode(f'["{given}"]', Path(f"out{number}")) == files
    store.pipe("/bucket/b.tar", (raw / "a.tar").read_bytes())  # replaced: encoded again
    assert encode('["memory://bucket/*.tar"]', Path("out2"))["b.tar"] == expected["a.tar"]
    server.shutdown()


# ---- the same bytes ----


def test_a_second_run_does_nothing_and_a_fresh_one_gives_the_same_bytes(
    raw: Path, encode: Encode, expected: Contents
) -> None:
    assert encode(raw) == expected
    before = write_times()
    assert encode(raw) == expected
    assert write_times() == before


def test_what_a_kill_can_leave_is_made_whole(raw: Path, encode: Encode, expected: Contents) -> None:
    """Every order of the writes, stopped anywhere: the next run makes the same folder, no file more."""
    encode(raw)
    left: list[tuple[list[str], Contents]] = [
        (["manifest.json"], {}),
        (["manifest.json", "b.tar.json"], {}),
        (["manifest.json", "b.tar.json", "b.tar.idx"], {}),
        (["manifest.json", "b.tar.json", "b.tar.idx", "b.tar"], {"b.tar.tmp-999-0123abcd": expected["b.tar"][:700]}),
        (["manifest.json", "b.tar.json"], {"b.tar.json.tmp-999-0123abcd": b"{", "b.tar.idx.tmp-999-0123abcd": b""}),
        (["b.tar"], {}),
        (["a.tar.idx"], {}),
        ([], {"c.tar.json": b"{"}),
        ([], {"c.tar.json": b"[]"}),
        ([], {"c.tar.idx": expected["a.tar.idx"]}),
        ([], {"c.tar": expected["c.tar"][:-1]}),
    ]
    for removed, written in left:
        for name in removed:
            (OUT / name).unlink()
        for name, content in written.items():
            (OUT / name).write_bytes(content)
        assert encode(raw) == expected, (removed, list(written))


def test_another_tokenizer_vae_or_resolution_encodes_it_again(encode: Encode, raw: Path, expected: Contents) -> None:
    encode(raw)
    other = encode(raw, resolution=16)
    assert other["a.tar"] != expected["a.tar"] and Manifest.load(OUT).grids() == {(4, 4)}
    assert encode(raw) == expected


def test_an_interrupted_change_leaves_nothing_that_vouches_for_the_old_data(raw: Path, encode: Encode) -> None:
    """One shard was encoded again when the job was stopped: no manifest, and no mixture of both."""
    raw = shutil.copytree(raw, Path("raw"))
    encode(raw)
    os.truncate(raw / "b.tar", 700)  # where the second job will stop
    with pytest.raises(ValueError, match="records are bad"):
        encode(raw, resolution=16, max_bad_fraction=0)
    assert "manifest.json" not in contents_of(OUT)
    encode(raw, resolution=16, max_bad_fraction=1)
    assert Manifest.load(OUT).grids() == {(4, 4)} and Manifest.load(OUT).latent_spec.resolution == 16
