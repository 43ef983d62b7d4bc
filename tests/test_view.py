"""A viewed data set shows what its records hold: pictures as the VAE decodes them, captions, exact counts."""

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.documents import ImageSegment, TextSegment, decode_document
from data.layout import lay_out
from data.manifest import Manifest
from data.pictures import contact_sheet, encode_png, from_unit
from data.shards import BadRecords, Record, write_shard
from data.tokenizer import Tokenizer
from model.autoencoders import load_latent_space
from model.vae import decode
from tests.sources import encoded_records, interleaved, make_source
from train.config import run_program
from train.encode import main as encode
from train.pages.dataset_summary import CHARACTERS, PICTURES, EncodedData, caption_of, joined
from train.pages.dataset_tables import QUANTILES
from train.view import main

HOSTILE = "\x1b[2J\x1b]0;owned\x07 red\rgreen"


class Seen:
    """What the program printed, as text and as JSON; the sheet in `output`."""

    def __init__(self, capsys: pytest.CaptureFixture[str], shards: Path, output: Path, **options: object) -> None:
        arguments = [f"shards={shards}", f"output={output}", *(f"{name}={value}" for name, value in options.items())]
        capsys.readouterr()
        assert main(arguments) == 0
        self.text = capsys.readouterr().out
        assert main([*arguments, "json=true"]) == 0
        record = json.loads(capsys.readouterr().out)
        self.facts: dict[str, Any] = record["facts"]
        self.remarks, self.tables = " ".join(record["remarks"]), record["tables"]
        self.documents: list[dict[str, Any]] = self.tables["example documents"]
        self.keys = [document["key"] for document in self.documents]  # which number through the data
        self.bad = {row["reason"]: row["count"] for row in self.tables.get("missing or damaged", [])}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, vae_folder: Path) -> Path:
    """14 pictures in three shards through the real encoder; the caption of the last is hostile."""
    root = tmp_path_factory.mktemp("encoded")
    (root / "raw").mkdir()
    for name, numbers in {"a": range(5), "b": range(5, 8), "c": range(8, 14)}.items():
        write_shard(root / f"raw/{name}.tar", (raw_record(number) for number in numbers))
    settings = [f"tokenizer={tokenizer.path}", f"vae={vae_folder}", "resolution=32", "batch_size=4", "device=cpu"]
    encode([f"inputs=[{root / 'raw'}]", f"output={root / 'out'}", *settings])
    return root / "out"


def raw_record(number: int) -> Record:
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    members = {"png": encode_png(pixels), "txt": caption(number).encode()}
    return {"__key__": f"{number:05d}".encode(), **members}


def caption(number: int) -> str:
    return HOSTILE if number == 13 else f"a large red circle number {number}"


def test_the_sheet_is_what_the_vae_decodes_from_the_posteriors_mean(
    encoded: Path, tmp_path: Path, tokenizer: Tokenizer, vae_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a decode of each picture by itself."""
    seen = Seen(capsys, encoded, tmp_path, vae=vae_folder, tokenizer=tokenizer.path, n=6)
    vae, expected = load_latent_space(vae_folder).module, []
    records = encoded_records(encoded)
    for key in seen.keys:
        (moments,) = images_of(records[int(key)])
        with torch.no_grad():
            expected.append(from_unit(decode(vae, torch.from_numpy(moments[None, :2].astype(np.float32))).numpy())[0])
    assert len(expected) == 6 and all(picture.std() > 1 for picture in expected)
    sheet = contact_sheet(expected, [caption(int(key)) for key in seen.keys], columns=8)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), np.asarray(sheet))
    assert f"Wrote {tmp_path / 'sheet.png'}: 6 of the 6 pictures decoded" in seen.remarks


def images_of(record: Record) -> list[np.ndarray]:
    return [part.array for part in decode_document(record, "").segments if isinstance(part, ImageSegment)]


def test_every_document_has_its_caption_key_shard_grid_and_length(
    encoded: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a VAE nothing is written."""
    seen = Seen(capsys, encoded, tmp_path / "none", tokenizer=tokenizer.path, n=99)
    assert seen.keys == [f"{i:05d}" for i in range(14)]
    for number, (document, record) in enumerate(zip(seen.documents[:-1], encoded_records(encoded), strict=False)):
        length = len(lay_out(decode_document(record, ""), tokenizer.special, 2))
        shard = "a.tar" if number < 5 else "b.tar" if number < 8 else "c.tar"
        expected = {"shard": shard, "tokens": length, "latents": "8x8", "text": caption(number)}
        assert document == {"key": f"{number:05d}", **expected}
        line = next(line for line in seen.text.splitlines() if line.startswith(f"{number:05d}  {shard}"))
        assert line.endswith(f"8x8      {caption(number)}")
    assert "No vae=FOLDER was given" in seen.remarks and not (tmp_path / "none").exists()


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_captions_cannot_control_the_terminal(
    encoded: Path, tmp_path: Path, tokenizer: Tokenizer, with_tokenizer: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether they come from the token ids or from the records' json."""
    seen = Seen(capsys, encoded, tmp_path, n=14, **({"tokenizer": tokenizer.path} if with_tokenizer else {}))
    assert all(line.isprintable() for line in seen.text.splitlines())
    assert "\\x1b[2J\\x1b]0;owned\\x07 red green" in seen.text
    assert ("No tokenizer=MODEL was given" in seen.text) == (not with_tokenizer)


def test_the_same_seed_shows_the_same_and_another_seed_others(
    encoded: Path, tmp_path: Path, vae_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(seed: int) -> tuple[bytes, str]:
        text = Seen(capsys, encoded, tmp_path, vae=vae_folder, n=4, seed=seed).text
        return (tmp_path / "sheet.png").read_bytes(), text

    assert shown(3) == shown(3)
    assert shown(3)[0] != shown(4)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_documents_are_spread_over_all_the_data(pairs_folder: Path) -> None:
    """One from each sixth of 60, in shards of 31, 7 and 22; the seeds reach all of a sixth."""
    data, seen = EncodedData.open(str(pairs_folder), 2, None, None), set()
    for seed in range(40):
        numbers = [int(one.key) for one in data.read_documents([0, 1, 2], 6, seed, BadRecords(0))[0]]
        assert [number // 10 for number in numbers] == list(range(6))
        seen |= {number % 10 for number in numbers}
    assert seen == set(range(10))


def test_the_sheet_of_an_earlier_call_does_not_stay_where_no_picture_is_shown(
    tmp_path: Path, encoded: Path, tokenizer: Tokenizer, vae_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise it would pass for this call's; other files stay."""
    for name in ("mine.txt", "sheet.png"):
        (tmp_path / name).write_text("")
    data = shutil.copytree(encoded, tmp_path / "data")
    for path in data.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    seen = Seen(capsys, data, tmp_path, vae=vae_folder)
    assert "there is no sheet.png" in seen.remarks and not seen.documents
    assert (tmp_path / "mine.txt").exists() and not (tmp_path / "sheet.png").exists()


def test_texts_show_their_beginnings_or_without_a_tokenizer_their_number_of_tokens(
    texts_folder: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = Seen(capsys, texts_folder, tmp_path, tokenizer=tokenizer.path, n=50)
    counted = Seen(capsys, texts_folder, tmp_path, n=50)
    for document, count, record in zip(seen.documents, counted.documents, encoded_records(texts_folder), strict=True):
        (segment,) = decode_document(record, "").segments
        text = tokenizer.decode(segment.token_ids)
        assert document["text"] in (text, text[:CHARACTERS] + "…")
        assert count["text"] == f"[{len(segment.token_ids)} text tokens]"
    assert seen.facts["images"] == 0 and seen.facts["images a document"] == "none 50, one 0, several 0"
    assert not any(title.startswith(("latents", "image sizes")) for title in seen.tables)


def test_a_long_text_is_cut_and_says_so(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tokenizer.encode("a large red circle " * 2000).astype(np.int32)
    make_source(tmp_path / "data", tokenizer, [(long, None)])
    (document,) = Seen(capsys, tmp_path / "data", tmp_path / "out", tokenizer=tokenizer.path).documents
    assert document["text"].startswith("a large red circle a large")
    assert document["text"].endswith("…") and len(document["text"]) <= CHARACTERS + 1


def test_segments_in_any_order_keep_it() -> None:
    """Each picture goes with the text before it, else with the one after; marks say where images are."""
    mixed = [None, "first", None, None, "last"]
    assert [caption_of(mixed, i) for i in (0, 2, 3)] == ["first", "first", "last"]
    assert joined(mixed, [False] * 5) == "[image 1] first [image 2] [image 3] last"
    assert joined(mixed, [True, True, False, True, False]) == (
        "[given: image 1] [given: first] [image 2] [given: image 3] last"
    )
    assert joined(["caption", None], [False, False]) == "caption" and joined([None], [False]) == ""
    assert joined(["blue", None], [True, False]) == "[given: blue] [image 1]" and caption_of([None], 0) == ""


def test_interleaved_documents_are_decoded_up_to_a_number_of_pictures(
    tmp_path: Path, tokenizer: Tokenizer, vae_folder: Path
) -> None:
    make_source(tmp_path / "data", tokenizer, interleaved(30, images=6))
    data = EncodedData.open(str(tmp_path / "data"), 2, str(tokenizer.path), None)
    data = replace(data, space=load_latent_space(vae_folder))
    documents, _ = data.read_documents([0], 30, 0, BadRecords(0))
    counts = []
    for shown, record in zip(documents, encoded_records(tmp_path / "data"), strict=True):
        images = images_of(record)
        assert shown.grids == [moments.shape[1:] for moments in images]
        assert len(shown.pictures) == min(len(images), PICTURES)
        assert shown.num_tokens == len(lay_out(decode_document(record, ""), tokenizer.special, 2))
        counts.append(len(images))
    assert max(counts) > PICTURES and 1 in counts


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_counts_equal_a_slow_count_over_the_records(
    pairs_folder: Path, tmp_path: Path, tokenizer: Tokenizer, patch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = Seen(capsys, pairs_folder, tmp_path, n=1, patch_size=patch_size, sequence_length=20)
    documents = [decode_document(record, "") for record in encoded_records(pairs_folder)]
    lengths = [len(lay_out(document, tokenizer.special, patch_size)) for document in documents]
    words = [sum(len(s.token_ids) for s in d.segments if isinstance(s, TextSegment)) for d in documents]
    grids = Counter(
        "{}x{}".format(*s.array.shape[1:]) for d in documents for s in d.segments if isinstance(s, ImageSegment)
    )
    patches = sum(int(g[0]) * int(g[2]) // patch_size**2 * count for g, count in grids.items())
    long = sum(length > 20 for length in lengths)
    expected = {"documents": 60, "shards": 3, "images": 60, "text tokens": sum(words)}
    expected |= {"image tokens": f"{patches:,} (patch_size={patch_size})"}
    expected |= {"longer than 20": f"{long} documents, {long} with images"}
    assert expected.items() <= seen.facts.items()
    found = {row["latent grid"]: row["images"] for row in seen.tables["image sizes, height x width"]}
    assert found == grids and list(found.values()) == sorted(grids.values(), reverse=True)
    for row, values in zip(seen.tables["tokens a document"], (lengths, words), strict=True):
        assert list(row.values())[1:] == np.quantile(values, list(QUANTILES.values()), method="inverted_cdf").tolist()
    rows = seen.tables["shards"]
    assert [row["shard"] for row in rows] == ["00000.tar", "00002.tar", "00001.tar"]  # the largest first
    totals = {name: sum(row[name] for row in rows) for name in ("documents", "images", "text tokens", "tokens")}
    assert totals == {"documents": 60, "images": 60, "text tokens": sum(words), "tokens": sum(lengths)}


def test_all_of_the_latents_have_the_manifests_statistics(
    encoded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The encoder measured them over the same 14 pictures; some of them differ, and the table shows both."""
    spec = Manifest.load(encoded).latent_spec
    assert spec is not None
    title = "latents: the manifest's statistics and those of the documents shown"
    for n in (14, 3):
        table = Seen(capsys, encoded, tmp_path, n=n).tables[title]
        rows = np.array([list(row.values())[1:] for row in table])
        assert np.allclose(rows[:, [0, 2]], np.stack([spec.mean, spec.std], axis=1))
        assert np.allclose(rows[:, [0, 2]], rows[:, [1, 3]], atol=1e-4) == (n == 14)


def test_one_shard_is_viewed_by_itself(pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = Seen(capsys, pairs_folder / "00001.tar", tmp_path, n=32)
    assert seen.keys == [f"{i:06d}" for i in range(31, 38)]
    assert seen.facts["shards"] == 1 and seen.facts["documents"] == 7
    for path in ("00007.tar", "manifest.json"):
        with pytest.raises(ValueError, match=r"lists no such shard; name one of 00000.tar ... 00002.tar \(3 shards\)"):
            main([f"shards={pairs_folder / path}"])


def test_a_corrupt_record_and_a_missing_index_are_named_and_the_rest_is_shown(
    pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(pairs_folder, tmp_path / "data")
    (data / "00001.tar.idx").unlink()
    span = Manifest.load(data).load_index(2).spans[4]
    contents = bytearray((data / "00002.tar").read_bytes())
    contents[span[0] + 600] ^= 1
    (data / "00002.tar").write_bytes(contents)
    seen = Seen(capsys, data, tmp_path / "out", n=99)
    assert seen.keys == [f"{i:06d}" for i in range(60) if not 31 <= i < 38 and i != 42]
    assert seen.facts["documents"] == 60 and seen.bad == {"checksum": 1, "unreadable index": 1}
    for text in (seen.remarks, seen.text):
        assert f"{data}/00002.tar#4: checksum" in text and f"{data}/00001.tar.idx: unreadable index" in text
        assert "7 of 60 documents are in shards whose index cannot be read" in text


def test_where_nothing_can_be_read_it_is_refused(pairs_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pairs_folder, tmp_path / "data")
    for path in data.glob("*.idx"):
        path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"none of 3 indices can be read \(.*00000.tar.idx: unreadable index"):
        main([f"shards={data}"])


def test_another_vae_or_tokenizer_is_refused(
    encoded: Path, texts_folder: Path, pairs_folder: Path, tmp_path: Path, tokenizer: Tokenizer, vae_folder: Path
) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.path.read_bytes() + b"\x12\x00")  # an empty trainer spec: the same pieces
    cases = [
        (pairs_folder, f"vae={vae_folder}", ValueError, r"vae=.* has hash .*, the data was encoded with a+; set vae"),
        (encoded, f"vae={tmp_path / 'none/vae'}", FileNotFoundError, "no such folder"),
        (texts_folder, f"vae={vae_folder}", ValueError, r"vae=.* holds only text; leave vae out"),
        (encoded, f"tokenizer={other}", ValueError, rf"with tokenizer {tokenizer.hash}, but .*other.model is .*; give"),
    ]
    for shards, option, kind, message in cases:
        with pytest.raises(kind, match=message):
            main([f"shards={shards}", f"output={tmp_path / 'out'}", option])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_viewed_is_refused_with_a_remedy(
    pairs_folder: Path, encoded: Path, vae_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    unwritable = {"shards": encoded, "vae": vae_folder, "output": tmp_path / "file/out"}
    cases = [
        ({"shards": tmp_path / "none"}, FileNotFoundError, "does not exist; make it with `python -m train.encode`"),
        ({"shards": tmp_path / "empty"}, FileNotFoundError, "has no manifest.json"),
        ({"shards": tmp_path / "empty/00000.tar"}, FileNotFoundError, "has no manifest.json"),
        ({"n": 0}, ValueError, "n=0: expected 1 to 1000"),
        ({"n": 1001}, ValueError, "n=1001: expected 1 to 1000, so that the listing can be read"),
        ({"patch_size": 0}, ValueError, "patch_size=0: expected 1 or more"),
        ({"patch_size": 3}, ValueError, "latent grid 4x4 is not a multiple of patch_size=3; choose another patch size"),
        ({"sequence_length": 0}, ValueError, "sequence_length=0: expected 1 or more"),
        (unwritable, OSError, r"cannot write there \(.*\); choose a writable folder"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            main([f"{name}={value}" for name, value in ({"shards": pairs_folder} | changes).items()])
    for arguments in ([], [f"checkpoint={tmp_path}", f"shards={tmp_path}"]):
        with pytest.raises(ValueError, match="expected one of the two"):
            main(arguments)


def test_the_program_says_what_its_options_mean_and_refuses_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, status in (("--help", 0), (f"shards={tmp_path / 'none'}", 2)):
        monkeypatch.setattr(sys, "argv", ["view.py", arguments])
        with pytest.raises(SystemExit) as end:
            run_program(main)
        assert end.value.code == status
    out, err = capsys.readouterr()
    assert "usage: python -m train.view" in out and "Print what an encoded data set holds" in out
    assert err.startswith(f"train.view: data folder {tmp_path / 'none'} does not exist") and "Traceback" not in err
