"""Raw documents come out as they were written; what is none is named and counted, and nothing ends the file."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

import data.raw
from data.raw import RawDocument, caption_of, input_name, picture_of, read_raw, read_texts, suffix_of
from data.shards import BadRecord, BadRecords, write_shard

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


def read(path: Path) -> tuple[list[RawDocument], BadRecords]:
    bad = BadRecords(max_fraction=1)
    return list(read_raw(path, str(path), bad)), bad


def texts_of(documents: list[RawDocument]) -> list[str]:
    return [segment for document in documents for segment in document.segments]


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "more": 1}).encode() + b"\n" for text in texts)


def test_each_line_of_a_jsonl_file_is_a_text_or_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "a.b.jsonl"
    good = ["one", "two\nlines", " ümlaut 🎉 ", "x" * 100_000]
    bad_lines = b"\n".join([*NOT_TEXT, b'{"text": " \\n"}'])
    path.write_bytes(lines_of(good[:2]) + bad_lines + b"\n" + lines_of(good[2:])[:-1])  # no line end at the end
    documents, bad = read(path)
    assert texts_of(documents) == good
    assert dict(bad.reasons) == {"undecodable text": len(NOT_TEXT), "empty text": 1} and bad.seen == len(NOT_TEXT) + 5
    assert documents[1].where == f"{path}:2" and bad.names[0].startswith(f"{path}:3: undecodable text")
    assert [d.key for d in documents[:2]] == ["a_b-00000000", "a_b-00000001"]  # a key ends at the first dot
    assert documents[1].info == {"source": "a.b.jsonl", "line": 2}
    assert sum(d.input_bytes for d in documents) <= path.stat().st_size


def test_a_txt_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n")
    assert texts_of(read(path)[0]) == ["one\ntwo\n"]
    for content, reason in ((b"\xff", "undecodable text"), (b" \n", "empty text"), (b"", "empty text")):
        path.write_bytes(content)
        documents, bad = read(path)
        assert not documents and dict(bad.reasons) == {reason: 1} and bad.seen == 1


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_compressed_lines_are_read_to_the_cut(tmp_path: Path, suffix: str) -> None:
    """Several members or frames end to end; a cut at any byte loses the rest, is counted once, and never hidden."""
    compress = gzip.compress if suffix.endswith("gz") else zstandard.ZstdCompressor().compress
    texts = [f"line {i} " + "x" * (i % 50) for i in range(300)]
    whole = compress(lines_of(texts[:100])) + compress(lines_of(texts[100:]))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(whole)
    documents, bad = read(path)
    assert texts_of(documents) == texts and not bad.reasons and documents[0].key == "a-00000000"
    first = len(compress(lines_of(texts[:100])))
    for cut in {5, 60, first - 1, first + 1, first + 3, len(whole) // 2, len(whole) - 9, len(whole) - 1}:
        path.write_bytes(whole[:cut])
        documents, bad = read(path)
        assert texts_of(documents) == texts[: len(documents)], cut
        assert bad.reasons["truncated"] == 1 and bad.reasons.total() <= 2, (cut, bad.reasons)
        assert bad.lost_share() == 1 and (len(documents) >= 100 or cut < first)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b"", "an empty file"),
        ("a.jsonl", LFS_POINTER, "a Git LFS pointer"),
        ("a.jsonl", b"<html>404</html>\n", "an HTML page"),
        ("a.jsonl", gzip.compress(b'{"text": "a"}\n'), "gzip"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "JSON"),
        ("a.jsonl.gz", LFS_POINTER, "a Git LFS pointer"),
        ("a.jsonl.zst", b"no compressed file", "no zstd"),
        ("a.txt", LFS_POINTER, "a Git LFS pointer"),
        ("a.tar", LFS_POINTER, "a Git LFS pointer"),
    ],
)
def test_a_file_of_another_kind_is_a_failed_one(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    documents, bad = read(tmp_path / name)
    assert not documents and not bad.seen and len(bad.failed) == 1
    assert bad.failed[0].startswith(f"{tmp_path / name}: no ") and f"; it is {what}" in bad.failed[0]


def test_a_text_without_end_is_refused_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.raw, "MAX_TEXT_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(lines_of(["one", "x" * 5000, "two"]))
    documents, bad = read(tmp_path / "a.jsonl")
    assert texts_of(documents) == ["one", "two"] and dict(bad.reasons) == {"oversized text": 1} and bad.seen == 3
    (tmp_path / "a.txt").write_bytes(b"x\n" * 3000)
    documents, bad = read(tmp_path / "a.txt")
    assert not documents and dict(bad.reasons) == {"oversized text": 1} and bad.seen == 1


def test_names_and_suffixes() -> None:
    cases = {
        "/a/b.c.jsonl.gz": ("b.c", ".jsonl.gz"),
        "https://host/x/00001.tar?sig=a/b.txt": ("00001", ".tar"),
        "s3://bucket/a.txt": ("a", ".txt"),
        "/a/B.TAR": ("B", ".tar"),
    }
    assert {path: (input_name(path), suffix_of(path)) for path in cases} == cases


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
    with pytest.raises(BadRecord, match="no picture"):
        picture_of({"txt": b"a", "gif": b"GIF"}, "here")


def test_interleaved_records_keep_their_order(tmp_path: Path) -> None:
    """By "segments" in the record's json; what it names must be there."""
    listed = ["first", {"image": "0.jpg"}, "", "second", {"image": "Extra.PNG"}, {"image": "0.jpg"}]
    good = {"__key__": b"a", "0.jpg": b"JPG", "extra.png": b"PNG"}
    broken = [[], "text", {"image": "0.jpg"}, [7], [{"image": 7}], [{"picture": "0.jpg"}], ["\ud800"], [["a"]]]
    records = [{**good, "json": json.dumps({"segments": listed, "url": "u"}).encode()}]
    records += [
        {**good, "__key__": f"b{i}".encode(), "json": json.dumps({"segments": segments}).encode()}
        for i, segments in enumerate(broken)
    ]
    records += [{**good, "__key__": b"c", "json": b'{"segments": [{"image": "1.jpg"}]}'}]
    write_shard(tmp_path / "a.tar", records)
    documents, bad = read(tmp_path / "a.tar")
    assert [d.segments for d in documents] == [("first", b"JPG", "second", b"PNG", b"JPG")]
    assert documents[0].info == {"segments": listed, "url": "u"}
    assert dict(bad.reasons) == {"undecodable segments": len(broken), "no picture": 1}


def test_all_texts_are_read_and_what_is_bad_is_counted(tmp_path: Path) -> None:
    """For the tokenizer: captions, the texts of interleaved documents, lines, files."""
    segments = json.dumps({"segments": ["before", {"image": "jpg"}, "after"]}).encode()
    records = [
        {"__key__": b"a", "jpg": b"x", "txt": b"caption"},
        {"__key__": b"b", "jpg": b"x", "txt": b"\xff"},
        {"__key__": b"c", "jpg": b"x", "json": segments},
    ]
    write_shard(tmp_path / "a.tar", records)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "line"}\n{"text": 7}\n')
    (tmp_path / "c.txt").write_bytes(b"whole")
    bad = BadRecords(1)
    assert [text for text, _ in read_texts([str(tmp_path)], bad)] == ["caption", "before", "after", "line", "whole"]
    assert dict(bad.reasons) == {"undecodable caption": 1, "undecodable text": 1} and bad.seen == 6
