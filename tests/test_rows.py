"""Rows that name pictures become documents with roles; what cannot be used is counted by reason and named."""

import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

import data.raw
from data.chat import Message
from data.contents import contents_of
from data.inputs import expand
from data.raw import SUFFIXES, read_raw, read_texts
from data.raw_document import KeysConfig, RawDocument
from data.shards import BadRecords, write_shard

RED, BLUE = b"\x89PNG red", b"\x89PNG blue"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    return tmp_path


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def read(folder: Path, *rows: Any, **names: Any) -> tuple[list[RawDocument], BadRecords]:
    path = folder / "rows.jsonl"
    path.write_bytes(lines(*rows))
    bad = BadRecords(max_fraction=1)
    return list(read_raw(path, str(path), bad, KeysConfig(**names))), bad


def one(folder: Path, row: Any, **names: Any) -> RawDocument:
    (document,), bad = read(folder, row, **names)
    assert not bad.reasons, bad.names
    return document


def said(*values: str, **more: Any) -> dict[str, Any]:
    """A conversation whose turns alternate, from the user on."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns, **more}


def test_a_picture_with_captions_is_a_pair(folder: Path) -> None:
    document = one(folder, {"image": "images/red.png", "caption": " a red one ", "score": 3})
    assert document.segments == ("a red one", RED) and not document.roles and not document.captions
    kept = {"image": "images/red.png", "caption": "a red one", "score": 3}
    assert document.info == {**kept, "source": "rows.jsonl", "line": 1}
    assert one(folder, {"image": str(folder / "blue.png"), "captions": ["a"]}).segments == ("a", BLUE)  # absolute
    several = one(folder, {"images": ["blue.png"], "captions": ["a", None, "b"]})
    assert several.segments == ("a", BLUE) and several.captions == ("a", "b")
    kinds = one(folder, {"image": "blue.png", "long": "a b", "short": ["a", "b"]}, caption_keys={"short": 1, "long": 2})
    assert kinds.captions == ("a", "b", "a b") and kinds.caption_kinds == (0, 0, 1)
    assert one(folder, {"image": "blue.png", "text": "a"}, caption_keys={"text": 1}).segments == ("a", BLUE)


def test_an_edit_gives_its_inputs_and_the_instruction_and_asks_for_its_output(folder: Path) -> None:
    row = {"input_images": ["blue.png", "images/red.png"], "instruction": "join them", "output_image": "blue.png"}
    document = one(folder, row)
    assert document.segments == (BLUE, RED, "join them", BLUE)
    assert document.roles == ("context", "context", "context", "target")
    assert document.texts == ("join them",) and document.info["input_images"] == row["input_images"]
    single = one(folder, {"input_image": "blue.png", "instruction": "make it red", "output_image": "images/red.png"})
    assert single.segments == (BLUE, "make it red", RED) and single.roles == ("context", "context", "target")
    drawn = one(folder, {"task_type": "t2i", "instruction": "a red one", "output_image": "images/red.png"})
    assert drawn.segments == ("a red one", RED) and not drawn.roles


def test_a_conversation_has_its_pictures_where_the_placeholders_are(folder: Path) -> None:
    row = said(
        "<image>\nWhat is\n<image>?", "Red.", "And?", "Blue: <image>", images=["blue.png", "images/red.png", "blue.png"]
    )
    row["conversations"].insert(0, {"from": "system", "value": "Be short."})
    document = one(folder, row)
    assert document.messages == (
        Message("system", ("Be short.",)),
        Message("user", (BLUE, "What is", RED, "?")),
        Message("assistant", ("Red.",)),
        Message("user", ("And?",)),
        Message("assistant", ("Blue: ", BLUE)),
    )
    assert document.segments == tuple(part for message in document.messages for part in message.parts)
    other = {
        "messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}],
        "images": ["blue.png"],
    }
    assert one(folder, other).messages == (Message("user", (BLUE, "a")), Message("assistant", ("b",)))
    assert one(folder, said("a", "b")).messages == (Message("user", ("a",)), Message("assistant", ("b",)))


def test_line_breaks_beside_a_placeholder_are_dropped_and_others_kept(folder: Path) -> None:
    """Also a million of them, in no time: each would be looked at a million times by a search for their end."""
    row = said("a\n\nb\n\n<image>\n\n<image>\nc\n\nd" + "\n" * 10**6 + "e", "f", images=["blue.png", "blue.png"])
    assert one(folder, row).messages[0].parts == ("a\n\nb", BLUE, BLUE, "c\n\nd" + "\n" * 10**6 + "e")


def test_pictures_that_no_turn_mentions_come_first_and_are_noted(folder: Path) -> None:
    (document,), bad = read(folder, said("What is it?", "Red.", image="images/red.png"))
    assert document.messages[0] == Message("user", (RED, "What is it?"))
    assert not bad.reasons and bad.noted == {"pictures without <image>, put before the first question": 1}


PICTURE = {"image": "blue.png", "caption": "a"}
BAD: list[tuple[dict[str, Any], str]] = [
    (said("<image> <image>", "a", image="blue.png"), "placeholder without an image"),
    (said("<image>", "a"), "placeholder without an image"),
    (said("<image>", "a", image=None), "placeholder without an image"),
    (said("<image>", "a", images=["blue.png", "blue.png"]), "image without a placeholder"),
    ({"image": "blue.png", "conversations": [{"from": "gpt", "value": "a"}]}, "image without a placeholder"),
    ({"conversations": [{"from": "ghost", "value": "a"}]}, "unknown speaker"),
    (said("a"), "no assistant turn"),
    (said("a", " \n"), "empty turn"),
    ({"conversations": []}, "undecodable conversation"),
    ({"conversations": "a"}, "undecodable conversation"),
    ({"conversations": [["human", "a"]]}, "undecodable conversation"),
    ({"conversations": [{"from": "human", "value": 7}]}, "undecodable conversation"),
    ({"conversations": [{"from": None, "value": "a"}]}, "undecodable conversation"),
    (said("a", "\ud800"), "undecodable conversation"),
    (said(*["a"] * 1001), "too many turns"),
    ({**PICTURE, "image": "none.png"}, "missing picture"),
    ({**PICTURE, "image": "blue.png/x"}, "missing picture"),
    ({**PICTURE, "image": "x" * 5000}, "missing picture"),
    ({**PICTURE, "image": "a\0b"}, "missing picture"),
    ({**PICTURE, "image": "\udc00"}, "missing picture"),
    ({**PICTURE, "image": "loop.png"}, "missing picture"),
    ({**PICTURE, "image": "images"}, "unreadable picture"),
    ({**PICTURE, "image": "/dev/zero"}, "unreadable picture"),
    ({**PICTURE, "image": "pipe.png"}, "unreadable picture"),
    ({**PICTURE, "image": "/proc/self/mem"}, "empty picture"),  # whose reading would fail
    ({**PICTURE, "image": "https://host/a.png?token=secret"}, "picture behind a URL"),
    ({**PICTURE, "image": "file:///etc/passwd"}, "picture behind a URL"),
    ({**PICTURE, "image": 7}, "no picture"),
    ({**PICTURE, "image": {"bytes": None, "path": None}}, "no picture"),
    ({**PICTURE, "image": [[]]}, "no picture"),
    ({**PICTURE, "image": ["blue.png", "blue.png"]}, "too many pictures"),
    (said("a", "b", images=["blue.png"] * 1001), "too many pictures"),
    ({"image": "blue.png"}, "no caption"),
    ({**PICTURE, "caption": None}, "no caption"),
    ({**PICTURE, "caption": " "}, "empty caption"),
    ({"output_image": "blue.png", "input_image": "blue.png"}, "no instruction"),
    ({"output_image": "blue.png", "input_image": "blue.png", "instruction": " "}, "empty instruction"),
    ({"output_image": ["blue.png"] * 2, "input_image": "blue.png", "instruction": "a"}, "too many pictures"),
    ({"output_image": [], "input_image": "blue.png", "instruction": "a"}, "no picture"),
    ({"output_image": "none.png", "instruction": "a"}, "missing picture"),
    ({"caption": "a"}, "no text"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_used_is_named_and_costs_no_other_row(folder: Path, row: dict[str, Any], reason: str) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    documents, bad = read(folder, PICTURE, row, {"text": "one"})
    assert [document.segments for document in documents] == [("a", BLUE), ("one",)]
    assert dict(bad.reasons) == {reason: 1} and bad.seen == 3
    assert bad.names[0].startswith(f"{folder}/rows.jsonl:2: {reason}") and "secret" not in bad.names[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_picture_that_may_not_be_read_is_counted(folder: Path) -> None:
    (folder / "blue.png").chmod(0)
    assert dict(read(folder, PICTURE)[1].reasons) == {"unreadable picture": 1}


def test_a_file_that_is_too_large_for_a_picture_is_not_read(folder: Path) -> None:
    with (folder / "large.png").open("wb") as file:
        file.truncate(1 << 33)  # a hole
    assert dict(read(folder, {**PICTURE, "image": "large.png"})[1].reasons) == {"oversized picture": 1}


def test_a_text_is_read_as_ever_whatever_else_its_row_holds(folder: Path) -> None:
    rows = [
        {"text": "one", "image": "none.png"},
        {"text": "two", "image": "blue.png", "messages": [], "output_image": "blue.png"},
        {"text": "three"},
    ]
    documents, bad = read(folder, *rows)
    assert [document.segments for document in documents] == [("one",), ("two",), ("three",)] and not bad.reasons
    assert documents[0].info == {"source": "rows.jsonl", "line": 1}
    assert bad.noted == {"images left out of texts, which caption_keys={text: 1} would caption": 2}


def test_the_manuals_examples_are_read(folder: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```json\n(.*?)```", page.partition("### Rows that name pictures")[2], re.DOTALL)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    assert len(blocks) == 3 and len(rows) == 15
    for path in re.findall(r'"([^"]+\.(?:png|jpg))"', "".join(blocks)):
        if not path.startswith("/"):
            (folder / path).write_bytes(RED)
    documents, bad = read(folder, *(row for row in rows if "alt" not in row and "license" not in row))
    assert len(documents) == 13 and not bad.reasons, bad.names
    kinds = one(folder, next(row for row in rows if "alt" in row), caption_keys={"alt": 1, "long": 2})
    assert kinds.captions == ("a cat", "A cat on a chair.")


def test_hostile_rows_end_nothing(folder: Path) -> None:
    """Whatever a row's values are, each row gives a document or one named error."""
    rng = random.Random(0)
    values: list[Any] = [None, True, 7, -1e400, "", "a", "blue.png", "<image>" * 3000, "\ud800", "../" * 50, [], {}]
    values += [["blue.png"], [None], {"path": "blue.png"}, {"bytes": "x"}, [{"from": "human", "value": "<image>"}]]
    keys = ["image", "images", "caption", "captions", "conversations", "input_image", "input_images", "instruction"]
    deep: Any = "a"
    for _ in range(300):
        deep = [deep]
    rows = [
        {key: rng.choice([*values, deep]) for key in rng.sample([*keys, "output_image", "text"], 4)} for _ in range(600)
    ]
    documents, bad = read(folder, *rows)
    assert len(documents) + bad.reasons.total() == bad.seen == 600
    assert len(documents) > 20 and len(bad.reasons) > 10
    json.dumps([document.info for document in documents])


def test_an_interleaved_record_may_say_roles(folder: Path) -> None:
    listed = [
        {"image": "a.png", "role": "context"},
        {"text": "make it blue", "role": "context"},
        {"image": "b.png"},
        "done",
    ]
    spoilt = [
        {"text": "a", "role": "user"},
        {"text": 7},
        {"role": "context"},
        {"text": "a", "image": "a.png"},
        {"text": "a", "role": []},
    ]
    records = [{"segments": listed}, *({"segments": [segment]} for segment in spoilt)]
    path = folder / "a.tar"
    write_shard(
        path,
        [
            {"__key__": b"%d" % i, "a.png": RED, "b.png": BLUE, "json": json.dumps(record).encode()}
            for i, record in enumerate(records)
        ],
    )
    bad = BadRecords(max_fraction=1)
    (document,) = read_raw(path, str(path), bad)
    assert document.segments == (RED, "make it blue", BLUE, "done")
    assert document.roles == ("context", "context", "target", "target")
    assert dict(bad.reasons) == {"undecodable segments": len(spoilt)}


def test_rows_behind_a_url_name_pictures_beside_them(folder: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/rows/images/red.png", RED)
    rows = lines(*({**PICTURE, "image": path} for path in ("images/red.png", "none.png", "../x.png", "/etc/passwd")))
    store.pipe("/rows/rows.jsonl", rows)
    (folder / "copy.jsonl").write_bytes(rows)
    bad = BadRecords(max_fraction=1)
    (document,) = read_raw(folder / "copy.jsonl", "memory://rows/rows.jsonl", bad)
    assert document.segments == ("a", RED) and dict(bad.reasons) == {"missing picture": 3}
    assert contents_of(["memory://rows/rows.jsonl"], KeysConfig()) == {"pictures"}


def test_all_texts_of_rows_are_read_for_a_tokenizer(folder: Path) -> None:
    edit = {"input_image": "blue.png", "instruction": "make it red", "output_image": "images/red.png"}
    read(folder, PICTURE, edit, said("<image>\nwhat?", "red", image="blue.png"), {"text": "one"})
    texts = list(read_texts([str(folder)], BadRecords(max_fraction=0), KeysConfig()))
    assert texts == ["a", "make it red", "what?", "red", "one"]


def test_a_folder_of_rows_and_their_pictures_is_an_input(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "rows.jsonl").write_bytes(lines(PICTURE))
    assert expand([str(folder)], SUFFIXES) == [str(folder / "rows.jsonl")] and not caplog.text


@pytest.mark.parametrize(
    ("rows", "content"),
    [
        ([{"text": "a"}, {}, b"{"], "texts"),
        ([{"text": "a", "image": "blue.png"}], "texts"),
        ([{"text": "a"}, PICTURE], "pictures"),
        ([said("a", "b")], "conversations"),
        ([said("a", "b"), said("<image>", "b", image="blue.png")], "pictures"),
        ([], None),
        ([b"\x1f\x8b"], None),
    ],
)
def test_what_a_file_holds_is_told_by_its_first_rows(folder: Path, rows: list[Any], content: str | None) -> None:
    (folder / "rows.jsonl").write_bytes(lines(*rows))
    (folder / "damaged.parquet").write_bytes(b"PAR1")  # says nothing of what the job needs
    paths = [str(folder / name) for name in ("rows.jsonl", "damaged.parquet")]
    assert contents_of(paths, KeysConfig()) == ({content} if content else set())


def test_a_table_without_pyarrow_is_refused_with_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(ValueError, match="need pyarrow: `pip install pyarrow`"):
        list(read_raw(folder / "a.parquet", str(folder / "a.parquet"), BadRecords(max_fraction=1)))


def test_a_table_holds_the_same_rows_with_pictures_as_paths_or_bytes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"image": {"bytes": RED, "path": "gone.png"}, "caption": "a"},
        {"image": {"bytes": None, "path": "blue.png"}, "caption": "b"},
        {"image": None, "caption": "c"},
    ]
    path, bad = folder / "a.parquet", BadRecords(max_fraction=1)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    documents = list(read_raw(path, str(path), bad))
    assert [d.segments for d in documents] == [("a", RED), ("b", BLUE)] and dict(bad.reasons) == {"no text": 1}
    assert documents[0].info["image"] == {"bytes": "<bytes>", "path": "gone.png"}
    assert contents_of([str(path)], KeysConfig()) == {"pictures"}
    conversation = said("<image>what?", "red", images=[{"bytes": RED, "path": None}])
    parquet.write_table(pyarrow.Table.from_pylist([conversation]), path)
    (document,) = read_raw(path, str(path), bad)
    assert document.messages == (Message("user", (RED, "what?")), Message("assistant", ("red",)))
    with monkeypatch.context() as patch:
        patch.setattr(data.raw, "MAX_TEXT_BYTES", 7)
        assert not list(read_raw(path, str(path), bad)) and bad.reasons["oversized text"] == 1  # of all its turns
    path.write_bytes(path.read_bytes()[:-20])
    cut = BadRecords(max_fraction=1)
    assert not list(read_raw(path, str(path), cut)) and dict(cut.reasons) == {"truncated": 1}


def test_a_cell_that_python_cannot_hold_costs_its_row_at_most(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    no_utf8 = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    late = pyarrow.array([1 + (1 << 62)] * 3).view(pyarrow.timestamp("ns"))
    path, bad = folder / "a.parquet", BadRecords(max_fraction=1)
    parquet.write_table(pyarrow.table({"text": no_utf8, "time": late}), path)
    assert [d.segments for d in read_raw(path, str(path), bad)] == [("a",), ("c",)]
    assert dict(bad.reasons) == {"no text": 1} and bad.names[0].startswith(f"{path}:2: ")
    assert contents_of([str(path)], KeysConfig()) == {"texts"}
