"""Captions of several keys: all are stored, what is missing is counted, and weights decide no bytes."""

import json
import os
from pathlib import Path

import pytest

from data.documents import decode_document
from data.manifest import Manifest
from data.raw import read_texts
from data.raw_document import KeysConfig
from data.shards import BadRecords
from data.tokenizer import Tokenizer
from tests.encoding.jobs import OUT, Capsys, Encode, contents_of, picture_record, raw_folder, write_times
from tests.sources import encoded_records
from train.encode import main
from train.encoding.encoder import EncoderConfig
from train.encoding.sidecar import Sidecar
from train.encoding.verification import verify_folder
from train.pages.dataset_summary import EncodedData

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

FOUND = [
    {"caption": "a cat", "long": ["a cat on a mat", "a big red cat"]},
    {"caption": "a dog", "long": ""},
    {"long": "a blue bird in a tree"},
    {"caption": None, "long": "  "},  # none at all
    {"caption": "a \ud800 fish", "long": "one fish"},
]


def raw_of(folder: str, split: bool = False) -> Path:
    """Pictures with captions under two keys, and in a .txt for the first; one shard or two."""
    records = [
        picture_record(i, txt=b"from txt" if i == 0 else None, json=json.dumps(info).encode())
        for i, info in enumerate(FOUND)
    ]
    return raw_folder(Path(folder), {"a": records[:2], "b": records[2:]} if split else {"a": records})


def test_captions_of_all_keys_are_stored_and_those_missing_are_counted(
    encode: Encode, tokenizer: Tokenizer, capsys: Capsys
) -> None:
    """The counts come from the sidecars: right after a restart that encodes one of two shards."""
    raw = raw_of("raw", split=True)
    keys = "{caption: 1, long: 2, txt: 0.5}"
    said = (
        "encode: captions: caption 2 of 4 pictures (2 missing, of these 1 undecodable), "
        "long 3 (1 missing, of these 1 empty), txt 1 (3 missing)"
    )
    encode(raw, caption_keys=keys, max_bad_fraction=0.5)
    found = capsys.readouterr().out
    assert said in found and "skipped no caption: 1" in found
    (OUT / "b.tar.json").unlink()
    encode(raw, caption_keys=keys, max_bad_fraction=0.5)
    assert said in capsys.readouterr().out
    documents = [decode_document(record, "here") for record in encoded_records(OUT)]
    texts = [[tokenizer.decode(caption.token_ids) for caption in document.captions] for document in documents]
    assert texts == [
        ["a cat", "a cat on a mat", "a big red cat", "from txt"],
        ["a dog"],
        ["a blue bird in a tree"],
        ["one fish"],
    ]
    assert [document.caption_kinds for document in documents] == [(0, 1, 1, 2), (0,), (1,), (1,)]
    assert json.loads(encoded_records(OUT)[0]["json"])["long"] == FOUND[0]["long"]
    manifest = Manifest.load(OUT)
    assert manifest.captions == {"caption": 1, "long": 2, "txt": 0.5}
    lengths = [[len(caption.token_ids) for caption in document.captions] for document in documents]
    first, second, third, fourth = lengths
    a, b = (entry.caption_tokens for entry in manifest.shards)
    assert a == {"0": second * 2, "0+1+2": [max(first), first[0], round((first[1] + first[2]) / 2), first[3]]}
    assert b == {"1": [third[0] + fourth[0]] * 2}
    assert verify_folder(str(OUT)) == 0
    texts = list(read_texts([str(raw)], BadRecords(1), KeysConfig(caption_keys={"caption": 1, "long": 0})))
    assert texts == ["a cat", *FOUND[0]["long"], "a dog", "a blue bird in a tree", "one fish"], "for the tokenizer"


def test_one_key_is_what_caption_key_was_and_weights_rewrite_only_the_manifest(encode: Encode, raw: Path) -> None:
    raw = raw_of("mine")
    encode(raw, caption_keys="{long: 3}", max_bad_fraction=0.5)
    origin = Sidecar.origin_of(OUT / "a.tar")
    assert origin["caption_key"] == "long" and "caption_keys" not in origin
    assert "captions" not in json.loads((OUT / "manifest.json").read_text()) and not Manifest.load(OUT).captions
    cat = encoded_records(OUT)[0]
    assert "caption_kinds.npy" not in cat and json.loads(cat["json"])["caption"] == FOUND[0]["long"]
    before = write_times()
    encode(raw, caption_keys="{long: 1}", max_bad_fraction=0.5)
    assert write_times() == before
    files = encode(raw, Path("other"), caption_keys="{caption: 1, long: 2}", max_bad_fraction=0.5)
    assert Sidecar.origin_of(Path("other/a.tar"))["caption_keys"] == ["caption", "long"]
    written = os.stat("other/a.tar").st_mtime_ns
    before = Manifest.load("other")
    again = encode(raw, Path("other"), caption_keys="{caption: 5, long: 0}", max_bad_fraction=0.5)
    assert {name for name in files if again[name] != files[name]} == {"manifest.json"}
    assert os.stat("other/a.tar").st_mtime_ns == written
    after = Manifest.load("other")
    assert after.captions == {"caption": 5, "long": 0} and after.content_hash == before.content_hash
    encode(raw, Path("other"), caption_keys="{long: 2, caption: 1}", max_bad_fraction=0.5)
    assert Manifest.load("other").content_hash != before.content_hash, "their order gives kinds their numbers"


def test_keys_of_captions_change_nothing_of_texts(encode: Encode) -> None:
    """One config may encode pictures and texts; a training's weights for captions of texts are then refused."""
    Path("texts").mkdir()
    Path("texts/a.jsonl").write_text('{"text": "a cat"}\n')
    files = encode(Path("texts"), vae=None)
    before = write_times()
    assert encode(Path("texts"), vae=None, caption_keys="{caption: 1, long: 2}") == files
    assert write_times() == before and not Manifest.load(OUT).captions


@pytest.mark.parametrize("weights", [{"a": -1.0}, {"a": 0.0, "b": 0}, {"a": float("nan")}, {"a": float("inf")}])
def test_weights_that_cannot_be_drawn_by_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"caption_keys=.*: expected finite weights, 0 or more, and one above 0"):
        EncoderConfig(caption_keys=weights)


def test_verifying_and_indexing_check_kinds_of_captions(
    encode: Encode, tokenizer: Tokenizer, vae_folder: Path, capsys: Capsys
) -> None:
    """Kinds that the manifest does not name, and lengths that it does not state; `index=` wants the keys."""
    encode(raw_of("raw"), caption_keys="{caption: 1, long: 2}", max_bad_fraction=0.5)
    whole = contents_of(OUT)
    named = json.loads(whole["manifest.json"])
    entry = named["shards"][0]
    for change, said in (
        ({"captions": {"only": 1}, "shards": [{**entry, "caption_tokens": {}}]}, "wrong captions"),
        ({"shards": [{**entry, "caption_tokens": {"0": [9, 9]}}]}, "wrong counts"),
    ):
        (OUT / "manifest.json").write_text(json.dumps({**named, **change}))
        assert verify_folder(str(OUT)) == 1 and said in capsys.readouterr().out
    (OUT / "a.tar.idx").unlink()
    settings = [f"index={OUT}", f"tokenizer={tokenizer.path}", f"vae={vae_folder}", "resolution=32", "device=cpu"]
    with pytest.raises(ValueError, match=r"made with caption_keys=\['caption', 'long'\], not None: give the one"):
        main(settings)
    encode(raw_of("one"), Path("single"), max_bad_fraction=0.9)
    with pytest.raises(ValueError, match=r"made with caption_keys=None, not \['caption', 'long'\]: give the one"):
        main(["index=single", *settings[1:], "caption_keys={caption: 1, long: 2}"])
    main([*settings, "caption_keys={caption: 1, long: 2}"])
    assert contents_of(OUT)["a.tar.idx"] == whole["a.tar.idx"]
    assert json.loads((OUT / "manifest.json").read_text()) == named and verify_folder(str(OUT)) == 0
    with pytest.raises(ValueError, match=r"captions of kind 1: expected one of \['caption'\]"):
        (OUT / "manifest.json").write_text(json.dumps({**named, "captions": {"caption": 1}}))
        Manifest.load(OUT)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_view_shows_the_captions_by_key(encode: Encode, tokenizer: Tokenizer, with_tokenizer: bool) -> None:
    """As the tokens say or, without a tokenizer, as the records' json does."""
    encode(raw_of("raw"), caption_keys="{caption: 1, long: 2, txt: 0.5}", max_bad_fraction=0.5)
    data = EncodedData.open(str(OUT), 2, str(tokenizer.path) if with_tokenizer else None, None)
    documents, _ = data.read_documents([0], 4, 0, BadRecords(0))
    assert [document.text for document in documents] == [
        "caption: a cat | long: a cat on a mat | long: a big red cat | txt: from txt",
        "caption: a dog",
        "long: a blue bird in a tree",
        "long: one fish",
    ]
