"""The pictures that a row names: files beside its .jsonl or anywhere on this machine, or beside it behind its URL.

A row may name any file that the job may read; it is used only if it decodes as a picture. URLs in rows are refused: a
data set must not make a job fetch from wherever its author likes.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data.remote import RETRIES, download, is_http, is_remote, local_name, shown
from data.shards import BadRecord
from data.words import is_text

MAX_PICTURES = 1000  # of a document
MAX_PICTURE_BYTES = 1 << 28  # of a file; 64 megapixels without compression are less
_NO_PATH = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class PictureFiles:
    """Reads pictures for the rows of one file, `source`."""

    def __init__(self, source: str):
        self.is_remote = is_remote(source)
        path, mark, query = source.partition("?") if is_http(source) else (source, "", "")
        self.folder = path.rpartition("/")[0] if self.is_remote else str(Path(local_name(source)).parent)
        self._query = mark + query

    def read(self, named: Any, where: str) -> list[bytes]:
        """Return the pictures that a value names: none, a path, a table's {"bytes", "path"}, or a list of these."""
        listed = named if isinstance(named, list) else [named]
        listed = [one for one in listed if one not in (None, "")]
        if len(listed) > MAX_PICTURES:
            raise BadRecord("too many pictures", where, f"{len(listed)}, expected at most {MAX_PICTURES}")
        read: dict[str, bytes] = {}  # each file once
        pictures = []
        for one in listed:
            content = one.get("bytes") if isinstance(one, dict) else None
            path = one.get("path") if isinstance(one, dict) else one
            if isinstance(content, bytes):
                pictures.append(content)
            elif isinstance(path, str) and path:
                if path not in read:
                    read[path] = self._file(path, where)
                pictures.append(read[path])
            else:
                raise BadRecord("no picture", where, f"{repr(one)[:80]}: expected the path of a picture")
        return pictures

    def _file(self, path: str, where: str) -> bytes:
        if "://" in path:
            raise BadRecord("picture behind a URL", where, f"{shown(path)[:200]}: fetch it first, and name its file")
        if "\0" in path or not is_text(path):
            raise BadRecord("missing picture", where, f"{path[:200]!r} is no path")
        try:
            return self._fetched(path, where) if self.is_remote else self._opened(path, where)
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError) or error.errno in _NO_PATH
            if not is_missing and not isinstance(error, PermissionError):
                raise  # of a disk or a network, not of the row
            reason = "missing picture" if is_missing else "unreadable picture"
            raise BadRecord(reason, where, f"{path[:200]!r}: {shown(error.strerror or str(error))}") from None

    def _opened(self, path: str, where: str) -> bytes:
        place = os.path.join(self.folder, path)
        found = os.stat(place)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            raise BadRecord("unreadable picture", where, f"{path[:200]!r} is not a file")
        if not found.st_size:  # nor read the files in /proc, which may wait too, or fail
            raise BadRecord("empty picture", where, f"{path[:200]!r}")
        if found.st_size > MAX_PICTURE_BYTES:
            raise BadRecord("oversized picture", where, f"{found.st_size} bytes, at most {MAX_PICTURE_BYTES} are read")
        return Path(place).read_bytes()

    def _fetched(self, path: str, where: str) -> bytes:
        if path.startswith("/") or ".." in path.split("/") or "::" in self.folder:
            raise BadRecord("missing picture", where, f"{path[:200]!r}: expected a path within the folder of the rows")
        data = bytearray()

        def write(chunk: bytes, position: int) -> None:
            if position + len(chunk) > MAX_PICTURE_BYTES:
                raise BadRecord("oversized picture", where, f"more than {MAX_PICTURE_BYTES} bytes")
            data[position:] = chunk

        is_web = is_http(self.folder)
        download(f"{self.folder}/{quote(path) if is_web else path}{self._query}", write, RETRIES)
        return bytes(data)
