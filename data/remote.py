"""Bytes behind URLs: http(s) and any object store through fsspec, read with retries and back-off.

http uses fsspec's session but our own requests: fsspec reports every failure as "not found", takes the whole body of a
server that ignores Range for the requested span, and gives up on any file that takes five minutes. Client libraries
are imported only when a URL is used, nothing created before a fork is used after it, and no name is executed: `pipe:`
and unknown schemes are refused.
"""

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from aiohttp import ClientResponse
    from fsspec import AbstractFileSystem

PIECE_BYTES = 32 << 20  # requested from an object store at once for a whole file
_URL_RULE = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_CLIENTS = {"aiohttp", "aiobotocore", "azure", "botocore", "gcsfs", "google", "http", "httpx", "requests", "urllib3"}
# Keys of what identifies a file's version, best first; without case, dashes and underscores.
_CHANGE_KEYS = ("etag", "generation", "contentmd5", "md5hash", "blobid", "lastmodified", "updated", "mtime", "created")
_kept: dict[int, Any] = {}  # second references to file systems, see `filesystem`
_Result = TypeVar("_Result")

log = logging.getLogger(__name__)
warn_once = lru_cache(1024)(log.warning)


@dataclass(frozen=True)
class Retries:
    attempts: int = 6  # consecutive ones without progress, >= 1
    first_delay_s: float = 0.5  # doubles each time: 15 s in all
    stall_s: float = 60.0  # seconds of silence after which an http read fails; object stores have their own


RETRIES = Retries()


@dataclass(frozen=True)
class FileVersion:
    bytes: int
    changed: str  # differs when the contents differ; "" if the server does not say


class DiskError(OSError):
    """An error of the disk that a copy is written to, not of the file's source."""


def is_remote(path: str) -> bool:
    """Return whether a name is a URL, or a chain of them, other than of a local file."""
    match = _URL_RULE.match(path)
    return match is not None and (match[1].lower() not in ("file", "local") or "::" in match[0])


def shown(text: str) -> str:
    """Return a name or message without the passwords, tokens and signatures in its URLs."""
    text = re.sub(r"(https?://)[^/\s@]*@|(://)[^/\s@:]*:[^/\s@]*@", r"\1\2", text)
    return re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1?…", text)


def local_name(path: str) -> str:
    """Return the path of a local name; raise ValueError for a command."""
    if path.startswith("pipe:"):
        raise ValueError(f"{path}: commands are not run; fetch the data first, or name its file or URL")
    match = _URL_RULE.match(path)
    return path[match.end() :] if match else path


def is_http(path: str) -> bool:
    return path[:8].lower().startswith(("http://", "https://"))


def without_query(path: str) -> str:
    return path.partition("?")[0] if is_http(path) else path


def file_version(path: str, retries: Retries = RETRIES) -> FileVersion:
    """Return a file's size and what identifies its contents; raise OSError if it is not available."""
    if is_remote(path):
        return retried(lambda: _version(path, retries.stall_s), shown(path), retries)
    stat = os.stat(local_name(path))
    return FileVersion(stat.st_size, str(stat.st_mtime_ns))


def retried(
    action: Callable[[], _Result], what: str, retries: Retries = RETRIES, progress: Callable[[], int] = lambda: 0
) -> _Result:
    """Return what `action` returns, retrying after transient errors; `progress` that grew resets the count.

    Raises an OSError that names `what` after the last attempt, and at once for errors that are not transient.
    """
    attempt, reached = 0, progress()
    while True:
        try:
            return action()
        except Exception as error:  # each object store's client has its own errors; none is swallowed
            if not _is_transient(error):
                if (final := _final_error(error, what)) is error:
                    raise
                raise final from None  # the client's own error shows the URL with its secrets
            if progress() > reached:
                attempt, reached = 0, progress()
            attempt += 1
            if attempt >= retries.attempts:
                raise OSError(f"{what}: {_message(error)}; gave up after {attempt} attempts") from None
            # Jitter: thousands of readers that failed together must not retry together.
            delay = retries.first_delay_s * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.75, 1.25)
            log.warning("%s: %s; attempt %d in %.1f s", what, _message(error), attempt + 1, delay)
            time.sleep(delay)


def _is_transient(error: Exception) -> bool:
    if (status := _status(error)) is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, DiskError)):
        return False
    is_of_client = any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__)
    return isinstance(error, OSError) or (is_of_client and not isinstance(error, ValueError))  # aiohttp's InvalidURL


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error or its cause, under any of the clients' names for it."""
    if error is None:
        return None
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")  # botocore
    elif type(error).__module__.startswith(("gcsfs", "google")):
        status = getattr(error, "code", None)  # not aiohttp's: it has code 400 for a truncated body
    else:
        named = ((error, "status"), (error, "status_code"), (response, "status_code"))
        status = next((getattr(owner, name) for owner, name in named if hasattr(owner, name)), None)
    return status if isinstance(status, int) and 400 <= status < 600 else _status(error.__cause__)


def _message(error: Exception) -> str:
    if (status := _status(error)) is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".rstrip()
    text = str(error) or str(error.__cause__ or "")
    return shown(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _final_error(error: Exception, what: str) -> Exception:
    """Return the OSError to raise for an error that is not transient; our own are returned unchanged."""
    status = _status(error)
    if status in (404, 410) or (isinstance(error, FileNotFoundError) and what not in str(error)):
        return FileNotFoundError(f"{what} does not exist")
    if status in (401, 403):
        return PermissionError(f"{what}: {_message(error)}; check the credentials")
    return error if status is None else OSError(f"{what}: {_message(error)}")


def filesystem(path: str) -> "tuple[AbstractFileSystem, str]":
    """Return fsspec's file system for a URL, and the file's name there; raise ValueError for an unknown one."""
    import fsspec

    _reset_in_children()
    if is_http(path) and (files := _kept.get(os.getpid())) is not None:
        return files, path
    try:
        if is_http(path):
            client = {"trust_env": True, **fsspec.config.conf.get("http", {}).get("client_kwargs", {})}  # proxies
            key, files, name = os.getpid(), fsspec.filesystem("http", client_kwargs=client), path
        else:
            files, name = fsspec.core.url_to_fs(path)
            key = id(files)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{shown(path)}: {error}; expected a local path, http(s):// or what fsspec reads, such as s3:// with s3fs"
        ) from None
    # A forked child empties fsspec's register. Without this second reference it would close the parent's session there,
    # remove its sockets from the epoll set that both share, and make the parent wait until it detects a stall.
    _kept[key] = files
    return files, name


@lru_cache(1)
def _reset_in_children() -> None:
    """Reset fsspec in forked processes, where the parent's event loop has no thread."""
    import fsspec.asyn

    os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)


def _version(path: str, stall_s: float) -> FileVersion:
    info = file_info(path, stall_s)
    if info["type"] == "directory":
        raise IsADirectoryError(f"{shown(path)}: expected a file, found a folder")
    if info.get("size") is None:
        raise ValueError(f"{shown(path)}: the server does not tell its size; copy it to a local folder first")
    known = {key.lower().replace("-", "").replace("_", ""): value for key, value in info.items()}
    return FileVersion(int(info["size"]), next((str(known[key]) for key in _CHANGE_KEYS if known.get(key)), ""))


def file_info(path: str, stall_s: float) -> dict[str, Any]:
    """Return what the file system knows of a file at present, such as its size and type."""
    if is_http(path):
        http = _Http(path, stall_s)
        return http.wait_for(http.info)
    files, name = filesystem(path)
    files.invalidate_cache()
    return files.info(name)


def download(path: str, write: Callable[[bytes, int], None], retries: Retries) -> FileVersion:
    """Pass a whole remote file to `write`, chunk by chunk with positions, and return its version.

    After an error it resumes where it stopped, or from position 0 if the file has changed.
    """
    done, version = 0, None

    def keep(chunk: bytes) -> None:
        nonlocal done
        write(chunk, done)
        done += len(chunk)

    def resume() -> FileVersion:
        nonlocal done, version
        if (now := _version(path, retries.stall_s)) != version:
            done, version = 0, now
        _fetch(path, done, now.bytes - done, keep, retries.stall_s)
        if done != now.bytes:
            raise OSError(f"received {done} of {now.bytes} bytes")
        return now

    return retried(resume, shown(path), retries, progress=lambda: done)


def read_range(path: str, offset: int, length: int, retries: Retries) -> bytes:
    if offset < 0 or length < 0:
        raise OSError(errno.EINVAL, f"{length} bytes at {offset}", shown(path))

    def fetch() -> bytes:
        parts: list[bytes] = []
        _fetch(path, offset, length, parts.append, retries.stall_s)
        return b"".join(parts)

    return retried(fetch, shown(path), retries)


def _fetch(path: str, start: int, length: int, write: Callable[[bytes], None], stall_s: float) -> None:
    """Pass the bytes [start, start + length) to `write` in order, fewer only at the file's end; no retries."""
    if length and is_http(path):
        http = _Http(path, stall_s)
        http.wait_for(http.get, start, length, write)
        return
    files, name = filesystem(path)
    for begin in range(start, start + length, PIECE_BYTES):
        end = min(begin + PIECE_BYTES, start + length)
        try:
            data = files.cat_file(name, start=begin, end=end)  # by keyword: s3fs orders them differently
        except Exception as error:  # any client's; all but one are for `retried`
            if _status(error) == 416:  # past the end
                return
            raise
        if len(data) > end - begin:
            raise OSError(f"received {len(data)} bytes, requested {end - begin}")
        write(data)
        if len(data) < end - begin:
            return


class _Http:
    """Requests for one URL, sent through fsspec's session."""

    def __init__(self, path: str, stall_s: float):
        import aiohttp
        from fsspec.asyn import sync

        self.files, self.url = filesystem(path)
        self.timeout = aiohttp.ClientTimeout(sock_connect=stall_s, sock_read=stall_s)
        self.wait_for: Callable[..., Any] = partial(sync, self.files.loop)

    async def info(self) -> dict[str, Any]:
        def described_by(response: "ClientResponse") -> dict[str, Any]:
            if response.status != 416:  # 416: the file is empty
                response.raise_for_status()
            return {**response.headers, "type": "file", "size": _content_range(response)[1]}

        async with await self._send("HEAD") as response:
            if response.status not in (403, 405, 501) and response.content_length is not None:
                return described_by(response)
        async with await self._send("GET", Range="bytes=0-0") as response:  # signed for GET only, or no HEAD there
            return described_by(response)

    async def get(self, start: int, length: int, write: Callable[[bytes], None]) -> None:
        async with await self._send("GET", Range=f"bytes={start}-{start + length - 1}") as response:
            if response.status == 416:  # past the end
                return
            response.raise_for_status()
            begin, total = _content_range(response)
            if response.status != 206 and start:
                warn_once(f"{response.url.host} ignores Range: each read fetches the file from its start; use a cache")
            skip, left = start - begin, length
            if skip < 0:
                raise OSError(f"received bytes from {begin} on, requested {start}")
            async for chunk in response.content.iter_chunked(1 << 20):
                wanted = chunk[skip : skip + left]
                skip = max(skip - len(chunk), 0)
                left -= len(wanted)
                if wanted:
                    write(wanted)
                if not left:
                    break
            if total is not None and (missing := left - max(start + length - max(total, start), 0)) > 0:
                raise OSError(f"the answer is {missing} bytes short")

    async def _send(self, method: str, **headers: str) -> "ClientResponse":
        """Request bytes as stored, without compression in transit."""
        options = {"timeout": self.timeout, "allow_redirects": True, "auto_decompress": False, **self.files.kwargs}
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity", **headers}
        session = await self.files.set_session()
        return await session.request(method, self.files.encode_url(self.url), headers=headers, **options)


def _content_range(response: "ClientResponse") -> tuple[int, int | None]:
    """Return the position in the file of an answer's first byte, and the file's size if known."""
    if response.status not in (206, 416):
        return 0, response.content_length
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if match is None:
        raise OSError("the answer does not say which part of the file it is")
    return int(match[1] or 0), None if match[2] == "*" else int(match[2])
