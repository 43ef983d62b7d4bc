"""Raw documents come out as they were written; what is none is named and counted, and nothing ends the file."""

import gzip
import json
import re
from pathlib import Path

import pytest
import zstandard

import data.raw
from data.raw import captions_of, input_name, picture_of, read_raw, read_texts, suffix_of
from data.raw_document import KeysConfig, RawDocument
from data.shards import BadRecord, BadRecords, write_shard

NOT_JSON = [b"\xff\xfe", b"{", b'{"text": "\\ud800"}', b"[" * 100_000, b""]
NO_TEXT = [b"[]", b"7", b'"text"', b"{}", b'{"words": "a"}']
NO_TEXT += [b'{"text": %s}' % value for value in (b"null", b"NaN", b"7", b'["a"]', b'{"en": "a"}', b"true", b'"None"')]


def read(path: Path, content: bytes | None = None, **names: str) -> tuple[list[RawDocument], BadRecords]:
    """Read a file, of these contents if some are given."""
    if content is not None:
        path.write_bytes(content)
    bad = BadRecords(max_fraction=1)
    return list(read_raw(path, str(path), bad, KeysConfig(**names))), bad


def texts_of(documents: list[RawDocument]) -> list[str]:
    return [segment for document in documents for segment in document.segments]


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "more": 1}).encode() + b"\n" for text in texts)


def test_each_line_of_a_jsonl_file_is_a_text_or_a_named_error(tmp_path: Path) -> None:
    path = tmp_path / "a.b.jsonl"
    good = ["one", "two\nlines", " ümlaut 🎉 ", "x" * 100_000]
    bad_lines = b"\n".join([*NOT_JSON, *NO_TEXT, b'{"text": " \\n"}'])
    documents, bad = read(path, lines_of(good[:2]) + bad_lines + b"\n" + lines_of(good[2:])[:-1])  # the last unended
    assert texts_of(documents) == good
    reasons = {"undecodable text": len(NOT_JSON), "no text": len(NO_TEXT), "empty text": 1}
    assert dict(bad.reasons) == reasons and bad.seen == len(good) + sum(reasons.values())
    assert documents[1].where == f"{path}:2" and bad.names[0].startswith(f"{path}:3: undecodable text")
    assert [d.key for d in documents[:2]] == ["a_b-00000000", "a_b-00000001"]  # a key ends at the first dot
    assert documents[1].info == {"source": "a.b.jsonl", "line": 2}
    assert sum(d.input_bytes for d in documents) <= path.stat().st_size


def test_a_txt_file_is_one_text(tmp_path: Path) -> None:
    assert texts_of(read(tmp_path / "a.txt", b"one\ntwo\n")[0]) == ["one\ntwo\n"]
    for content, reason in ((b"\xff", "undecodable text"), (b" \n", "empty text"), (b"", "empty text")):
        documents, bad = read(tmp_path / "a.txt", content)
        assert not documents and dict(bad.reasons) == {reason: 1} and bad.seen == 1


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_compressed_lines_are_read_to_the_cut(tmp_path: Path, suffix: str) -> None:
    """Several members or frames end to end; a cut at any byte loses the rest, is counted once, and never hidden."""
    compress = gzip.compress if suffix.endswith("gz") else zstandard.ZstdCompressor().compress
    texts = [f"line {i} " + "x" * (i % 50) for i in range(300)]
    whole = compress(lines_of(texts[:100])) + compress(lines_of(texts[100:]))
    path = tmp_path / f"a{suffix}"
    documents, bad = read(path, whole)
    assert texts_of(documents) == texts and not bad.reasons and documents[0].key == "a-00000000"
    first = len(compress(lines_of(texts[:100])))
    for cut in {5, 60, first - 1, first + 1, first + 3, len(whole) // 2, len(whole) - 9, len(whole) - 1}:
        documents, bad = read(path, whole[:cut])
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
        ("a.jsonl", gzip.compress(b'{"text": "a"}\n', mtime=0), "gzip"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "JSON"),
        ("a.jsonl.gz", LFS_POINTER, "a Git LFS pointer"),
        ("a.jsonl.zst", b"no compressed file", "no zstd"),
        ("a.txt", LFS_POINTER, "a Git LFS pointer"),
        ("a.tar", LFS_POINTER, "a Git LFS pointer"),
    ],
)
def test_a_file_of_another_kind_is_a_failed_one(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    documents, bad = read(tmp_path / name, content)
    assert not documents and not bad.seen and len(bad.failed) == 1
    assert bad.failed[0].startswith(f"{tmp_path / name}: no ") and f"; it is {what}" in bad.failed[0]


def test_a_text_without_end_is_refused_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.raw, "MAX_TEXT_BYTES", 1000)
    documents, bad = read(tmp_path / "a.jsonl", lines_of(["one", "x" * 5000, "two"]))
    assert texts_of(documents) == ["one", "two"] and dict(bad.reasons) == {"oversized text": 1} and bad.seen == 3
    documents, bad = read(tmp_path / "a.txt", b"x\n" * 3000)
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
    both = {"txt": b" a cat\n", "json": b'{"caption": "other", "TEXT": "third"}'}
    assert captions_of(both, "here") == ["a cat"] and captions_of(both, "here", "TEXT") == ["third"]
    assert captions_of({"json": b'{"caption": "a dog"}'}, "here") == ["a dog"]
    with pytest.raises(BadRecord, match="no '' in its JSON"):
        captions_of({"json": b'{"caption": "a dog"}'}, "here", "")
    several = b'{"caption": ["a dog ", null, "", "NaN", "an animal"]}'
    assert captions_of({"json": several}, "here") == ["a dog", "an animal"]
    for record in [{"txt": b""}, {"txt": b" \n"}, {"json": b'{"caption": ["", " "]}'}]:
        with pytest.raises(BadRecord, match=r"^here: empty caption$"):
            captions_of(record, "here")
    undecodable = [{"txt": b"\xff"}, {"json": b"{"}, {"json": b'{"caption": "\\udfff"}'}, {"json": b"[" * 100_000}]
    for record in undecodable:
        with pytest.raises(BadRecord, match="here: undecodable caption"):
            captions_of(record, "here")
    with pytest.raises(BadRecord, match="no picture"):
        picture_of({"txt": b"a", "gif": b"GIF"}, "here")


@pytest.mark.parametrize("value", ["null", "NaN", "7", "true", "{}", "[]", "[null]", '"nan"', '"None "', '["null"]'])
def test_what_stands_for_no_caption_is_none_and_said_for_people(value: str) -> None:
    with pytest.raises(BadRecord) as caught:
        captions_of({"json": b'{"caption": %s}' % value.encode()}, "here")
    assert re.fullmatch(r"here: no caption \('caption' holds .+, expected words\)", str(caught.value))


def test_a_caption_or_text_under_another_key_is_found_by_the_option_that_the_message_names(tmp_path: Path) -> None:
    record = {"__key__": b"a", "jpg": b"x", "json": b'{"TEXT": "a cat", "url": "u"}'}
    write_shard(tmp_path / "a.tar", [record])
    _, bad = read(tmp_path / "a.tar")
    message = "no caption (no 'caption' in its JSON: caption_keys={KEY: 1} chooses one of ['TEXT', 'url'])"
    assert bad.names == [f"{tmp_path / 'a.tar'}/a: {message}"]
    assert texts_of(read(tmp_path / "a.tar", caption_keys={"TEXT": 1})[0])[0] == "a cat"
    _, bad = read(tmp_path / "b.jsonl", b'{"content": "a line", "id": 1}\n')
    assert "no text (no 'text' in its JSON: text_key=KEY chooses one of ['content', 'id'])" in bad.names[0]
    assert texts_of(read(tmp_path / "b.jsonl", text_key="content")[0]) == ["a line"]
    with pytest.raises(BadRecord, match=r"no caption \(no \.txt and no \.json among \['jpg'\]\)"):
        captions_of({"jpg": b""}, "here")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    """Before a file, before a line, and within JSON where a table took it over."""
    mark = b"\xef\xbb\xbf"
    segments = json.dumps({"segments": ["\ufeffbefore", {"image": "jpg"}]}).encode()
    records = [
        {"__key__": b"a", "jpg": b"x", "txt": mark + b"a cat"},
        {"__key__": b"b", "jpg": b"x", "json": mark + b'{"caption": "\\ufeffa dog"}'},
        {"__key__": b"c", "jpg": b"x", "json": mark + segments},
        {"__key__": b"d", "jpg": b"x", "txt": mark},
    ]
    write_shard(tmp_path / "a.tar", records)
    documents, bad = read(tmp_path / "a.tar")
    assert [d.texts for d in documents] == [("a cat",), ("a dog",), ("before",)]
    assert dict(bad.reasons) == {"empty caption": 1}
    line = mark + b'{"text": "a\\ufeffb"}\n'
    assert texts_of(read(tmp_path / "b.jsonl", line + line)[0]) == ["a\ufeffb"] * 2
    assert texts_of(read(tmp_path / "c.txt", mark + b"whole")[0]) == ["whole"]


def test_interleaved_records_keep_their_order(tmp_path: Path) -> None:
    """By "segments" in the record's json; what it names must be there."""
    listed = ["first", {"image": "0.jpg"}, "", "second", {"image": "Extra.PNG"}, {"image": "0.jpg"}]
    pictures = {"0.jpg": b"JPG", "extra.png": b"PNG"}
    broken = [[], "text", {"image": "0.jpg"}, [7], [{"image": 7}], [{"picture": "0.jpg"}], ["\ud800"], [["a"]]]
    members = [json.dumps({"segments": some, "url": "u"}) for some in [listed, *broken, [{"image": "1.jpg"}]]]
    records = ({**pictures, "__key__": b"%d" % i, "json": text.encode()} for i, text in enumerate(members))
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
        {"__key__": b"d", "jpg": b"x", "json": b'{"caption": ["one", "other"]}'},
    ]
    write_shard(tmp_path / "a.tar", records)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "line"}\n{"text": 7}\n')
    (tmp_path / "c.txt").write_bytes(b"whole")
    bad = BadRecords(max_fraction=1)
    texts = ["caption", "before", "after", "one", "other", "line", "whole"]
    assert list(read_texts([str(tmp_path)], bad, KeysConfig())) == texts
    assert dict(bad.reasons) == {"undecodable caption": 1, "no text": 1} and bad.seen == 7
