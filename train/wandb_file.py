"""A .wandb file: what wandb's process has written of a page, and so what `wandb sync` will upload.

It is a log in LevelDB's format after seven bytes of its own: blocks of 32 KiB with parts of records, each after its
checksum, its size and its kind. The end may be torn, as the process buffers and may be killed.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768  # bytes
OWN = 7  # bytes before the first block's content
WHOLE, FIRST, LAST = 1, 2, 4  # kinds of parts


def records(path: Path, last_blocks: int | None = None) -> Iterator[Any]:
    """Yield the records (wandb's protobuf `Record`) that are whole, of the whole file or of its last blocks."""
    from wandb.proto import wandb_internal_pb2

    messages: Any = wandb_internal_pb2  # made when it is imported
    with path.open("rb") as file:
        size = path.stat().st_size
        start = 0 if last_blocks is None else max(0, (size - 1) // BLOCK + 1 - last_blocks) * BLOCK
        file.seek(start)
        content = file.read()
    at, parts, begun = (0 if start else OWN), b"", False
    while at + 7 <= len(content):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        part, at = content[at + 7 : at + 7 + length], at + 7 + length
        if len(part) < length:
            return
        if kind in (WHOLE, FIRST):
            parts, begun = b"", True
        parts += part
        if kind in (WHOLE, LAST) and begun:
            yield messages.Record.FromString(parts)


def row_of(record: Any) -> dict[str, Any]:
    """Return the row of history that a record holds, empty for other records."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
