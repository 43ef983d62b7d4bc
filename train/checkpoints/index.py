"""The index of a checkpoint: which part of which tensor is where, in JSON that no Python version changes (P4, P11).

    index.json   {"version": 1, "tensors": {NAME: {"dtype": "float32", "size": [13, 6], "shards": [SHARD, ...]}}}
    SHARD        [file, its first byte, its bytes, [first row, first column, ...], [rows, columns, ...]]

DCP's own index, `.metadata`, is a pickle: its bytes depend on the interpreter (3.11.2 and 3.11.4 pickle enums
differently), and reading it as DCP does may execute anything. Checkpoints that still have one are read with inert
stand-ins for the pickled classes. Either form is checked completely before anything is allocated or read from it.
"""

import io
import json
import math
import pickle
from collections import Counter
from collections.abc import Mapping
from reprlib import repr as brief
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from data.strict_json import dumps
from train.checkpoints.listing import PICKLED_INDEX

VERSION = 1
MOST_DIMS = 64  # torch's own limit


def write_index(tensors: Mapping[str, object], stored: Mapping[MetadataIndex, _StorageInfo]) -> bytes:
    """Return the content of index.json for DCP's metadata of `tensors` and where they were `stored`."""
    entries = {}
    for name, tensor in tensors.items():
        assert isinstance(tensor, TensorStorageMetadata), name
        shards = []
        for chunk in tensor.chunks:
            info = stored[MetadataIndex(name, chunk.offsets)]
            shards.append([info.relative_path, info.offset, info.length, [*chunk.offsets], [*chunk.sizes]])
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        entries[name] = {"dtype": dtype, "size": [*tensor.size], "shards": shards}
    return dumps({"version": VERSION, "tensors": entries}, separators=(",", ":")).encode()


def parse_index(content: bytes, name: str, file_bytes: Mapping[str, int]) -> Metadata:
    """Return DCP's metadata from an index, whose file is called `name`; `file_bytes` are the sizes of all files.

    Raises ValueError for what this trainer never writes.
    """
    entries = _unpickled(content) if name == PICKLED_INDEX else _parsed(content)
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    stored, num_bytes = {}, 0
    for tensor, entry in entries.items():
        try:
            num_bytes += _check(tensor, entry, file_bytes)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{tensor}={brief(entry)}: expected a tensor's dtype, size and shards") from error
        chunks = []
        for number, (file, start, length, offsets, sizes) in enumerate(entry["shards"]):
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            stored[MetadataIndex(tensor, offsets, number)] = _StorageInfo(file, start, length)
        properties = TensorProperties(vars(torch)[entry["dtype"]])
        tensors[tensor] = TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)
    if num_bytes > (most := sum(file_bytes.values())):
        raise ValueError(f"its shards take {num_bytes} bytes: expected at most {most}, the size of all files")
    return Metadata(tensors, storage_data=stored)


def _check(name: str, entry: dict[str, Any], file_bytes: Mapping[str, int]) -> int:
    """Return a tensor's size in bytes; raise ValueError, KeyError or TypeError unless its shards cover it once."""
    dtype, size, shards = vars(torch).get(entry["dtype"]), entry["size"], entry["shards"]
    if not (isinstance(name, str) and isinstance(dtype, torch.dtype) and _are_counts(size) and len(size) <= MOST_DIMS):
        raise ValueError(f"{brief(name)}: dtype={brief(entry['dtype'])}, size={brief(size)}: expected a tensor's")
    elements = num_bytes = 0
    begins = set()
    for shard in shards:
        if not _is_inside(shard, size, dtype.itemsize, file_bytes):
            raise ValueError(
                f"{name}: shard {brief(shard)}: expected [file, its first byte, bytes, offsets, sizes] inside a file "
                f"of the checkpoint and a tensor of size {brief(size)}"
            )
        _, _, length, offsets, sizes = shard
        if volume := math.prod(sizes):  # each rank without rows writes an empty shard at the same offsets
            begins.add(tuple(offsets))
            elements, num_bytes = elements + volume, num_bytes + length
    parts = sum(0 not in shard[-1] for shard in shards)
    if elements != math.prod(size) or len(begins) < parts:
        raise ValueError(
            f"{name}: its {parts} shards begin at {len(begins)} offsets and hold {elements} elements: expected each "
            f"part of {brief(size)} once"
        )
    return num_bytes


def _is_inside(shard: Any, size: list[int], itemsize: int, file_bytes: Mapping[str, int]) -> bool:
    if type(shard) is not list or len(shard) != 5:
        return False
    file, start, num_bytes, offsets, sizes = shard
    return (
        type(file) is str
        and _are_counts([start, num_bytes])
        and start + num_bytes <= file_bytes.get(file, -1)
        and _are_counts(offsets)
        and _are_counts(sizes)
        and len(offsets) == len(sizes) == len(size)
        and all(offset + rows <= most for offset, rows, most in zip(offsets, sizes, size, strict=True))
        and math.prod(sizes) * itemsize <= num_bytes
    )


def _are_counts(numbers: Any) -> bool:
    return type(numbers) is list and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)


def _parsed(content: bytes) -> dict[str, Any]:
    """Return the entries of an index.json; raise ValueError if it is not one."""
    try:
        index = json.loads(content, object_pairs_hook=_without_repeats)
        version, tensors = index["version"], index["tensors"]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"expected an object with version and tensors ({type(error).__name__}: {error})") from None
    if version != VERSION or not isinstance(tensors, dict):
        raise ValueError(f"version={brief(version)}, tensors={brief(tensors)}: expected {VERSION} and an object")
    return tensors


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]} occurs twice")
    return entries


def _unpickled(content: bytes) -> dict[str, Any]:
    """Return the entries of a `.metadata` in the form of index.json."""
    try:
        index = _Unpickler(io.BytesIO(content)).load().state
        places = {(key.state["fqn"], key.state["offset"]): place.state for key, place in index["storage_data"].items()}
        records = {name: record.state for name, record in index["state_dict_metadata"].items()}
        if sum(len(record["chunks"]) for record in records.values()) > len(content):  # one list referenced many times
            raise ValueError("more shards than bytes")
        entries = {}
        for name, record in records.items():
            shards = []
            for chunk in record["chunks"]:
                offsets, sizes = chunk.state["offsets"], chunk.state["sizes"]
                place = places[name, offsets]
                shards.append([place["relative_path"], place["offset"], place["length"], [*offsets], [*sizes]])
            entries[name] = {"dtype": record["properties"].state[0], "size": [*record["size"]], "shards": shards}
    except _DAMAGED_PICKLE as error:
        raise ValueError(f"expected the metadata of tensors only ({type(error).__name__}: {error})") from None
    return entries


# What an unpickler raises for bytes that no pickler wrote, and what records of unexpected shapes lead to.
_DAMAGED_PICKLE = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError,
    TypeError, ValueError,
)  # fmt: skip


class _Record:
    """Stands for an object of a pickle: keeps its state, and never imports or calls what the pickle names."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Unpickle DCP's index: dtypes as their names, sizes as tuples, everything else as inert records."""

    KNOWN = {
        "builtins": ["getattr"],  # how Python up to 3.11.3 names the member of an enum
        "torch.serialization": ["_get_layout"],
        "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
        "torch.distributed.checkpoint.metadata": [
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        ],
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in; raise UnpicklingError for anything that does not belong in an index."""
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return name
        if (module, name) == ("torch", "Size"):
            return tuple
        if name in self.KNOWN.get(module, []):
            return _Record
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in the index of a checkpoint")
