"""The encoding job: the same bytes whoever does it and however often it is killed; what is bad is counted and named."""

import http.server
import io
import json
import os
import shutil
import struct
import tarfile
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from data.dataset import open_data
from data.documents import TextSegment, decode_document
from data.lanes import Lane
from data.manifest import Manifest
from data.pictures import encode_png, to_unit
from data.shards import Record, read_at, write_shard
from data.tokenizer import Tokenizer
from model.vae import load_vae, moments, vae_hash
from tests.sources import data_config, encoded_records
from tests.test_tokenizer import foreign_model
from train.encode import main

Contents = dict[str, bytes]
Encode = Callable[..., Contents]
Capsys = pytest.CaptureFixture[str]


def pixels_of(number: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def picture_record(number: int, size: tuple[int, int] = (32, 32), **changes: bytes | None) -> Record:
    """A raw record of the img2dataset layout; a change of None leaves the member out."""
    members = {
        "png": encode_png(pixels_of(number, size)),
        "txt": f"a large red circle number {number}".encode(),
        "json": json.dumps({"id": number}).encode(),
        **changes,
    }
    return {"__key__": f"{number:05d}".encode(), **{k: v for k, v in members.items() if v is not None}}


def arguments(inputs: Path | str, output: Path, tokenizer: Tokenizer, **options: object) -> list[str]:
    """The command line of a small job; an option of None is left out."""
    given = inputs if isinstance(inputs, str) else f"[{inputs}]"
    settings = {"resolution": 32, "batch_size": 4, "device": "cpu", **options}
    named = [f"{name}={value}" for name, value in settings.items() if value is not None]
    return [f"inputs={given}", f"output={output}", f"tokenizer={tokenizer.path}", *named]


def raw_folder(folder: Path, shards: dict[str, list[Record]]) -> Path:
    folder.mkdir(parents=True)
    for name, records in shards.items():
        write_shard(folder / f"{name}.tar", records)
    return folder


OUT = Path("out")  # of a job, in the empty folder where each test runs
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three raw shards of 5, 3 and 6 pictures."""
    folder = tmp_path_factory.mktemp("raw") / "pictures"
    shards = {"a": range(5), "b": range(5, 8), "c": range(8, 14)}
    return raw_folder(folder, {name: [picture_record(i) for i in numbers] for name, numbers in shards.items()})


@pytest.fixture
def encode(tokenizer: Tokenizer, vae_folder: Path) -> Encode:
    """Run the program in this process and return the files of its output folder."""

    def run(inputs: Path | str, output: Path = OUT, **options: object) -> Contents:
        main(arguments(inputs, output, tokenizer, **{"vae": vae_folder, **options}))
        return contents_of(output)

    return run


@pytest.fixture(scope="module")
def expected(raw: Path, tokenizer: Tokenizer, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """What an undisturbed run on one rank makes of `raw`."""
    output = tmp_path_factory.mktemp("expected") / "out"
    main(arguments(raw, output, tokenizer, vae=vae_folder))
    return contents_of(output)


@torch.no_grad()
def assert_encoded(found: np.ndarray, vae: torch.nn.Module, number: int) -> None:
    """Compare moments f16 with the VAE on `picture_record(number)`'s picture by itself."""
    expected = moments(vae, torch.from_numpy(to_unit(pixels_of(number)[None])))[0]
    torch.testing.assert_close(torch.from_numpy(found.copy()).float(), expected, rtol=2e-3, atol=2e-3)


def latents_in(folder: Path) -> np.ndarray:
    """The moments f16 [N, 2C, h, w] of an encoded folder of pairs."""
    return np.stack([decode_document(record, "here").segments[1].moments for record in encoded_records(folder)])


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_times() -> dict[str, int]:
    """When each file of the output was written, but for the manifest, which every job writes."""
    return {path.name: path.stat().st_mtime_ns for path in OUT.iterdir() if path.name != "manifest.json"}


def contents_of(folder: Path) -> Contents:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


# ---- what comes out ----


def test_pictures_become_the_vaes_moments_and_the_captions_tokens(
    raw: Path, encode: Encode, tokenizer: Tokenizer, vae_folder: Path
) -> None:
    """Against the VAE on each picture by itself; same keys, same shards."""
    encode(raw)
    vae = load_vae(vae_folder)
    records = encoded_records(OUT)
    assert [r["__key__"] for r in records] == [f"{i:05d}".encode() for i in range(14)]
    for number, record in enumerate(records):
        document = decode_document(record, "here")
        text, image = document.segments
        assert tokenizer.decode(text.token_ids) == f"a large red circle number {number}"
        assert json.loads(record["json"]) == {"id": number, "caption": f"a large red circle number {number}"}
        assert image.moments.shape == (4, 8, 8)
        assert_encoded(image.moments, vae, number)


def test_the_manifest_says_what_is_there(raw: Path, encode: Encode, tokenizer: Tokenizer, vae_folder: Path) -> None:
    """Counts, checksums, hashes and the latents' statistics, these against numpy on all latents at once."""
    encode(raw)
    manifest = Manifest.load(OUT)
    manifest.check_files()
    assert [(shard.name, shard.records) for shard in manifest.shards] == [("a.tar", 5), ("b.tar", 3), ("c.tar", 6)]
    assert manifest.tokenizer_hash == tokenizer.hash and manifest.vocab_size == tokenizer.vocab_size
    spec = manifest.latent_spec
    assert (spec.vae_hash, spec.channels, spec.stride, spec.resolution) == (vae_hash(load_vae(vae_folder)), 2, 4, 32)
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
    vae = load_vae(vae_folder)
    for record in found[::2]:
        segments = decode_document(record, "here").segments
        texts = [tokenizer.decode(s.token_ids) if isinstance(s, TextSegment) else None for s in segments]
        assert texts == ["one red", None, None, "two blue", None, "three"]
        for place, number in ((1, 1), (2, 2), (4, 1)):
            assert_encoded(segments[place].moments, vae, number)
    assert len(decode_document(found[1], "here").segments) == 2
    manifest = Manifest.load(OUT)
    assert manifest.shards[0].grids == {"8x8": 120}
    data = open_data(data_config(tokenizer, {"a": OUT}, sequence_length=128), 0, patch_size=2)
    assert len(Lane(0, data.sources, data.settings).next_row().images) >= 3
    others = encode(Path("raw"), Path("out2"), decode_threads=3)
    assert others == contents_of(OUT)


def test_a_list_of_captions_becomes_several_and_what_is_none_is_counted(
    encode: Encode, tokenizer: Tokenizer, capsys: Capsys
) -> None:
    """From JSON under a key of its own to what training draws; a job in which the key is missing names it."""
    values: list[object] = [["a red circle", "a round thing"], float("nan"), 7, "null", "a square"]
    records = [picture_record(i, txt=None, json=json.dumps({"TEXT": v}).encode()) for i, v in enumerate(values)]
    raw = raw_folder(Path("raw"), {"a": records})
    with pytest.raises(ValueError, match=r"no caption: 5.*caption_key=KEY chooses one of \['TEXT'\]"):
        encode(raw)
    encode(raw, caption_key="TEXT", max_bad_fraction=0.6)
    assert "2 records in 1 shards" in (said := capsys.readouterr().out) and "skipped no caption: 3" in said
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
    grids = [decode_document(r, "here").segments[1].moments.shape[1:] for r in found]
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


# ---- what is bad ----


def test_bad_pictures_and_captions_are_counted_by_reason_and_named(encode: Encode, capsys: Capsys) -> None:
    good = picture_record(0)["png"]
    records = [
        picture_record(0),
        picture_record(1, png=b"no picture"),
        picture_record(2, png=good[:60]),
        picture_record(3, txt=b" \n"),
        picture_record(4, txt=b"\xff\xfe"),
        picture_record(5, png=None),
        picture_record(6, txt=None),
        {**picture_record(7), "__key__": b"00000"},
        picture_record(8, size=(48, 32)),
        picture_record(9, json=b"not json"),
        {"__key__": b"blank", "json": b'{"segments": ["  "]}'},
        {"__key__": b"many", "0.png": good, "json": json.dumps({"segments": [{"image": "0.png"}] * 1001}).encode()},
        {**picture_record(10), "__key__": b"k" * 5000},
    ]
    raw = raw_folder(Path("raw"), {"a": records})
    encode(raw, max_bad_fraction=0.8)
    assert [r["__key__"].decode() for r in encoded_records(OUT)] == ["00000", "00008", "00009"]
    printed = capsys.readouterr().out
    counts = (
        "duplicate key: 1, empty caption: 1, empty document: 1, no caption: 1, no picture: 1, oversized record: 1, "
        "too many pictures: 1, undecodable caption: 1, undecodable picture: 2"
    )
    assert f"3 records in 1 shards in {OUT}; skipped {counts}" in printed
    assert f"encode: skipped {raw / 'a.tar'}/00001: undecodable picture" in printed
    # A second run has nothing to do, and still says what is missing.
    encode(raw, max_bad_fraction=0.8)
    assert f"skipped {counts}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_everything_that_the_web_holds_is_counted_and_nothing_leaves_the_folder(encode: Encode, capsys: Capsys) -> None:
    """One tar of all kinds: what a person would call fine is encoded, the rest is counted, its neighbours live (P7)."""
    good = picture_record(0)["png"]

    def picture(form: str, mode: str = "RGB", **options: object) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, (40, 32)).save(buffer, form, **options)
        return buffer.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    bomb = bytearray(picture("PNG"))
    bomb[16:24] = struct.pack(">II", 10_000, 10_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    members = [
        ("fine.png", good), ("fine.txt", b"a"),
        ("jpg_that_is_png.jpg", good), ("jpg_that_is_png.txt", b"a"),
        ("cmyk.jpg", picture("JPEG", "CMYK")), ("cmyk.txt", b"a"),
        ("deep.png", picture("PNG", "I;16")), ("deep.txt", b"a"),
        ("moving.webp", animated.getvalue()), ("moving.txt", b"a"),
        ("turned.jpg", picture("JPEG", exif=exif)), ("turned.txt", b"a"),
        ("empty.png", b""), ("empty.txt", b"a"),
        ("bomb.png", bytes(bomb)), ("bomb.txt", b"a"),
        ("gif.gif", picture("GIF")), ("gif.txt", b"a"),
        ("gif_as_png.png", picture("GIF")), ("gif_as_png.txt", b"a"),
        ("latin.png", good), ("latin.txt", "ü".encode("latin-1")),
        ("../outside.png", good), ("../outside.txt", b"a"),
        ("/etc/outside.png", good), ("/etc/outside.txt", b"a"),
        ("apart.png", good), ("between.png", good), ("between.txt", b"of between"), ("apart.txt", b"of apart"),
        ("fine.png", good), ("fine.txt", b"again"),
        ("twice.png", good), ("twice.png", good), ("twice.txt", b"a"),
        ("last.png", good), ("last.txt", b"a"),
    ]  # fmt: skip
    folder = Path("in") / "raw"
    folder.mkdir(parents=True)
    write_tar(folder / "a.tar", members)
    with tarfile.open(folder / "a.tar", "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = set(Path().rglob("*"))
    encode(folder, max_bad_fraction=0.8)
    keys = [r["__key__"].decode() for r in encoded_records(OUT)]
    assert keys == ["fine", "jpg_that_is_png", "cmyk", "deep", "moving", "turned", "between", "last"]
    captions = {r["__key__"]: json.loads(r["json"])["caption"] for r in encoded_records(OUT)}
    assert captions[b"between"] == "of between" and captions[b"fine"] == "a"
    printed = capsys.readouterr().out
    counts = (
        "duplicate key: 2, duplicate member: 1, empty picture: 1, member is not a file: 1, no caption: 1, "
        "no picture: 1, oversized picture: 1, undecodable caption: 1, undecodable picture: 1, unsafe member name: 2"
    )
    assert f"8 records in 1 shards in {OUT}; skipped {counts}" in printed
    made = {OUT, *(OUT / name for name in ("a.tar", "a.tar.idx", "a.tar.json", "manifest.json"))}
    assert set(Path().rglob("*")) - before == made


def test_nothing_is_removed_or_overwritten_that_is_not_the_jobs_own(encode: Encode, capsys: Capsys) -> None:
    """Inputs named like temporary files, a folder of raw data as output, shards of other inputs, a store as output."""
    raw = raw_folder(Path("raw"), {"a": [picture_record(0)], "web.tmp-1-0123abcd": [picture_record(1)]})
    assert "web.tmp-1-0123abcd.tar" in encode(raw) and len(encoded_records(OUT)) == 2
    other = raw_folder(Path("other"), {"a": [picture_record(5)]})
    before = contents_of(other)
    with pytest.raises(ValueError, match=r"a.tar exists and was not made by train.encode; choose another folder"):
        encode(raw / "a.tar", other)
    assert contents_of(other) == before
    capsys.readouterr()
    encode(raw / "a.tar")
    assert "also holds 1 shards of other inputs" in capsys.readouterr().out
    with pytest.raises(ValueError, match="output=s3://bucket/x: expected a local or shared folder"):
        encode(raw, "s3://bucket/x")
    encode(raw, resolution=16)
    assert "have another resolution 32 (now 16): encoding them again" in capsys.readouterr().out


def test_too_many_bad_records_refuse_also_when_the_work_is_done(encode: Encode) -> None:
    """Not a matter of starting again; but of allowing more."""
    raw = raw_folder(Path("raw"), {"a": [picture_record(0), picture_record(1, txt=b"")]})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 of 2 records are bad, more than max_bad_fraction=0.4: empty capt"):
            encode(raw, max_bad_fraction=0.4)
        assert not (OUT / "manifest.json").exists()
    encode(raw, max_bad_fraction=0.5)
    assert Manifest.load(OUT).records == 1


def test_a_job_that_finds_too_much_bad_stops_early(encode: Encode) -> None:
    """After the file in which it turns out, not after a million more."""
    bad = [picture_record(i, txt=b"") for i in range(20)]
    raw = raw_folder(Path("raw"), {"a": bad, "b": [picture_record(99)]})
    with pytest.raises(ValueError, match=r"20 of 20 records are bad, .* First: .*a.tar/00000: empty caption"):
        encode(raw)
    assert not (OUT / "b.tar").exists()


def test_a_truncated_tar_gives_its_whole_records(encode: Encode, capsys: Capsys) -> None:
    raw = raw_folder(Path("raw"), {"a": [picture_record(i) for i in range(4)], "b": [picture_record(9)]})
    os.truncate(raw / "a.tar", (raw / "a.tar").stat().st_size // 2)
    with pytest.raises(ValueError, match=r"in which 1 files that end too early count as lost whole, more than max_b"):
        encode(raw, max_bad_fraction=0.5)
    encode(raw, max_bad_fraction=0.8)
    keys = [r["__key__"].decode() for r in encoded_records(OUT)]
    assert keys in (["00000", "00009"], ["00000", "00001", "00009"])
    assert "skipped truncated: 1" in capsys.readouterr().out


def test_what_was_lost_of_each_file_is_counted_over_all_workers_and_runs(encode: Encode, capsys: Capsys) -> None:
    """A pointer, two tars joined, a damaged header, a Mac's leftovers: by name, and the second run says the same."""
    numbers = {"joined": range(4), "tail": range(4, 8), "damaged": range(10, 20)}
    raw = raw_folder(Path("raw"), {name: [picture_record(i) for i in some] for name, some in numbers.items()})
    with (raw / "joined.tar").open("ab") as file:
        file.write((raw / "tail.tar").read_bytes())
    (raw / "tail.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    damaged = bytearray((raw / "damaged.tar").read_bytes())
    with tarfile.open(raw / "damaged.tar") as tar:
        place = tar.getmember("00014.txt").offset
    damaged[place] ^= 1
    (raw / "damaged.tar").write_bytes(damaged)
    mac = [("a/._0.png", b"\0\5\26\7"), ("a/0.png", picture_record(30)["png"]), ("a/0.txt", b"a")]
    write_tar(raw / "mac.tar", mac)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"from 1 of 4 input files.*=0: .*tail.tar: no record; it is a Git LFS po"):
            encode(raw, max_bad_fraction=0.2)
        with pytest.raises(ValueError, match=r"2 of 19 records are bad; with the bytes lost 1\d.* % of the data, more"):
            encode(raw, max_failed_files=1)
        capsys.readouterr()
        files = encode(raw, max_bad_fraction=0.2, max_failed_files=1)
        printed = capsys.readouterr().out
        assert "17 records in 3 shards" in printed and "skipped broken header: 2, failed files: 1" in printed
        assert f"encode: failed file {raw}/tail.tar: no record; it is a Git LFS pointer" in printed
        assert "encode: file of macOS or Windows: 1" in printed
    found = [int(r["__key__"].split(b"/")[-1]) for r in encoded_records(OUT)]
    assert found == [10, 11, 12, 13, 16, 17, 18, 19, *range(8), 0]
    assert encode(raw, Path("out2"), max_bad_fraction=0.2, max_failed_files=1) == files


def test_a_shard_without_a_good_record_is_left_out_of_the_manifest(encode: Encode) -> None:
    raw = raw_folder(Path("raw"), {"a": [picture_record(0, txt=b"")], "b": [picture_record(1)]})
    (raw / "c.tar").write_bytes(b"")
    encode(raw, max_bad_fraction=1, max_failed_files=1)
    assert [shard.name for shard in Manifest.load(OUT).shards] == ["b.tar"]
    raw = raw_folder(Path("raw2"), {"a": [picture_record(0, txt=b"")]})
    with pytest.raises(ValueError, match="nothing could be encoded from 1 input files"):
        encode(raw, Path("out2"), max_bad_fraction=1)


def test_latents_that_are_not_finite_are_counted(encode: Encode, vae_folder: Path, capsys: Capsys) -> None:
    """A VAE whose latents leave the range of f16 for some pictures: those are skipped, the others written."""
    vae = load_vae(vae_folder)
    pictures = [np.zeros((1, 32, 32, 3), np.uint8), np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)]
    with torch.no_grad():
        largest = [moments(vae, torch.from_numpy(to_unit(p)))[:, :2].abs().max() for p in pictures]
        for parameter in (vae.quant_conv.weight, vae.quant_conv.bias):
            parameter[:2] *= 65504 / (largest[0] * largest[1]).sqrt()  # between the two
    vae.save_pretrained(Path("vae"))
    records = [picture_record(i, png=encode_png(pictures[i % 2][0])) for i in range(6)]
    encode(raw_folder(Path("raw"), {"a": records}), OUT, vae="vae", max_bad_fraction=0.5)
    keys = [int(r["__key__"]) % 2 for r in encoded_records(OUT)]
    assert keys == [int(largest[0] > largest[1])] * 3
    assert "skipped non-finite latents: 3" in capsys.readouterr().out
    assert np.isfinite(Manifest.load(OUT).latent_spec.std).all()


# ---- refusals before work ----


def test_inputs_that_make_no_data_set_are_refused(encode: Encode, raw: Path) -> None:
    Path("empty").mkdir()
    Path("a.jsonl").write_text('{"text": "a"}\n')
    Path("a.txt").write_text("a")
    cases = [
        (Path("none"), FileNotFoundError, r"input .*none does not exist"),
        (Path("empty"), ValueError, r"no .tar, .jsonl, .jsonl.gz, .jsonl.zst, .txt files in"),
        (f"[{raw},a.txt]", ValueError, "inputs mix .tar shards with text files: encode them into two"),
        ("[a.txt,a.jsonl]", ValueError, "two input files are named a: .* rename one"),
        (f"[{raw},{raw}]", ValueError, "a.tar is named 2 times"),
    ]
    for inputs, kind, message in cases:
        with pytest.raises(kind, match=message):
            encode(inputs)
    assert not OUT.exists()


def test_settings_that_cannot_work_are_refused(encode: Encode, raw: Path) -> None:
    cases = [
        ({"vae": None}, ValueError, "give vae=FOLDER or a hub id"),
        ({"vae": Path("none")}, FileNotFoundError, "no such folder"),
        ({"resolution": 30}, ValueError, "resolution=30: expected a multiple of the VAE's stride 4"),
        ({"resolution": 0}, ValueError, "expected at least 1"),
        ({"max_bad_fraction": 1.5}, ValueError, r"max_bad_fraction=1.5: expected a share in \[0, 1\]"),
        ({"max_failed_files": -1}, ValueError, "max_failed_files=-1: expected 0 or more"),
        ({"device": "tpu"}, ValueError, "device=tpu"),
        ({"stats_from": Path("none")}, FileNotFoundError, "does not exist; make it with"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"device": "cuda"}, ValueError, "device=cuda, but torch finds no CUDA device"))
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            encode(raw, **options)
    assert contents_of(OUT) == {}


def test_an_output_that_cannot_be_written_is_refused(encode: Encode, raw: Path) -> None:
    Path("file").write_text("")
    for output in (Path("file"), Path("file") / "out"):
        with pytest.raises(OSError, match=r"output=.*: cannot write there \(.*\); choose a writable folder"):
            encode(raw, output)
    before = contents_of(raw)
    with pytest.raises(ValueError, match=r"the shard of .*a.tar would overwrite it; choose another folder"):
        encode(raw, raw)
    assert contents_of(raw) == before


def test_statistics_may_come_from_another_data_set_of_the_same_latents(
    encode: Encode, raw: Path, vae_folder: Path
) -> None:
    """Held-out data is whitened as training data is; other latents are refused before any work."""
    encode(raw, Path("train"))
    held_out = raw_folder(Path("raw"), {"h": [picture_record(99)]})
    encode(held_out, Path("own"))
    encode(held_out, Path("theirs"), stats_from="train")
    own, theirs, train = (Manifest.load(name).latent_spec for name in ("own", "theirs", "train"))
    assert theirs == train != own
    encode(held_out, Path("small"), stats_from="train", resolution=16)
    assert Manifest.load("small").latent_spec == replace(train, resolution=16)
    vae = load_vae(vae_folder)
    with torch.no_grad():
        next(vae.parameters()).add_(1e-3)
    vae.save_pretrained(Path("vae"))
    with pytest.raises(ValueError, match=r"has other latents: vae_hash .* \(here .*\)"):
        encode(held_out, stats_from="train", vae="vae")
    Path("a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="it and the inputs must hold pictures"):
        encode(Path("a.jsonl"), stats_from="train")
    assert contents_of(OUT) == {}


# ---- a VAE of another origin ----


def foreign_vae(folder: Path, **changes: object) -> Path:
    """A tiny AutoencoderKL of stride 2 and 3 channels, as diffusers makes and saves it."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 3}
        AutoencoderKL(**blocks, **sizes, **changes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("stated", "mean", "std"),
    [
        ({"scaling_factor": 0.18215}, [0.0] * 3, [1 / 0.18215] * 3),
        ({}, [0.0] * 3, [1 / 0.18215] * 3),  # diffusers' default
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False},
         [0.1159] * 3, [1 / 0.3611] * 3),
        ({"scaling_factor": 0.5, "latents_mean": [-1.6, 2.0, 0.0], "latents_std": [9.0, 6.0, 1.0]},
         [-1.6, 2.0, 0.0], [18.0, 12.0, 2.0]),
        ({"scaling_factor": 1.0, "shift_factor": -0.5}, [-0.5] * 3, [1.0] * 3),
    ],
)  # fmt: skip
def test_a_vaes_own_scaling_goes_into_the_latent_spec(
    raw: Path, encode: Encode, capsys: Capsys,
    stated: dict[str, object], mean: list[float], std: list[float],
) -> None:  # fmt: skip
    """tests/test_vae.py holds whitening by these to diffusers' formula."""
    encode(raw, vae=foreign_vae(Path("vae"), **stated))
    assert "encode: latent statistics: the VAE's own scaling" in capsys.readouterr().out
    spec = Manifest.load(OUT).latent_spec
    assert (spec.channels, spec.stride, spec.resolution) == (3, 2, 32)
    assert Manifest.load(OUT).grids() == {(16, 16)}
    np.testing.assert_allclose(spec.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(spec.std, std, rtol=1e-12)


def test_the_source_of_the_statistics_can_be_chosen_and_shards_stay(raw: Path, encode: Encode, capsys: Capsys) -> None:
    vae = foreign_vae(Path("vae"))
    own = encode(raw, vae=vae)
    before = write_times()
    capsys.readouterr()
    measured = encode(raw, vae=vae, latent_stats="measured")
    assert "encode: latent statistics: measured\n" in capsys.readouterr().out
    assert write_times() == before
    spec = Manifest.load(OUT).latent_spec
    np.testing.assert_allclose(spec.mean, latents_in(OUT)[:, :3].astype(np.float64).mean((0, 2, 3)), rtol=1e-9)
    assert encode(raw, vae=vae, latent_stats="vae") == own != measured


def test_a_vae_that_states_no_scaling_is_measured_unless_asked_otherwise(
    raw: Path, encode: Encode, capsys: Capsys, expected: Contents
) -> None:
    assert encode(raw) == expected
    assert "latent statistics: measured (the VAE states no scaling)" in capsys.readouterr().out
    assert encode(raw, latent_stats="measured") == expected
    encode(raw, latent_stats="vae")
    spec = Manifest.load(OUT).latent_spec
    assert (spec.mean, spec.std) == ((0.0, 0.0), (1.0, 1.0))


def test_diffusers_default_is_not_taken_for_a_vaes_own_scaling(raw: Path, encode: Encode, capsys: Capsys) -> None:
    vae = foreign_vae(Path("vae"))
    encode(raw, vae=vae)  # it states 0.18215, and that is far from right
    encode(raw, Path("measured"), vae=vae, latent_stats="measured")
    deviation = 0.18215 * np.sqrt(np.mean(np.square(Manifest.load("measured").latent_spec.std)))
    warning = f"warning: whitened latents have deviation {deviation:.3g}, but the noise schedule"
    assert not 0.5 < deviation < 2 and warning in capsys.readouterr().out
    config = json.loads((vae / "config.json").read_text())
    del config["scaling_factor"]
    (vae / "config.json").write_text(json.dumps(config))
    encode(raw, vae=vae)
    said = capsys.readouterr().out
    assert "statistics: measured (the VAE's config states no scaling_factor)" in said and "warning" not in said
    encode(raw, vae=vae, latent_stats="vae")
    said = capsys.readouterr().out
    assert "statistics: diffusers' default, as the VAE's config states no scaling" in said and warning in said


def test_statistics_from_two_places_are_refused_and_another_data_sets_win(
    raw: Path, encode: Encode, capsys: Capsys
) -> None:
    vae = foreign_vae(Path("vae"))
    encode(raw, Path("train"), vae=vae, latent_stats="measured")
    for chosen in ("vae", "measured"):
        with pytest.raises(ValueError, match=rf"latent_stats={chosen} and stats_from=.*train both say.*leave one"):
            encode(raw, vae=vae, stats_from="train", latent_stats=chosen)
    capsys.readouterr()
    encode(raw / "a.tar", vae=vae, stats_from="train")
    assert "latent statistics: from train" in capsys.readouterr().out
    specs = [Manifest.load(name).latent_spec for name in ("train", "out")]
    assert specs[0] == specs[1] and specs[0].mean != (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"latent_stats='both': expected Literal"):
        encode(raw, vae=vae, latent_stats="both")


def test_a_scaling_that_cannot_be_is_refused_before_work(raw: Path, encode: Encode) -> None:
    vae = foreign_vae(Path("vae"), latents_mean=[0.0], latents_std=[1.0])
    with pytest.raises(ValueError, match=r"expected 3 channels; correct its config.json, or use latent_stats=measured"):
        encode(raw, vae=vae)
    assert contents_of(OUT) == {}
    encode(raw, vae=vae, latent_stats="measured")
