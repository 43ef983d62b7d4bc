"""Plain tar files, put together from members and headers of any bytes, and taken apart."""

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK = 512


class Part(NamedTuple):
    """A member of a plain tar."""

    key: str
    extension: str
    data: bytes

    def blocks(self) -> bytes:
        return member(f"{self.key}.{self.extension}".encode(), self.data)


@dataclass
class Shard:
    """A real shard, taken apart."""

    data: bytes
    parts: list[Part] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)  # of each part in `data`

    @classmethod
    def of(cls, data: bytes) -> "Shard":
        shard = cls(data)
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for info in archive:
                key, extension = info.name.split(".", 1)
                shard.parts.append(Part(key, extension, archive.extractfile(info).read()))
                shard.spans.append((info.offset, info.offset_data + -(-info.size // BLOCK) * BLOCK))
        return shard

    def keys_at(self, places: Sequence[int]) -> frozenset[str]:
        """Return the keys of the records that own any of the bytes."""
        owners = zip(self.parts, self.spans, strict=True)
        return frozenset(part.key for part, (start, stop) in owners if any(start <= place < stop for place in places))


def header(name: bytes, size: int | bytes, kind: bytes = b"0", prefix: bytes = b"", link: bytes = b"") -> bytes:
    """Return a tar header of any fields, with the checksum that belongs to them."""
    size = b"%011o\0" % size if isinstance(size, int) else size
    start = name[:100].ljust(100, b"\0") + b"0000444\0" + b"0000000\0" * 2
    start += size[:12].ljust(12, b"\0") + b"0" * 11 + b"\0"
    rest = kind + link[:100].ljust(100, b"\0") + b"ustar\x0000" + bytes(80) + prefix[:155].ljust(155, b"\0") + bytes(12)
    return start + b"%06o\0 " % (sum(start) + sum(rest) + 8 * ord(" ")) + rest


def member(name: bytes, data: bytes, kind: bytes = b"0", **fields: bytes) -> bytes:
    """Return a member's blocks; a name that does not fit its field goes into a GNU long name before it."""
    long_name = member(b"././@LongLink", name + b"\0", b"L") if len(name) > 100 else b""
    return long_name + header(name, len(data), kind, **fields) + data + bytes(-len(data) % BLOCK)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    """Return a pax header of records such as b"path=x"."""
    lines = []
    for record in records:
        length = next(n for n in range(1, 1 << 20) if len(b"%d %s\n" % (n, record)) == n)
        lines.append(record if record[:1].isdigit() else b"%d %s\n" % (length, record))
    return member(b"PaxHeaders/x", b"".join(lines), kind)


def tar(parts: Sequence[Part | bytes]) -> bytes:
    return b"".join(part.blocks() if isinstance(part, Part) else part for part in parts) + bytes(2 * BLOCK)
