"""What is bad is counted and named; what cannot work is refused before any work."""

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.manifest import Manifest
from data.pictures import encode_png, to_unit
from model.autoencoders import load_latent_space
from model.vae import moments
from tests.encoding.jobs import OUT, Capsys, Encode, contents_of, picture_record, raw_folder
from tests.sources import encoded_records

pytestmark = pytest.mark.usefixtures("one_thread", "in_an_empty_folder")


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


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
    assert f"3 records in 1 shard in {OUT}; skipped {counts}" in printed
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
    assert f"8 records in 1 shard in {OUT}; skipped {counts}" in printed
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
    assert "also holds 1 shard of other inputs" in capsys.readouterr().out
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
    vae = load_latent_space(vae_folder).module
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
        (Path("empty"), ValueError, r"no .tar, .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt files in"),
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
