"""A viewed data set shows what its records hold: pictures as the VAE decodes them, texts escaped, exact counts."""

import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.documents import ImageSegment, TextSegment, decode_document
from data.manifest import Manifest
from data.packing import lay_out
from data.pictures import contact_sheet, encode_png, from_unit
from data.shards import BadRecords, Record, write_shard
from data.tokenizer import Tokenizer
from model.vae import decode, load_vae
from tests.pages import Page
from tests.sources import encoded_records, interleaved, latent_spec, make_source
from train.config import options, run_program
from train.encode import main as encode
from train.pages.dataset_summary import (
    CHARACTERS,
    PICTURES,
    EncodedData,
    Picture,
    ShownDocument,
    bins,
    false_colours,
    quantiles,
)
from train.view import CONFIG, histogram, main

HOSTILE = '<script>alert("1")</script><img src=http://evil.example/x onerror=alert(1)>&amp;\'"'


def view(shards: Path, output: Path, **options: object) -> Page:
    main([f"shards={shards}", f"output={output}", *(f"{name}={value}" for name, value in options.items())])
    return Page((output / "index.html").read_text())


def keys(page: Page) -> list[str]:
    """The keys of the documents shown, which number through the data."""
    return [re.search(r'<p class="note">(\d+) · ', card.html)[1] for card in page.cards()]


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


# ---- what is shown ----


def test_pictures_are_what_the_vae_decodes_from_the_posteriors_mean(
    encoded: Path, tmp_path: Path, tokenizer: Tokenizer, vae_folder: Path
) -> None:
    """On the page and in the sheet, against a decode of each picture by itself."""
    page = view(encoded, tmp_path, vae=vae_folder, tokenizer=tokenizer.path, n=6)
    vae = load_vae(vae_folder)
    records = encoded_records(encoded)
    expected = []
    for key in keys(page):
        moments = next(
            s.moments for s in decode_document(records[int(key)], "").segments if isinstance(s, ImageSegment)
        )
        with torch.no_grad():
            expected.append(from_unit(decode(vae, torch.from_numpy(moments[None, :2].astype(np.float32))).numpy())[0])
    assert len(expected) == 6
    shown = [card.pictures() for card in page.cards()]
    for picture, (found,) in zip(expected, shown, strict=True):
        assert picture.std() > 1 and np.array_equal(found, picture)
    sheet = contact_sheet(expected, [caption(int(key)) for key in keys(page)], columns=8)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), np.asarray(sheet))
    assert "false colours" not in page.text


def test_every_document_has_its_caption_key_shard_grid_and_length(
    encoded: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    page = view(encoded, tmp_path, tokenizer=tokenizer.path, n=99)
    assert keys(page) == [f"{i:05d}" for i in range(14)]
    for number, (card, record) in enumerate(zip(page.cards(), encoded_records(encoded), strict=True)):
        length = len(lay_out(decode_document(record, ""), tokenizer.special, 2))
        shard = "a" if number < 5 else "b" if number < 8 else "c"
        assert caption(number) in card.text
        assert f"{number:05d} · {shard}.tar · 8x8 · {length} tokens" in card.text


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_captions_are_shown_and_never_interpreted(
    encoded: Path, tmp_path: Path, tokenizer: Tokenizer, with_tokenizer: bool
) -> None:
    """Whether they come from the token ids or from the records' json; the page is well-formed and asks for nothing."""
    page = view(encoded, tmp_path, n=14, **({"tokenizer": tokenizer.path} if with_tokenizer else {}))
    assert HOSTILE in page.cards()[13].text and page.unbalanced == [] and page.open == []
    for tag, attrs in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "href") or value.startswith(("data:image/webp;base64,", "#")), (tag, value[:80])
            assert "url(" not in (value or "").replace("url(#", ""), (tag, name, value)
    ids = re.findall(r' id="([^"]+)"', page.html)
    assert len(ids) == len(set(ids)) and "#0102" not in page.html
    assert ("No tokenizer=MODEL was given" in page.text) == (not with_tokenizer)


def test_the_same_seed_shows_the_same_and_another_seed_others(encoded: Path, tmp_path: Path, vae_folder: Path) -> None:
    def files(seed: int) -> list[bytes]:
        view(encoded, tmp_path, vae=vae_folder, n=4, seed=seed)
        return [(tmp_path / name).read_bytes() for name in ("sheet.png", "index.html")]

    assert files(3) == files(3)
    assert files(3)[0] != files(4)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "sheet.png"]


def test_documents_are_spread_over_all_the_data(pairs_folder: Path) -> None:
    """One from each sixth of 60, in shards of 31, 7 and 22; the seeds reach all of a sixth."""
    data, seen = EncodedData.open(str(pairs_folder), 2, None, None), set()
    for seed in range(40):
        numbers = [int(one.key) for one in data.look([0, 1, 2], 6, seed, BadRecords(0))[0]]
        assert [number // 10 for number in numbers] == list(range(6))
        seen |= {number % 10 for number in numbers}
    assert seen == set(range(10))


def test_without_a_vae_latents_are_shown_in_false_colours_and_it_says_so(
    pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two channels here: the third colour is the mid grey of 0. A cell is as large as its pixels."""
    page = view(pairs_folder, tmp_path, n=60)
    assert "latents in false colours" in page.text and "latents in false colours" in capsys.readouterr().out
    for card, record in zip(page.cards(), encoded_records(pairs_folder), strict=True):
        moments = decode_document(record, "").segments[-1].moments
        (shown,) = card.pictures()
        assert shown.shape == (8 * moments.shape[1], 8 * moments.shape[2], 3)
        for row, column in ((0, 0), (3, 2)):
            values = [*moments[:2, row, column].astype(float), 0.0]
            colour = [round((min(max(value, -3), 3) / 3 + 1) * 127.5) for value in values]
            assert np.abs(shown[8 * row + 4, 8 * column + 4] - np.array(colour)).max() <= 1


def test_false_colours_are_of_whitened_latents() -> None:
    spec = latent_spec(4)
    spec = type(spec)(**{**vars(spec), "mean": (1.0, -2.0, 0.0, 9.0), "std": (2.0, 0.5, 1.0, 1.0), "stride": 1})
    mean = torch.tensor([1.0 + 3, -2.0 - 0.75, 99.0, 0.0])[:, None, None]
    assert false_colours(mean, spec)[0, 0].tolist() == [round(1.5 * 127.5), round(0.5 * 127.5), 255]


def test_text_alone_shows_its_beginnings_and_no_sheet(
    texts_folder: Path, encoded: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sheet of an earlier call does not stay to pass for this one's; other files do."""
    (tmp_path / "mine.txt").write_text("mine")
    view(encoded, tmp_path, n=2)
    page = view(texts_folder, tmp_path, tokenizer=tokenizer.path, n=50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "mine.txt"]
    assert "there is no sheet.png" in page.text and "there is no sheet.png" in capsys.readouterr().out
    for card, record in zip(page.cards(), encoded_records(texts_folder), strict=True):
        (segment,) = decode_document(record, "").segments
        assert (
            tokenizer.decode(segment.token_ids).split() == card.text.split(f"{record['__key__'].decode()} ·")[0].split()
        )
    assert page.fact("pictures") == "none" and page.fact("kinds") == "text alone 50"
    assert 'id="latents"' not in page.html and 'id="sizes"' not in page.html


def test_texts_without_a_tokenizer_are_their_number_of_tokens(texts_folder: Path, tmp_path: Path) -> None:
    page = view(texts_folder, tmp_path, n=50)
    for card, record in zip(page.cards(), encoded_records(texts_folder), strict=True):
        (segment,) = decode_document(record, "").segments
        assert f"[{len(segment.token_ids)} text tokens]" in card.text


def test_a_long_text_is_cut_and_says_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = tokenizer.encode("a large red circle " * 2000).astype(np.int32)
    make_source(tmp_path / "data", tokenizer, [(long, None)])
    (card,) = view(tmp_path / "data", tmp_path / "out", tokenizer=tokenizer.path).cards()
    assert card.text.startswith("a large red circle a large") and "…" in card.text and len(card.text) < 800


def test_segments_in_any_order_keep_it() -> None:
    """Each picture goes with the text before it, else with the one after; marks say where pictures are."""
    one, two, three = (Picture((4, 4), np.zeros((8, 8, 3), np.uint8)) for _ in range(3))
    mixed = ShownDocument("k", "s.tar", 9, (one, "first", two, three, "last"))
    assert mixed.captioned() == [(one, "first"), (two, "first"), (three, "last")]
    assert mixed.text == "[picture 1] first [picture 2] [picture 3] last"
    assert ShownDocument("k", "s.tar", 9, ("caption", one)).text == "caption"
    assert ShownDocument("k", "s.tar", 9, (one,)).captioned() == [(one, "")]


def test_interleaved_documents_are_shown_in_order_up_to_a_number_of_pictures(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    make_source(tmp_path / "data", tokenizer, interleaved(30, images=6))
    page = view(tmp_path / "data", tmp_path / "out", tokenizer=tokenizer.path)
    numbers = []
    for card, record in zip(page.cards(), encoded_records(tmp_path / "data"), strict=True):
        document, pictures, expected = decode_document(record, ""), 0, []
        for segment in document.segments:
            pictures += isinstance(segment, ImageSegment)
            is_text = isinstance(segment, TextSegment)
            expected.append(tokenizer.decode(segment.token_ids) if is_text else f"[picture {pictures}]")
        if pictures > 1:
            beginning = " ".join(expected)[:CHARACTERS]
            assert " ".join(card.text.split()).startswith(" ".join(beginning.split()))
        assert len(card.pictures()) == min(pictures, PICTURES)
        assert (f"{PICTURES} of {pictures} pictures" in card.text) == (pictures > PICTURES)
        assert f"{len(lay_out(document, tokenizer.special, 2))} tokens" in card.text
        numbers.append(pictures)
    assert max(numbers) > PICTURES and 1 in numbers
    assert page.fact("kinds") == f"one picture {numbers.count(1)}, several pictures {30 - numbers.count(1)}"


# ---- what is counted ----


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_counts_equal_a_slow_count_over_the_records(
    pairs_folder: Path, tmp_path: Path, tokenizer: Tokenizer, patch_size: int
) -> None:
    page = view(pairs_folder, tmp_path, n=1, patch_size=patch_size, sequence_length=20)
    documents = [decode_document(record, "") for record in encoded_records(pairs_folder)]
    lengths = [len(lay_out(document, tokenizer.special, patch_size)) for document in documents]
    words = [sum(len(s.token_ids) for s in d.segments if isinstance(s, TextSegment)) for d in documents]
    grids = Counter(
        "{}x{}".format(*s.moments.shape[1:]) for d in documents for s in d.segments if isinstance(s, ImageSegment)
    )
    patches = sum(int(g[0]) * int(g[2]) // patch_size**2 * count for g, count in grids.items())
    long = sum(length > 20 for length in lengths)
    assert page.fact("documents") == "60" and page.fact("shards") == "3"
    assert page.fact("text tokens") == f"{sum(words):,}"
    assert page.fact("image tokens") == f"{patches:,} (patch_size={patch_size})"
    assert page.fact("longer than 20") == f"{long} documents, {long} with pictures"
    assert page.fact("pictures") == ", ".join(f"{grid}: {count}" for grid, count in grids.most_common())
    quarters = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1], method="inverted_cdf")
    for name, value in zip(["shortest", "25 %", "median", "75 %", "longest"], quarters, strict=True):
        assert f"{name} {value}" in page.fact("document tokens")
    for name, values in (("Length", lengths), ("Text", words)):
        median, most = np.quantile(values, [0.5, 1], method="inverted_cdf")
        assert re.search(rf'aria-label="{name}, [^"]*: median {median}, most {most}"', page.html)
    rows = re.findall(r"<tr><td>(\d+\.tar)</td>(.*?)</tr>", page.section("shards").html)
    assert [name for name, _ in rows] == ["00000.tar", "00002.tar", "00001.tar"]  # the largest first
    cells = np.array(
        [[int(cell.replace(",", "")) for cell in re.findall(r"<td>([\d,]+)</td>", row)] for _, row in rows]
    )
    assert cells[:, :4].sum(0).tolist() == [60, 60, sum(words), sum(lengths)]


@pytest.mark.parametrize(
    "low, high, is_log", [(0, 0, False), (7, 7, False), (5, 90, False), (2, 3000, True), (1, 21, True)]
)
def test_a_histogram_counts_every_document_once(low: int, high: int, is_log: bool) -> None:
    """Against a loop; whole bins that never shrink, so that a smooth distribution gives no comb."""
    values = [low, high, *np.random.default_rng(0).integers(low, high + 1, 300).tolist()]
    edges, documents, log = bins(Counter(values))
    assert log == is_log and edges[0] == low and edges[-1] > high
    for i in range(len(documents)):
        assert documents[i] == sum(edges[i] <= value < edges[i + 1] for value in values)
    assert documents.sum() == len(values) and len(documents) <= 41
    assert (np.diff(np.diff(edges)) >= 0).all()


def test_the_histogram_draws_those_counts() -> None:
    """The bars' heights in the SVG are in the proportion of the counts."""
    html = histogram("k", "Length", "tokens", Counter({3: 10, 4: 5, 6: 20}), (4, "sequence_length"))
    bars = re.findall(
        r'<path d="M ([\d.]+) ([\d.]+) \nL [\d.]+ [\d.]+ \nL [\d.]+ ([\d.]+)[^"]*" clip[^>]*fill: var\(--accent\)', html
    )
    heights = [float(bottom) - float(top) for _, bottom, top in bars]
    assert np.allclose(np.array(heights) / max(heights), [0.5, 0.25, 0, 1], atol=1e-3)
    assert "sequence_length" in html and "median 6, most 6" in html


def test_quantiles_are_numpys() -> None:
    values = np.random.default_rng(1).integers(0, 40, 237)
    shares = [0, 0.05, 0.25, 0.5, 0.95, 0.99, 1]
    assert quantiles(Counter(values.tolist()), shares) == np.quantile(values, shares, method="inverted_cdf").tolist()


def test_all_of_the_latents_have_the_manifests_statistics(encoded: Path, tmp_path: Path) -> None:
    """The encoder measured them over the same 14 pictures; some of them differ, and the page shows both."""
    spec = Manifest.load(encoded).latent_spec
    for n in (14, 3):
        table = view(encoded, tmp_path, n=n).section("latents").html
        rows = np.array(re.findall(r"<tr><td>\d</td>" + r"<td>(-?[\d.]+)</td>" * 4, table), dtype=float)
        assert np.allclose(rows[:, [0, 2]], np.stack([spec.mean, spec.std], axis=1), atol=1e-4)
        assert np.allclose(rows[:, [0, 2]], rows[:, [1, 3]], atol=1e-4) == (n == 14)


def test_one_shard_is_viewed_by_itself(pairs_folder: Path, tmp_path: Path) -> None:
    page = view(pairs_folder / "00001.tar", tmp_path, n=32)
    assert keys(page) == [f"{i:06d}" for i in range(31, 38)]
    assert page.fact("shards") == "1" and page.fact("documents") == "7"
    for path in ("00007.tar", "manifest.json"):
        with pytest.raises(ValueError, match=r"lists no such shard; name one of 00000.tar ... 00002.tar \(3 shards\)"):
            view(pairs_folder / path, tmp_path)


# ---- what is bad ----


def test_a_corrupt_record_and_a_missing_index_are_named_and_the_rest_is_shown(
    pairs_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(pairs_folder, tmp_path / "data")
    (data / "00001.tar.idx").unlink()
    span = Manifest.load(data).load_index(2).spans[4]
    contents = bytearray((data / "00002.tar").read_bytes())
    contents[span[0] + 600] ^= 1
    (data / "00002.tar").write_bytes(contents)
    page = view(data, tmp_path / "out", n=99)
    assert keys(page) == [f"{i:06d}" for i in range(60) if not 31 <= i < 38 and i != 42]
    assert page.fact("documents") == "60" and page.fact("missing or damaged") == "checksum: 1, unreadable index: 1"
    out = capsys.readouterr().out
    for text in (page.section("remarks").text, out):
        assert f"{data}/00002.tar#4: checksum" in text and f"{data}/00001.tar.idx: unreadable index" in text
        assert "7 of 60 documents are in shards whose index cannot be read" in text


def test_a_cut_or_lost_shard_is_named(pairs_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pairs_folder, tmp_path / "data")
    with (data / "00000.tar").open("r+b") as file:
        file.truncate(5000)
    (data / "00002.tar").unlink()
    page = view(data, tmp_path / "out", n=60)
    reasons = "missing shard: 1, shard of another size: 1, truncated: 30, unreadable shard: 22"
    assert page.fact("missing or damaged") == reasons
    assert f"{data}/00002.tar: missing shard" in page.text and "00000.tar: shard of another size (5000" in page.text
    assert re.search(r"Missing or damaged: \d+ more", page.text)  # than are named
    assert page.fact("longer than 4,096") == "0 documents, 0 with pictures"


def test_counts_are_shown_where_no_record_can_be_read(pairs_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pairs_folder, tmp_path / "data")
    for path in data.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    page = view(data, tmp_path / "out", n=5)
    assert page.fact("missing or damaged") == "checksum: 5" and not page.cards()
    assert "median" in page.fact("document tokens") and not (tmp_path / "out/sheet.png").exists()


def test_where_nothing_can_be_read_it_is_refused(pairs_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(pairs_folder, tmp_path / "data")
    for path in data.glob("*.idx"):
        path.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"none of 3 indices can be read \(.*00000.tar.idx: unreadable index"):
        view(data, tmp_path / "out")


# ---- refusals ----


def test_another_vae_or_tokenizer_is_refused(
    encoded: Path, texts_folder: Path, pairs_folder: Path, tmp_path: Path, tokenizer: Tokenizer, vae_folder: Path
) -> None:
    with pytest.raises(ValueError, match=rf"vae={vae_folder} has hash .*, the data was encoded with aaaaaaaaaaaaaaaa"):
        view(pairs_folder, tmp_path / "out", vae=vae_folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        view(encoded, tmp_path / "out", vae=tmp_path / "none/vae")
    with pytest.raises(ValueError, match=r"vae=.* holds text alone; leave vae out"):
        view(texts_folder, tmp_path / "out", vae=vae_folder)
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.path.read_bytes() + b"\x12\x00")  # an empty trainer spec: the same pieces
    with pytest.raises(
        ValueError, match=rf"encoded with tokenizer {tokenizer.hash}, but .*other.model is .*; name the"
    ):
        view(encoded, tmp_path / "out", tokenizer=other)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_viewed_is_refused_with_a_remedy(pairs_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    cases = [
        ({"shards": tmp_path / "none"}, FileNotFoundError, "does not exist; make it with `python -m train.encode`"),
        ({"shards": tmp_path / "empty"}, FileNotFoundError, "has no manifest.json"),
        ({"shards": tmp_path / "empty/00000.tar"}, FileNotFoundError, "has no manifest.json"),
        ({"n": 0}, ValueError, "n=0: expected 1 to 1000"),
        ({"n": 1001}, ValueError, "n=1001: expected 1 to 1000, so that the page can be opened"),
        ({"patch_size": 0}, ValueError, "patch_size=0: expected 1 or more"),
        ({"patch_size": 3}, ValueError, "latent grid 4x4 is not a multiple of patch_size=3; choose another patch size"),
        ({"sequence_length": 0}, ValueError, "sequence_length=0: expected 1 or more"),
        ({"output": tmp_path / "file/out"}, OSError, r"cannot write there \(.*\); choose a writable folder"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            settings = {"shards": pairs_folder, "output": tmp_path / "out", **changes}
            main([f"{name}={value}" for name, value in settings.items()])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exactly one of them"):
        main([])


def test_the_program_says_what_its_options_mean_and_refuses_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all(comment for *_, comment in options(CONFIG))
    for arguments, status in (("--help", 0), (f"shards={tmp_path / 'none'}", 2)):
        monkeypatch.setattr(sys, "argv", ["view.py", arguments])
        with pytest.raises(SystemExit) as end:
            run_program(main)
        assert end.value.code == status
    out, err = capsys.readouterr()
    assert "usage: python -m train.view" in out and "Show what an encoded data set holds" in out
    assert err.startswith(f"train.view: data folder {tmp_path / 'none'} does not exist") and "Traceback" not in err
