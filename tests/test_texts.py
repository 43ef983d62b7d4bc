"""Raw text comes out as it was written; what is none is named and counted, and nothing ends the file."""

import json
from pathlib import Path

import pytest

from data.shards import BadRecord, write_shard
from data.texts import caption_of, list_inputs, read_text_file, read_texts

NOT_TEXT = [
    b"\xff\xfe",
    b"{",
    b"[]",
    b"7",
    b'"text"',
    b"{}",
    b'{"text": null}',
    b'{"text": ["a"]}',
    b'{"text": "\\ud800"}',
    b"[" * 100_000,
    b"",
]


def outcome(items: list) -> list[str]:
    return [item.reason if isinstance(item, BadRecord) else item[0] for item in items]


def test_each_line_of_a_jsonl_file_is_a_text_or_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = ["one", "two\nlines", " ümlaut 🎉 ", "x" * 100_000]
    lines = [json.dumps({"text": text, "more": 1}).encode() for text in good]
    path.write_bytes(b"\n".join([*lines[:2], *NOT_TEXT, b'{"text": " \\n"}', *lines[2:]]))  # no line end at the end
    items = list(read_text_file(path))
    assert outcome(items) == [*good[:2], *["undecodable text"] * len(NOT_TEXT), "empty text", *good[2:]]
    assert items[1][1] == f"{path}:2" and items[2].where == f"{path}:3"


def test_a_txt_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for content, expected in ((b"one\ntwo\n", "one\ntwo\n"), (b"\xff", "undecodable text"), (b" \n", "empty text")):
        path.write_bytes(content)
        assert outcome(list(read_text_file(path))) == [expected]


def test_a_caption_is_the_txt_member_or_the_jsons_caption() -> None:
    assert caption_of({"txt": b" a cat\n", "json": b'{"caption": "other"}'}, "here") == "a cat"
    assert caption_of({"json": b'{"caption": "a dog"}'}, "here") == "a dog"
    empty = [{"txt": b""}, {"txt": b" \n"}, {}, {"json": b"{}"}, {"json": b'{"caption": null}'}]
    for record in empty:
        with pytest.raises(BadRecord, match="here: empty caption"):
            caption_of(record, "here")
    undecodable = [{"txt": b"\xff"}, {"json": b"{"}, {"json": b"[]"}, {"json": b'{"caption": 7}'}]
    undecodable += [{"json": b'{"caption": "\\udfff"}'}, {"json": b"[" * 100_000}]
    for record in undecodable:
        with pytest.raises(BadRecord, match="here: undecodable caption"):
            caption_of(record, "here")


def test_inputs_are_files_and_folders_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.jsonl", "stats.json", "d.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tar").mkdir()
    names = [path.name for path in list_inputs([str(tmp_path / "d.txt"), str(tmp_path)])]
    assert names == ["d.txt", "a.tar", "b.tar", "c.jsonl", "d.txt"]
    assert [path.name for path in list_inputs([str(tmp_path)], (".txt",))] == ["d.txt"]


def test_inputs_that_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    with pytest.raises(FileNotFoundError, match=r"input .*none does not exist"):
        list_inputs([str(tmp_path / "none")])
    with pytest.raises(ValueError, match=r"a.parquet: expected one of .tar, .jsonl, .txt, or a folder of them"):
        list_inputs([str(tmp_path / "a.parquet")])
    with pytest.raises(ValueError, match=r"no .tar, .jsonl, .txt files in \['.*'\]"):
        list_inputs([str(tmp_path)])
    with pytest.raises(ValueError, match=r"inputs=\[\] \(none given\)"):
        list_inputs([])


def test_all_texts_are_read_and_what_is_bad_is_left_out(tmp_path: Path) -> None:
    records = [{"__key__": b"1", "txt": b"caption"}, {"__key__": b"2", "txt": b""}, {"__key__": b"3", "png": b""}]
    write_shard(tmp_path / "a.tar", records)
    with (tmp_path / "a.tar").open("ab") as file:
        file.truncate(5 * 512)  # into the last record
    (tmp_path / "b.jsonl").write_text('{"text": "line"}\n{')
    (tmp_path / "c.txt").write_text("whole")
    assert [text for text, _ in read_texts([str(tmp_path)])] == ["caption", "line", "whole"]
