"""The files of one checkpoint, by DCP: hashed as they are written, and read back into shards (P5).

DCP plans, splits and reshards. The integrity of the bytes is ours, as DCP has no checksums and takes any folder with an
index for complete (listing.py); so is the index (index.py). Only tensors go through DCP, which would pickle anything
else (P11). Whoever imports this imports DCP, which takes half a second: import it where tensors are read or written.
Rejected: hashing after the write (a second read, of what the disk returns rather than of what was meant).
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from xxhash import xxh3_64

from data.durable import sync_folder
from data.strict_json import dumps
from train.checkpoints.index import parse_index, write_index
from train.checkpoints.listing import INDEX, LISTING, PICKLED_INDEX, WrittenFile, read_extra, read_listing

READ_BYTES = 1 << 22
HASH_BYTES = 1 << 20  # hashed and written while still in the CPU's cache
BUFFER_BYTES = 1 << 16  # collects torch.save's forty small writes per tensor; larger writes bypass it
WRITEBACK_BYTES = 1 << 23  # sent to the disk while the next are hashed, rather than all at the end by fsync


def read_index(folder: Path) -> Metadata:
    """Return DCP's metadata of `folder`: names, sizes, dtypes and locations of the tensors.

    Raises ValueError if the index is damaged or not one that this trainer writes, OSError if it is gone.
    """
    listing = read_listing(folder)
    name = INDEX if INDEX in listing else PICKLED_INDEX
    content = read_extra(folder, name)
    try:
        return parse_index(content, name, {file.name: file.num_bytes for file in listing.values()})
    except ValueError as error:
        raise ValueError(
            f"checkpoint {folder}: {name} was not written by this trainer: {error}; restore it, or use another one"
        ) from None


class HashingWriter(dcp.FileSystemWriter):
    """DCP's writer into `folder`, with hashing. Each rank's checksums reach rank 0 among its write results.

    On rank 0 `finish` adds the index, the `extra` files and the listing, makes everything durable and calls `commit`;
    an error on any rank is raised by DCP on every rank.
    """

    def __init__(self, folder: Path, extra: Mapping[str, bytes], commit: Callable[[], None]) -> None:
        # DCP loses the errors of additional threads. Its copies ahead would wait for the training's CUDA stream, though
        # all tensors are on the host already.
        super().__init__(folder, thread_count=1, per_thread_copy_ahead=0, sync_files=True)
        self.fs = self._files = _HashingFiles()
        self._folder, self._extra, self._commit = folder, extra, commit

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        """Write this rank's tensors; the result is DCP's write results followed by our WrittenFiles."""
        # torch.save's own checksum is never read and takes a fifth of the time.
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            results = super().write_data(plan, planner).value()
        done: torch.futures.Future = torch.futures.Future()
        done.set_result([*results, *self._files.written.values()])
        return done

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Complete the folder and commit it; rank 0 only."""
        every = [result for of_rank in results for result in of_rank]
        written = {result.name: result for result in every if isinstance(result, WrittenFile)}
        self._files.written = written  # which `_write` extends
        stored = {result.index: result.storage_data for result in every if isinstance(result, WriteResult)}
        for name, content in [(INDEX, write_index(metadata.state_dict_metadata, stored)), *self._extra.items()]:
            assert Path(name).name == name and name not in {*written, LISTING}, name
            self._write(name, content)
        files = {file.name: {"bytes": file.num_bytes, "xxh3": file.xxh3} for file in written.values()}
        self._write(LISTING, dumps({"files": files}, indent=1, sort_keys=True).encode())
        sync_folder(self._folder)
        for name, file in written.items():  # those of other ranks may be on other disks, or cut short
            path = self._folder / name
            if not path.exists():
                raise OSError(f"{name}: written by its rank but not here: do all ranks see {self._folder.parent}?")
            if (found := path.stat().st_size) != file.num_bytes:
                raise OSError(f"{name}: {file.num_bytes} bytes were written, {found} are here")
        self._commit()

    def _write(self, name: str, content: bytes) -> None:
        with self.fs.create_stream(self._folder / name, "wb") as stream:
            stream.write(content)
            os.fsync(stream.fileno())


class CheckedReader(dcp.FileSystemReader):
    """DCP's reader of `folder`, given its verified index, which reads only the rows that a rank needs.

    DCP's own reads a saved shard whole even for one row: all ranks of a machine would hold the largest tensor at once,
    and with N times as many ranks as when it was saved, read N times too much.
    """

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index
        self._buffer = torch.empty(READ_BYTES, dtype=torch.uint8)
        self._without_bytes = FakeTensorMode()  # one for all reads: creating one takes 6 ms

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the verified index."""
        return self._index

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future:
        """Read what `plan` lists into the planner's tensors."""
        for name, items in groupby(sorted(plan.items, key=self._location), key=lambda item: self._location(item)[0]):
            with Path(self.path, name).open("rb", buffering=0) as stream:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    self._read_into(target, self._slice_file(stream, self.storage_data[item.storage_index]), item)
                    planner.commit_tensor(item, target)
        done: torch.futures.Future = torch.futures.Future()
        done.set_result(None)
        return done

    def _location(self, item: ReadItem) -> tuple[str, int]:
        stored = self.storage_data[item.storage_index]
        return stored.relative_path, stored.offset

    def _read_into(self, target: torch.Tensor, archive: IO[bytes], item: ReadItem) -> None:
        """Fill `target` with the part of the tensor in `archive` that `item` describes, through a small buffer."""
        assert item.type == LoadItemType.TENSOR, item
        with self._without_bytes:  # dtype, shape, strides, and the offset of its bytes
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


def _fill(content: torch.Tensor, stream: Any) -> None:
    """Fill `content` (uint8) from a binary stream; raises ValueError if the file ends early."""
    view = content.numpy().data
    while view:
        if not (count := stream.readinto(view)):
            raise ValueError(f"a file of the checkpoint ends {len(view)} bytes early")
        view = view[count:]


class _HashingFiles(filesystem.FileSystem):
    """DCP's file system, with every file hashed as it is written."""

    def __init__(self) -> None:
        self.written: dict[str, WrittenFile] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        """Yield a _HashedFile; DCP, torch.save and `finish` use no more of a stream than that has."""
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
    """A file being written: counts and hashes the bytes, and remembers the first error of the disk.

    After a failed write torch.save's archive writer makes another and reports its error ("unexpected pos"), which would
    hide "No space left on device".
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.num_bytes = self._flushed = 0
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
            if self.num_bytes - self._flushed >= WRITEBACK_BYTES:
                # Start writing back, and keep the page cache for training data; fsync still reports errors.
                size = self.num_bytes - self._flushed
                os.posix_fadvise(self._stream.fileno(), self._flushed, size, os.POSIX_FADV_DONTNEED)
                self._flushed = self.num_bytes
        return view.nbytes

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        self._stream.flush()  # callers want the descriptor for fsync, which does not see what is still buffered
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()
