"""Raw text: which input files there are, and the texts in them."""

import json
from collections.abc import Iterator
from pathlib import Path

from data.shards import BadRecord, BadRecords, Record, read_shard

SUFFIXES = (".tar", ".jsonl", ".txt")
# What decoding and looking up raise for bytes that hold no text.
_NO_TEXT = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def list_inputs(inputs: list[str], suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Return the files that `inputs` (files or folders) name, sorted in each folder.

    Raises FileNotFoundError for a missing path, ValueError for a file of another kind and when nothing is found.
    """
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files += sorted(child for child in path.iterdir() if child.suffix in suffixes and child.is_file())
        elif not path.is_file():
            raise FileNotFoundError(f"input {name} does not exist")
        elif path.suffix not in suffixes:
            raise ValueError(f"input {name}: expected one of {', '.join(suffixes)}, or a folder of them")
        else:
            files.append(path)
    if not files:
        raise ValueError(f"no {', '.join(suffixes)} files in {inputs or 'inputs=[] (none given)'}")
    return files


def read_texts(inputs: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (text, where) of every caption, JSON line and text file; what cannot be read is left out."""
    for path in list_inputs(inputs):
        for text in _texts_of(path):
            if not isinstance(text, BadRecord):
                yield text


def read_text_file(path: Path) -> Iterator[tuple[str, str] | BadRecord]:
    """Yield (text, where) of a .jsonl file's lines ({"text": ...}) or of a whole .txt file, or what is wrong."""
    with path.open("rb") as file:
        lines = [file.read()] if path.suffix == ".txt" else file
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                text = line.decode() if path.suffix == ".txt" else json.loads(line)["text"]
                text.encode()  # JSON can spell half a surrogate pair, which is no text
            except _NO_TEXT as error:
                yield BadRecord("undecodable text", where, str(error))
                continue
            yield (text, where) if text.strip() else BadRecord("empty text", where)


def caption_of(record: Record, where: str) -> str:
    """Return the caption in a record's `.txt`, or in its `.json` under "caption"; raise BadRecord for none."""
    try:
        if "txt" in record:
            text = record["txt"].decode()
        else:
            text = json.loads(record.get("json", b"{}")).get("caption") or ""
        text.encode()
    except _NO_TEXT as error:
        raise BadRecord("undecodable caption", where, str(error)) from None
    if not text.strip():
        raise BadRecord("empty caption", where)
    return text.strip()


def _texts_of(path: Path) -> Iterator[tuple[str, str] | BadRecord]:
    if path.suffix != ".tar":
        yield from read_text_file(path)
        return
    for record in read_shard(path, BadRecords(max_fraction=1.0)):
        where = f"{path}/{record['__key__'].decode(errors='replace')}"
        try:
            yield caption_of(record, where), where
        except BadRecord as error:
            yield error
