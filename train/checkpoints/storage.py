"""The files of one checkpoint: written through a hash, listed with their checksums, verified, then read.

DCP plans, splits and reshards; the integrity of the bytes is ours, for DCP has no checksums and takes a folder with its
index for complete, and so is the index (train/checkpoints/index.py). Rejected: hashing after the write (a second read,
and of what the disk returned rather than of what was meant), sha256 (no adversary here), and crc32 (a third of the
write). P11: only tensors go through DCP, since it pickles everything else.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config
from xxhash import xxh3_64, xxh3_64_hexdigest

from data.durable import sync_folder
from train.checkpoints.index import INDEX, PICKLED_INDEX, parse_index, write_index

LISTING = "checksums.json"
FILE_NAME = re.compile(r"[\w.-]+", re.ASCII)
READ_BYTES = 1 << 22
HASH_BYTES = 1 << 20  # hashed and written while still in the cache
BUFFER_BYTES = 1 << 16  # gathers torch.save's forty small writes a tensor; larger ones pass it by
WRITEBACK_BYTES = 1 << 23  # handed to the disk while the next are hashed, not all of them at the end by fsync


@dataclass(frozen=True)
class WrittenFile:
    """What went into one file of a checkpoint, counted on the way to the disk."""

    name: str
    num_bytes: int
    xxh3: str  # 16 hexadecimal digits


def read_listing(folder: Path) -> dict[str, WrittenFile]:
    """Return what `folder` should hold, by name; raises OSError or ValueError if its listing is missing or damaged."""
    try:
        files = json.loads((folder / LISTING).read_bytes())["files"]
        listing = {name: WrittenFile(name, int(file["bytes"]), file["xxh3"]) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{LISTING} is damaged: {type(error).__name__}: {error}") from None
    if not {INDEX, PICKLED_INDEX} & listing.keys():
        raise ValueError(f"{LISTING} is damaged: it does not name {INDEX}")
    if strange := [name for name in listing if not FILE_NAME.fullmatch(name)]:
        raise ValueError(f"{LISTING} is damaged: it names {strange[0]!r}, expected files of the folder alone")
    return listing


def problem_of(folder: Path, expected: WrittenFile, on_read: Callable[[int], object] | None = None) -> str | None:
    """Read one file whole and return what is wrong with it, or None; `on_read` is told of every so many bytes."""
    num_bytes, checksum = 0, xxh3_64()
    buffer = memoryview(bytearray(READ_BYTES))
    try:
        with (folder / expected.name).open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                num_bytes += count
                checksum.update(buffer[:count])
                if on_read is not None:
                    on_read(count)
    except OSError as error:
        return f"{expected.name}: {error.strerror}"
    if num_bytes != expected.num_bytes:
        return f"{expected.name}: {num_bytes} bytes, {expected.num_bytes} were written"
    if checksum.hexdigest() != expected.xxh3:
        return f"{expected.name}: xxh3 {checksum.hexdigest()}, {expected.xxh3} was written"
    return None


def read_checked(folder: Path, name: str) -> bytes:
    """Return the content of a small file; raises ValueError if it is not what was written, OSError if it is gone."""
    content = (folder / name).read_bytes()
    found, expected = WrittenFile(name, len(content), xxh3_64_hexdigest(content)), read_listing(folder).get(name)
    if found != expected:
        raise ValueError(f"checkpoint {folder} is damaged: {name}: expected {expected}, found {found}")
    return content


def read_index(folder: Path) -> Metadata:
    """Return DCP's records of `folder`: names, sizes, dtypes and places of the tensors.

    Raises ValueError if its index is damaged or not as a trainer writes it, OSError if it is gone.
    """
    listing = read_listing(folder)
    name = INDEX if INDEX in listing else PICKLED_INDEX
    content = read_checked(folder, name)
    try:
        return parse_index(content, name, {file.name: file.num_bytes for file in listing.values()})
    except ValueError as error:
        raise ValueError(
            f"checkpoint {folder}: {name} was not written by this trainer: {error}; restore the file, or take another "
            "checkpoint"
        ) from None


class HashingWriter(dcp.FileSystemWriter):
    """DCP's writer into `folder`, hashing. Each rank's checksums travel to rank 0 among its write results.

    On rank 0 `finish` adds the index, the `extra` files and the listing, makes all of it durable and calls `commit`;
    what any rank raises on the way, DCP raises on every rank.
    """

    def __init__(self, folder: Path, extra: Mapping[str, bytes], commit: Callable[[], None]) -> None:
        super().__init__(folder, thread_count=1, sync_files=True)  # DCP loses the errors of further threads
        self.fs = _HashingFiles()
        self._extra, self._commit = extra, commit

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        """Write this rank's tensors; the result is DCP's write results followed by our WrittenFiles."""
        with config.patch("save.compute_crc32", False):  # torch.save's own, which nobody checks: a fifth of the time
            results = super().write_data(plan, planner).value()
        done: torch.futures.Future = torch.futures.Future()
        done.set_result([*results, *self.fs.written.values()])
        return done

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Complete the folder and commit it; rank 0 only."""
        every = [result for of_rank in results for result in of_rank]
        self.fs.written = {result.name: result for result in every if isinstance(result, WrittenFile)}
        places = {result.index: result.storage_data for result in every if isinstance(result, WriteResult)}
        index = write_index(metadata.state_dict_metadata, places)
        for name, content in [(INDEX, index), *self._extra.items()]:
            assert Path(name).name == name and name not in {*self.fs.written, LISTING}, name
            self._write(name, content)
        files = {f.name: {"bytes": f.num_bytes, "xxh3": f.xxh3} for f in self.fs.written.values()}
        self._write(LISTING, json.dumps({"files": files}, indent=1, sort_keys=True).encode())
        sync_folder(self.path)
        self._require_whole()
        self._commit()

    def _require_whole(self) -> None:
        """Raise OSError unless every rank's file lies here, as long as it was written: else nothing could be loaded."""
        for name, file in self.fs.written.items():
            path = self.path / name
            if not path.exists():
                raise OSError(f"{name} was written by its rank and is not here: do all ranks see {self.path.parent}?")
            if (found := path.stat().st_size) != file.num_bytes:
                raise OSError(f"{name}: {file.num_bytes} bytes were written, {found} are here")

    def _write(self, name: str, content: bytes) -> None:
        with self.fs.create_stream(self.path / name, "wb") as stream:
            stream.write(content)
            os.fsync(stream.fileno())


class CheckedReader(dcp.FileSystemReader):
    """DCP's reader of `folder` over an index that was verified.

    DCP's own reads every saved shard whole that a rank needs a row of: all ranks of a machine would hold the largest
    tensor at once, and read as many times too much as there are more ranks now than then. This one reads the rows.
    """

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index
        self._buffer = torch.empty(READ_BYTES, dtype=torch.uint8)
        self._without_bytes = FakeTensorMode()  # one for all: to make one takes 6 ms

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the verified index."""
        return self._index

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future:
        """Read what `plan` asks for into the planner's tensors."""
        for name, items in groupby(sorted(plan.items, key=self._place), key=lambda item: self._place(item)[0]):
            with Path(self.path, name).open("rb", buffering=0) as stream:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    self._read_into(target, self._slice_file(stream, self.storage_data[item.storage_index]), item)
                    planner.commit_tensor(item, target)
        done: torch.futures.Future = torch.futures.Future()
        done.set_result(None)
        return done

    def _place(self, item: ReadItem) -> tuple[str, int]:
        stored = self.storage_data[item.storage_index]
        return stored.relative_path, stored.offset

    def _read_into(self, target: torch.Tensor, archive: IO[bytes], item: ReadItem) -> None:
        """Fill `target` with the part of the tensor in `archive` that `item` names, through a small buffer."""
        assert item.type == LoadItemType.TENSOR, item
        with self._without_bytes:  # what it is, and where its bytes are
            saved = torch.load(archive, weights_only=True)
        whole_rows = saved.ndim and item.lengths[1:] == saved.shape[1:]
        if not (whole_rows and saved.is_contiguous() and target.is_contiguous()):
            archive.seek(0)
            saved = torch.load(archive, map_location="cpu", weights_only=True)
            target.copy_(narrow_tensor_by_index(saved, item.storage_offsets, item.lengths))
            return
        start = saved.storage_offset() + item.storage_offsets[0] * math.prod(saved.shape[1:])
        archive.seek(saved.untyped_storage()._checkpoint_offset + start * saved.itemsize)
        for piece in target.view(-1).split(READ_BYTES // saved.itemsize):
            content = self._buffer[: len(piece) * saved.itemsize]
            _fill(content, archive)
            piece.copy_(content.view(saved.dtype))


def _fill(content: torch.Tensor, stream: IO[bytes]) -> None:
    """Read as many bytes as `content` (uint8) has room for; raises ValueError where the file ends before."""
    view = memoryview(content.numpy())
    while view:
        if not (count := stream.readinto(view)):
            raise ValueError(f"a file of the checkpoint ends {len(view)} bytes early")
        view = view[count:]


class _HashingFiles(filesystem.FileSystem):
    """DCP's file access, with every file hashed as it is written."""

    def __init__(self) -> None:
        self.written: dict[str, WrittenFile] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator["_HashedFile"]:
        assert mode == "wb", mode
        with Path(path).open(mode, buffering=BUFFER_BYTES) as stream:
            file = _HashedFile(stream)
            try:
                yield file
            except (OSError, RuntimeError):
                if file.failure:
                    raise file.failure from None
                raise
        self.written[Path(path).name] = WrittenFile(Path(path).name, file.num_bytes, file.checksum.hexdigest())


class _HashedFile:
    """A file being written: counts and hashes what passes, and remembers the first error of the disk.

    torch.save's archive writer follows a failed write by another and reports that one ("unexpected pos"), which
    would hide "No space left on device".
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.num_bytes = self._handed_on = 0
        self.checksum = xxh3_64()
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, view.nbytes, HASH_BYTES):
            piece = view[start : start + HASH_BYTES]
            try:
                self._stream.write(piece)
            except OSError as error:
                self.failure = self.failure or error
                raise
            self.checksum.update(piece)
            self.num_bytes += piece.nbytes
            if self.num_bytes - self._handed_on >= WRITEBACK_BYTES:
                # Starts the writing, and keeps the page cache for data; fsync still reports what went wrong.
                size = self.num_bytes - self._handed_on
                os.posix_fadvise(self._stream.fileno(), self._handed_on, size, os.POSIX_FADV_DONTNEED)
                self._handed_on = self.num_bytes
        return view.nbytes

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        self._stream.flush()  # asked for in order to fsync, which sees only what has left the buffer
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()
