"""Rows become records with roles: conversations by the tokenizer's chat form, edits and captioned pictures plainly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.chat import Chat, Message
from data.dataset import DataConfig, open_data
from data.documents import ImageSegment, decode_document
from data.manifest import Manifest
from data.pictures import encode_png
from data.source import SourceConfig
from data.tokenizer import Tokenizer
from tests.encoding.jobs import OUT, Capsys, Contents, arguments, contents_of, pixels_of
from tests.json_tokenizers import byte_level, write_folder
from tests.sources import encoded_records
from train.encode import main

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rows_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Return a folder with three pictures and these rows."""
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encode_png(pixels_of(number)))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def encode(inputs: Path, tokenizer: Tokenizer, **options: object) -> Contents:
    main(arguments(inputs, OUT, tokenizer, **{"vae": "pixels", **options}))
    return contents_of(OUT)


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


ROWS = [
    {"image": "0.png", "caption": "a red one"},
    {"images": ["1.png"], "conversations": turns("<image>\nwhat is it?", "blue")},
    {"conversations": turns("hello", "you", "and", "me")},
    {"input_images": ["0.png", "1.png"], "instruction": "join them", "output_image": "2.png"},
]


def documents_in(folder: Path, tokenizer: Tokenizer) -> list[list[tuple[str, Any]]]:
    """The roles of each document's segments, with the texts, and the pixels of pictures."""
    found = []
    for record in encoded_records(folder):
        segments = decode_document(record, "here").segments
        found.append([(s.role, s.array if isinstance(s, ImageSegment) else s.token_ids.tolist()) for s in segments])
    return found


def assert_same(found: list[tuple[str, Any]], expected: list[tuple[str, Any]], tokenizer: Tokenizer) -> None:
    """`expected` names pictures by number and texts by words or ids."""
    assert [role for role, _ in found] == [role for role, _ in expected]
    for (_, have), (_, want) in zip(found, expected, strict=True):
        if isinstance(want, int):
            assert np.array_equal(have, pixels_of(want).transpose(2, 0, 1))
        else:
            assert have == (tokenizer.encode(want).tolist() if isinstance(want, str) else list(want))


def test_rows_become_records_with_roles(tokenizer: Tokenizer, capsys: Capsys) -> None:
    files = encode(rows_folder(Path("raw"), ROWS), tokenizer)
    pair, asked, talk, edit = documents_in(OUT, tokenizer)
    given, target, eos = "context", "target", tokenizer.special.eos
    assert_same(pair, [(target, "a red one"), (target, 0)], tokenizer)
    assert_same(asked, [(given, 1), (given, "what is it?\n"), (target, "blue")], tokenizer)
    you = [*tokenizer.encode("you"), eos]
    assert_same(talk, [(given, "hello\n"), (target, you), (given, "and\n"), (target, "me")], tokenizer)
    assert_same(edit, [(given, 0), (given, 1), (given, "join them"), (target, 2)], tokenizer)
    assert json.loads(encoded_records(OUT)[3]["json"])["instruction"] == "join them"
    assert Manifest.load(OUT).shards[0].records == 4 and "skipped none" in capsys.readouterr().out
    assert encode(Path("raw"), tokenizer) == files  # done: nothing is encoded again
    (OUT / "rows.tar.json").unlink()
    assert encode(Path("raw"), tokenizer, decode_threads=3) == files


def test_a_conversation_has_the_form_of_its_tokenizers_template(tmp_path: Path) -> None:
    library = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    folder = write_folder(tmp_path / "chatml", library, tokenizer_config=settings)
    tokenizer = Tokenizer(folder)
    encode(rows_folder(Path("raw"), ROWS), Tokenizer(folder))
    _, asked, talk, edit = documents_in(OUT, tokenizer)
    messages = [Message("user", ("hello",)), Message("assistant", ("you",)), Message("user", ("and",))]
    expected = Chat(tokenizer).lay_out([*messages, Message("assistant", ("me",))])
    assert_same(talk, [(role, ids.tolist()) for role, ids in expected], tokenizer)
    assert tokenizer.piece(talk[1][1][-1]) == "<|im_end|>"
    assert [role for role, _ in asked] == ["context", "context", "context", "target"]
    assert "".join(map(tokenizer.piece, asked[0][1])) == "<|im_start|>userĊ"
    given, target = "context", "target"
    assert_same(edit, [(given, 0), (given, 1), (given, "join them"), (target, 2)], tokenizer)  # plainly
    manifest = Manifest.load(OUT)
    assert (manifest.tokenizer_hash, manifest.chat_hash) == (tokenizer.hash, tokenizer.chat_hash)
    shard = next(OUT.glob("*.tar")).stat().st_ino
    encode(Path("raw"), Tokenizer(folder))
    assert next(OUT.glob("*.tar")).stat().st_ino == shard, "done already"

    settings["chat_template"] = CHATML.replace("<|im_end|>", "<|endoftext|>")
    write_folder(folder, library, tokenizer_config=settings)
    config = DataConfig(sources={"rows": SourceConfig(path=str(OUT))}, tokenizer=str(folder), lanes=1)
    with pytest.raises(ValueError, match="laid out by chat template"):
        open_data(config, 0, 8)
    encode(Path("raw"), Tokenizer(folder))  # another template: encoded again
    assert documents_in(OUT, tokenizer)[2] != talk
    del settings["chat_template"]
    write_folder(folder, library, tokenizer_config=settings)
    encode(Path("raw"), Tokenizer(folder))  # none: the plain form
    write_folder(folder, library, tokenizer_config={**settings, "chat_template": CHATML})
    with pytest.raises(ValueError, match="laid out by chat template plain"):
        open_data(config, 0, 8)
    write_folder(folder, library, tokenizer_config=settings)
    assert open_data(config, 0, 8).tokenizer.chat_hash == Manifest.load(OUT).chat_hash


def test_what_is_bad_in_rows_is_counted_and_what_is_odd_is_told(tokenizer: Tokenizer, capsys: Capsys) -> None:
    rows = [
        *ROWS,
        {"image": "none.png", "caption": "a"},
        {"image": "rows.jsonl", "caption": "a"},
        {"conversations": turns("<image>", "a")},
        {"image": "0.png", "conversations": turns("what?", "red")},
    ]
    encode(rows_folder(Path("raw"), rows), tokenizer, max_bad_fraction=0.5)
    said = capsys.readouterr().out
    assert "skipped missing picture: 1, placeholder without an image: 1, undecodable picture: 1" in said
    assert "pictures without <image>, put before the first question: 1, such as raw/rows.jsonl:8" in said


def test_conversations_without_pictures_need_no_autoencoder(tokenizer: Tokenizer) -> None:
    talk = {"conversations": turns("hello", "you")}
    encode(rows_folder(Path("raw"), [talk] * 70 + ROWS), tokenizer, vae=None, max_bad_fraction=1)
    assert Manifest.load(OUT).shards[0].records == 71 and Manifest.load(OUT).latent_spec is None
    encode(Path("raw"), tokenizer)  # pictures may come later
    assert Manifest.load(OUT).shards[0].records == 74
    with pytest.raises(ValueError, match="inputs hold pictures: give vae=FOLDER"):
        encode(rows_folder(Path("pictures"), ROWS), tokenizer, vae=None)


def test_a_conversation_that_the_template_refuses_is_a_bad_record(tmp_path: Path, capsys: Capsys) -> None:
    template = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + CHATML
    settings = {"eos_token": "<|im_end|>", "chat_template": template}
    folder = write_folder(tmp_path / "strict", byte_level(["<|im_start|>", "<|im_end|>"]), tokenizer_config=settings)
    refused = {"conversations": [{"from": "system", "value": "a"}, *turns("b", "c")]}
    encode(rows_folder(Path("raw"), [refused, *ROWS]), Tokenizer(folder), max_bad_fraction=0.5)
    said = capsys.readouterr().out
    assert "refused conversation: 1" in said and "rows.jsonl:1: refused conversation" in said and "no system" in said


def test_rows_of_texts_and_rows_of_pictures_are_two_data_sets(tokenizer: Tokenizer) -> None:
    folder = rows_folder(Path("raw"), ROWS)
    (folder / "texts.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="inputs mix rows with pictures with text files: encode them into two folders"):
        encode(folder, tokenizer)
