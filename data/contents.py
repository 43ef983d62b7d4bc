"""What input files hold, by their first rows: whether an encoding job needs an autoencoder."""

import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data.lines import other_kind
from data.parquet import PARQUET
from data.raw import TAR, TEXT, pieces_of, row_of, suffix_of
from data.raw_document import KeysConfig
from data.remote import RETRIES, is_remote, local_name, read_range
from data.rows import kind_of, names_pictures
from data.shards import BadRecord
from data.storage import local_copy

FILES, ROWS = 16, 64  # that are looked at: so many rows of so many files
HEAD_BYTES = 1 << 20  # of a remote one
Content = Literal["pictures", "conversations", "texts"]
_BY_RANK: tuple[Content, ...] = ("pictures", "conversations", "texts")  # a file is of the first that one of its rows is


def contents_of(sources: Sequence[str], names: KeysConfig) -> set[Content]:
    """Return which kinds of contents the first input files hold; conversations are those without a picture so far.

    A file without a readable row, which the job will count as failed, holds none.
    """
    found: set[Content] = {"pictures" for source in sources if suffix_of(source) == TAR}
    others = [source for source in sources if suffix_of(source) != TAR]
    for source in others[: 1 if others and is_remote(others[0]) else FILES]:
        contents = {"texts"} if suffix_of(source) == TEXT else {_content(row, names) for row in _first_rows(source)}
        found.update([content for content in _BY_RANK if content in contents][:1])
    return found


def _content(row: dict[str, Any], names: KeysConfig) -> Content:
    if names_pictures(row, names):
        return "pictures"
    return "conversations" if kind_of(row, names) == "conversation" else "texts"


def _first_rows(source: str) -> Iterator[dict[str, Any]]:
    suffix = suffix_of(source)
    with _head(source, suffix) as file, suppress(OSError, EOFError, zlib.error):
        if other_kind(file, suffix) is None:
            for piece, _ in islice(pieces_of(file, suffix), ROWS):
                with suppress(BadRecord):
                    yield row_of(piece, source)


@contextmanager
def _head(source: str, suffix: str) -> Iterator[Path]:
    """Yield a file that begins like `source`: itself, if it is here."""
    if not is_remote(source):
        yield Path(local_name(source))
    elif suffix == PARQUET:  # its index is at its end
        with local_copy(source) as file:
            yield file
    else:
        with tempfile.NamedTemporaryFile() as head:
            head.write(read_range(source, 0, HEAD_BYTES, RETRIES))
            head.flush()
            yield Path(head.name)
