"""Seeded damage and malice: what becomes of real shards, indices, manifests and raw files on the way to a reader.

A mutation is drawn from a `random.Random` alone, so a seed replays it. It says which records it may have changed in a
way that a reader without checksums cannot notice; all others must come out as they were, or be counted.
"""

import gzip
import io
import json
import lzma
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import zstandard
from PIL import Image

BLOCK = 512
HOSTILE_NAMES = [
    *(b"../x.txt", b"/etc/x.txt", b"a/../../x.txt", b"..", b"x\0y.txt", b"\xff\xfe.txt", b"\xed\xa0\x80.txt"),
    *(b"x\n.txt", b"", b".", b"/", b"//.x", b".x", b"a.", b"__meta__/x.txt", b"x.__key__", b"\x1b[31m.txt"),
    *(b"C:\\x.txt", b"x" * 100),
]
LONG_NAMES = [b"a/" * 32_000, b"/." * 32_000, b"." * 65_000, b"a" * 65_000, b"__" * 30_000 + b"a", b"\xff" * 60_000]
HOSTILE_SIZES = [
    *(b"77777777777\0", b"00000000001\0", b"-0000000001\0", b"7777777777777", b"            ", b"0_7        \0"),
    *(b"\xff" * 12, b"\x80" + bytes(10) + b"\1", b"\x80" + b"\xff" * 11, b"\xff" + bytes(11), b"\0" * 12, b"9" * 12),
]
HOSTILE_PAX = [
    *(b"path=../../x.txt", b"path=/x.txt", b"path=", b"path=x\0.txt", b"path=x\n.txt", b"size=99999999999", b"size=-1"),
    *(b"path=\xff.txt", b"GNU.sparse.major=1", b"GNU.sparse.size=1", b"hdrcharset=BINARY", b"linkpath=/etc/passwd"),
]


class Bomb:
    """Makes a folder, `marker` in the present one, when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("marker",)


@dataclass(frozen=True)
class Mutation:
    what: str
    data: bytes
    touched: frozenset[str] | None = frozenset()  # keys of records that may pass although changed; None: any
    refused: frozenset[str] = frozenset()  # keys of records that must not pass
    dropped: frozenset[str] = frozenset()  # keys of records that are not there any more


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


# ---- tar ----


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


# ---- what can happen to any bytes ----


def flip(rng: random.Random, data: bytes) -> tuple[str, bytes, list[int]]:
    """Flip one bit or many; return what was done, the bytes and where."""
    places = [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 1, 2, 5, 50, 1000]))]
    flipped = bytearray(data)
    for place in places:
        flipped[place] ^= 1 << rng.randrange(8)
    return f"{len(places)} bits, first at {places[0]}", bytes(flipped), places


def cut(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    ends = [rng.randrange(len(data)), rng.randrange(len(data)), rng.randrange(len(data) // BLOCK + 1) * BLOCK]
    end = rng.choice(ends)
    return f"cut at {end} of {len(data)}", data[:end]


def overwrite(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """Replace, remove or insert a run of bytes."""
    start, length = rng.randrange(len(data)), rng.choice([1, 3, 12, 511, 512, 2000])
    kept = rng.choice([0, length])
    filling = rng.choice([b"", bytes(length), b"\xff" * length, rng.randbytes(length), data[:length]])
    return f"{kept} bytes at {start} become {len(filling)}", data[:start] + filling + data[start + kept :]


def any_damage(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    return rng.choice([cut, overwrite, lambda rng, data: flip(rng, data)[:2]])(rng, data)


# ---- shards ----


def flipped_shard(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    what, data, places = flip(rng, shard.data)
    return Mutation(f"flip {what}", data, shard.keys_at(places))


def cut_shard(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    return Mutation(*cut(rng, shard.data))


def overwritten_shard(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    return Mutation(*overwrite(rng, shard.data), touched=None)


def rearranged_shard(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    """Drop, double, swap or shuffle members: a record of fewer or other members is one all the same."""
    parts, (a, b) = list(shard.parts), (rng.randrange(len(shard.parts)) for _ in range(2))
    match rng.randrange(4):
        case 0:
            what, touched = f"drop member {a}", frozenset([parts.pop(a).key])
        case 1:
            what, touched = f"double member {a} before {b}", frozenset([parts[a].key, parts[b].key, parts[b - 1].key])
            parts.insert(b, parts[a])
        case 2:
            what, touched = f"swap members {a} and {b}", None
            parts[a], parts[b] = parts[b], parts[a]
        case _:
            what, touched = "shuffle members", None
            rng.shuffle(parts)
    return Mutation(what, tar(parts), touched)


def rearranged_records(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    """Drop, double and shuffle whole records: all that is left is as it was."""
    records: dict[str, list[Part]] = {}
    for part in shard.parts:
        records.setdefault(part.key, []).append(part)
    order = rng.choices(list(records), k=rng.randrange(1, 2 * len(records)))
    order = [key for key, before in zip(order, [None, *order], strict=False) if key != before]
    data = tar([part for key in order for part in records[key]])
    return Mutation(f"records {order}", data, dropped=frozenset(records) - frozenset(order))


def spliced_shard(rng: random.Random, shard: Shard, other: Shard) -> Mutation:
    """The head of one shard and the tail of another, at members' borders, at blocks or anywhere."""
    heads, tails = [start for start, _ in shard.spans], [start for start, _ in other.spans]
    match rng.randrange(3):
        case 0:
            head, tail = rng.choice(heads), rng.choice(tails)
        case 1:
            head, tail = (rng.randrange(len(s.data) // BLOCK) * BLOCK for s in (shard, other))
        case _:
            head, tail = rng.randrange(len(shard.data)), rng.randrange(len(other.data))
    return Mutation(f"splice {head} bytes and another from {tail}", shard.data[:head] + other.data[tail:], None)


def odd_member(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    """Put a hostile member between two: odd names, kinds, sizes, long-name and pax headers."""
    place = rng.randrange(len(shard.parts) + 1)
    after = shard.parts[min(place, len(shard.parts) - 1)]
    key = rng.choice([after.key, "x"])
    name, refused = f"{key}.evil".encode(), frozenset([key])
    touched: frozenset[str] | None = frozenset([key, after.key, shard.parts[place - 1].key])
    match rng.randrange(7):
        case 0:
            name = rng.choice(HOSTILE_NAMES)
            what, blocks, refused = f"name {name!r}", member(name, b"1"), frozenset()
        case 1:
            kind = rng.choice([b"1", b"2", b"3", b"4", b"6", b"S", b"D", b"M", b"V", b"X", b"\x99"])
            what, blocks = f"kind {kind!r}", member(name, b"", kind, link=b"/etc/passwd")
        case 2:
            size = rng.choice([*HOSTILE_SIZES, b"%011o\0" % rng.randrange(1 << 20)])
            what, blocks, touched, refused = f"size {size!r}", header(name, size) + bytes(BLOCK), None, frozenset()
        case 3:
            name = rng.choice([*LONG_NAMES, *(n + b".x" for n in LONG_NAMES), *HOSTILE_NAMES])
            what, blocks, refused = f"long name {name[:20]!r}", member(b"L", name + b"\0", b"L"), frozenset()
            touched = None  # it is the name of the member that follows
        case 4:
            records = rng.sample([*HOSTILE_PAX, *(b"path=" + n for n in LONG_NAMES)], rng.randrange(1, 4))
            what = f"pax {[record[:20] for record in records]}"
            blocks, touched, refused = pax(*records, kind=rng.choice([b"x", b"x", b"g"])), None, frozenset()
        case 5:
            broken = rng.choice([b"7 path=x.txt\n", b"0 path=x\n", b"99999 path=x.txt\n", b"9" * 30, b"12 path=x.t"])
            what, blocks, touched = f"broken pax {broken!r}", pax(broken), None
        case _:
            what, touched, refused = "a header of noise", None, frozenset()
            noise = bytearray(header(name, 0))
            noise[rng.randrange(BLOCK)] = rng.randrange(256)
            blocks = bytes(noise)
    data = tar([*shard.parts[:place], blocks, *shard.parts[place:]])
    return Mutation(f"{what} before member {place}", data, touched, refused)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def zipped(files: dict[str, bytes], form: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip of files, each named NAME.npy."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", form) as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy_of(text: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """Return a .npy file with any header."""
    body = text.encode().ljust(117) + b"\n"
    size = struct.pack("<H" if version == b"\1\0" else "<I", len(body))
    return b"\x93NUMPY" + version + size + body + data


def hostile_array(rng: random.Random) -> tuple[str, bytes]:
    """Return (what, file) of an array that no reader of ours may accept."""
    pickles = [
        ("a pickle", pickle.dumps(Bomb())),
        ("an object array", npy(np.array([Bomb()], dtype=object))),
        ("a pickled array", pickle.dumps(np.arange(3))),
    ]
    if rng.randrange(4) == 0:
        return rng.choice(pickles)

    def shaped(descr: str, shape: str, order: str = "False") -> bytes:
        return npy_of(f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}", bytes(64))

    shapes = ["(1000000000000,)", "(-1,)", "(-4, 4, 4)", "(4, 4)", "(99999999999999999999,)", "(1,)" * 3, "(4, -4, -4)"]
    shapes += ["(9223372036854775807, 2, 2)", "(1, 1, 9999999999999)", "()", "(True,)", "(1.5,)", "None"]
    shapes.append(f"({'1,' * 60})")
    texts = ["__import__('os').mkdir('marker')", "(" * 100, "-" * 9000 + "1", "{" * 100, "1\n  2", "'''", "{'descr': ("]
    kinds = ["f8", "f4", ">f2", ">i4", "i8", "u4", "i2", "?", "c8", "U3", "S4", "M8[s]", "V5"]
    odd_arrays = [np.zeros((2, 2, 2), kind) for kind in kinds]
    odd_arrays += [np.zeros(3, [("a", "i4"), ("b", "f2")]), np.zeros(3, "i8")]
    cases = [
        ("a zip", zipped({"tokens": npy(np.zeros(100_000, np.int32))}, zipfile.ZIP_DEFLATED)),
        *((f"header {text[:30]}", npy_of(text)) for text in texts),
        *((f"header 2.0 {text[:30]}", npy_of(text, version=b"\2\0")) for text in texts),
        *((f"shape {shape[:30]} {dtype}", shaped(dtype, shape)) for shape in shapes for dtype in ("<i4", "<f2", "<i8")),
        *((f"Fortran order {order}", shaped("<f2", "(2, 2, 2)", order)) for order in ("True", "1")),
        *((f"dtype {array.dtype}", npy(array)) for array in odd_arrays),
        ("nothing", b""),
        ("noise", rng.randbytes(300)),
    ]
    return rng.choice(cases)


def hostile_contents(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    """Put what is no such array where an array of an encoded record belongs; headers and sizes are right."""
    number, part = rng.choice([(i, p) for i, p in enumerate(shard.parts) if p.extension.endswith("npy")])
    whole = np.load(io.BytesIO(part.data))
    if whole.dtype == np.float16:
        values = (np.nan, np.inf, -np.inf, -65504, 65504)
        cases = [(f"moments of {value}", _with(rng, whole, value)) for value in values]
        cases += [("odd channels", npy(whole[:-1])), ("more channels", npy(np.concatenate([whole, whole])))]
        cases += [("no cells", npy(whole[:, :0]))]
    elif part.extension == "segments.npy":
        lists = [[], [0], [-2], [2**31 - 1], [-(2**31)], [-1] * 50, [*whole, 1], [*whole, -1]]
        lists += [[1] * (1 << 20), whole + 1]
        cases = [(f"segments {np.array(values)[:5].tolist()}", npy(np.array(values, np.int32))) for values in lists]
    else:
        ids = (2**31 - 1, -1, -(2**31), 100_000)
        cases = [(f"token {value}", _with(rng, whole, value)) for value in ids if whole.size]
    what, data = hostile_array(rng) if rng.randrange(2) else rng.choice(cases)
    parts = [*shard.parts[:number], part._replace(data=data), *shard.parts[number + 1 :]]
    key = frozenset([part.key])
    return Mutation(f"{what} in {part.key}.{part.extension}", tar(parts), key, key)


def _with(rng: random.Random, array: np.ndarray, value: float) -> bytes:
    """Put a value somewhere in an array; of moments, in the log variances."""
    changed = array.copy().ravel()
    changed[rng.randrange(len(changed) // 2 if array.ndim == 3 else 0, len(changed))] = value
    return npy(changed.reshape(array.shape))


def doubly_damaged_shard(rng: random.Random, shard: Shard, other: Shard) -> Mutation:
    is_encoded = any(part.extension.endswith("npy") for part in shard.parts)
    contents = hostile_contents if is_encoded else hostile_raw
    first = rng.choice([odd_member, rearranged_shard, contents, spliced_shard])(rng, shard, other)
    what, data = any_damage(rng, first.data or b"\0")
    return Mutation(f"{first.what}, then {what}", data, None)


SHARD_MUTATIONS = [
    *(flipped_shard, flipped_shard, cut_shard, overwritten_shard, rearranged_shard, rearranged_records, spliced_shard),
    *(odd_member, odd_member, hostile_contents, hostile_contents, doubly_damaged_shard),
]


# ---- indices ----


def flipped_index(rng: random.Random, data: bytes) -> Mutation:
    return Mutation(*any_damage(rng, data))


def hostile_index(rng: random.Random, data: bytes) -> Mutation:
    """A whole zip of arrays that are none of an index, or contradict each other."""
    arrays = dict(np.load(io.BytesIO(data)))
    name = rng.choice(list(arrays))
    array = arrays[name].copy()
    form, files = rng.choice([zipfile.ZIP_STORED] * 6 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]), {}
    match rng.randrange(6):
        case 0:
            what, files[name] = hostile_array(rng)
        case 1:
            values = [-1, 0, 1, 1 << 20, 1 << 30, (1 << 31) - 1, 1 << 31, 1 << 61, (1 << 63) - 1, -(1 << 63)]
            value = rng.choice([v for v in values if np.iinfo(array.dtype).min <= v <= np.iinfo(array.dtype).max])
            place = rng.randrange(array.size)
            array.ravel()[place] = value
            what, files[name] = f"{name}[{place}]={value}", npy(array)
        case 2:
            what, files[name] = f"{name} doubled", npy(np.concatenate([array, array]))
        case 3:
            what, files[name] = f"{name} shuffled", npy(np.array(rng.sample(array.tolist(), len(array)), array.dtype))
        case 4:
            what, files[name] = f"a bomb in {name}", npy(np.zeros((4_000_000, *array.shape[1:]), array.dtype))
            form = zipfile.ZIP_DEFLATED
        case _:
            what, files["../x"] = f"no {name}", b""
            del arrays[name]
    contents = zipped({**{n: npy(a) for n, a in arrays.items()}, **files}, form)
    if rng.randrange(6) == 0:  # a central directory that points far away
        place = contents.rindex(b"PK\1\2")
        contents = contents[: place + 42] + b"\xff" * 4 + contents[place + 46 :]
        what += ", far away"
    return Mutation(f"{what}, form {form}", contents, None)


INDEX_MUTATIONS: list[Callable[[random.Random, bytes], Mutation]] = [flipped_index, hostile_index, hostile_index]


# ---- JSON ----

HOSTILE_VALUES = [
    *(None, True, False, -1, 0, 1, 3.5, float("nan"), float("inf"), 1e308, 1 << 31, 1 << 60, 1 << 63, 10**30, 10**400),
    *("", "x", ".", "..", "../00000.tar", "/etc/passwd", "a\0b", "\ud800", "a" * 200, "00000.tar", "8x8", "0x0"),
    *([], {}, [[0.0], [0.0]], ["x"], {"8x8": 1}, {"9" * 30 + "x1": 1}, {"9" * 5000 + "x1": 1}, {"4x4": 1 << 58}),
]


def damaged_json(rng: random.Random, data: bytes) -> Mutation:
    if rng.randrange(3) == 0:
        return Mutation(*any_damage(rng, data), touched=None)
    tree = json.loads(data)
    what = [_replace_a_value(rng, tree) for _ in range(rng.choice([1, 1, 2]))]
    text = json.dumps(tree)
    if rng.randrange(8) == 0:
        bomb = rng.choice(["[" * 100_000, '{"a":' * 100_000, "1" * 100_000, '"' * 99_999, "\ufeff{}", "-" * 1000])
        text, what = rng.choice([bomb, text[:-1] + ', "x": ' + bomb]), [*what, f"bomb {bomb[:5]}"]
    return Mutation("; ".join(what), text.encode(errors="surrogatepass"), None)


def _replace_a_value(rng: random.Random, tree: Any) -> str:
    """Replace, remove or double something in nested dicts and lists, in place."""
    places: list[tuple[Any, Any]] = []
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        keys = list(node if isinstance(node, dict) else range(len(node)))
        places += [(node, key) for key in keys]
        nodes += [node[key] for key in keys if isinstance(node[key], dict | list)]
    if not places:
        return "nothing"
    node, key = rng.choice(places)
    match rng.randrange(5):
        case 0:
            del node[key]
            return f"no {key!r}"
        case 1 if isinstance(node, list):
            node.append(node[key])
            return f"{key!r} doubled"
        case 1:
            node[rng.choice(["x", "format_version", "store", "", "records"])] = node[key]
            return f"more than {key!r}"
    value = rng.choice(HOSTILE_VALUES)
    node[key] = value
    return f"{key!r}: {str(value)[:30] if not isinstance(value, int) or value < 1 << 64 else 'huge'!r}"


# ---- raw files ----


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def picture(rng: random.Random, form: str, mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> bytes:
    """Return a picture file of noise."""
    noise = Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * len(mode)))  # a letter a channel
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(1, 9)
    return encoded(noise, form, exif=exif, **({"progressive": True} if form == "JPEG" and rng.randrange(2) else {}))


def blank_png(
    width: int, height: int, channels: int = 3, rows: int | None = None, texts: Sequence[bytes] = ()
) -> bytes:
    """Return a PNG of zeros that claims a size and holds `rows` (default: all) of it, and other texts, compressed."""
    packed = zlib.compress(bytes((width * channels + 1) * (height if rows is None else rows)), 1)
    first = struct.pack(">IIBBBBB", width, height, 8, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"zTXt", b"k\0\0" + zlib.compress(text, 1)) for text in texts]
    parts = [(b"IHDR", first), *chunks, (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def many_scans(scans: int, size: tuple[int, int] = (2000, 2000)) -> bytes:
    """Return a progressive JPEG whose last scan comes again and again: each is a pass over all pixels."""
    body = encoded(Image.new("L", size, 128), "JPEG", progressive=True)[:-2]
    return body + body[body.rindex(b"\xff\xda") :] * scans + b"\xff\xd9"


def wide_webp(width: int, height: int) -> bytes:
    """Return an animated WebP of one small frame on a canvas of any size."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    place = data.index(b"VP8X") + 12
    data[place : place + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def hostile_picture(rng: random.Random) -> tuple[str, bytes]:
    cases: list[tuple[str, Callable[[], bytes]]] = [
        ("a PNG that claims 2^31 pixels a side", lambda: blank_png(2**31 - 1, 2**31 - 1, rows=0)),
        ("a PNG that claims 0 pixels", lambda: blank_png(0, 5, rows=0)),
        ("a PNG just past the limit", lambda: blank_png(8193, 8192, rows=1)),
        ("a PNG at the limit, all but a row missing", lambda: blank_png(8192, 8192, rows=1)),
        ("a PNG of one long row", lambda: blank_png(1 << 20, 1)),
        ("a PNG of one long column", lambda: blank_png(1, 1 << 20)),
        ("a PNG with a bomb of text", lambda: blank_png(8, 8, texts=[bytes(50_000_000)] * 3)),
        ("a JPEG of many scans", lambda: many_scans(3000)),
        ("a WebP on a canvas of 2^24 a side", lambda: wide_webp(1 << 24, 255)),
        ("a WebP on a canvas of 16383 a side", lambda: wide_webp(16383, 16383)),
        ("noise", lambda: rng.randbytes(500)),
        ("nothing", lambda: b""),
        ("a pickle", lambda: pickle.dumps(Bomb())),
    ]
    if rng.randrange(40) == 0:
        return "a large PNG with alpha", blank_png(5000, 5000, 4)
    what, make = rng.choice(cases)
    return what, make()


def hostile_text(rng: random.Random) -> tuple[str, bytes]:
    cases = [("a pickle", pickle.dumps(Bomb())), ("not UTF-8", b"\xff\xfe\xfa"), ("half a surrogate", b"\xed\xa0\x80")]
    cases += [("nothing", b" \n"), ("deep lists", b"[" * 200_000), ("deep dicts", b'{"a":' * 200_000)]
    cases += [("a huge int", b'{"text": ' + b"1" * 200_000 + b"}"), ("a number", b"7"), ("a list", b"[]")]
    return rng.choice([*cases, ("other types", b'{"text": {}, "caption": [1], "segments": {"a": 1}}')])


def hostile_json(rng: random.Random) -> tuple[str, bytes]:
    """Return (what, the json of an interleaved record) that makes no document of it."""
    if rng.randrange(40) == 0:
        return "a bomb of lists", b'{"segments": ["a"], "x": [' + b"[]," * 23_000_000 + b"1]}"
    cases: list[Any] = [*("a", {}, 7, None, [], [7], [None], [["a"]], ["\ud800"], ["a"] * 70_000)]
    cases += [[{"image": name}] for name in ("9.jpg", 7, "__key__", "../../etc/passwd")]
    cases += [[{"image": "0.png"}] * 70_000]
    chosen = rng.choice(cases)
    return f"segments {str(chosen)[:40]}", json.dumps({"segments": chosen}).encode()


def hostile_raw(rng: random.Random, shard: Shard, _: Shard) -> Mutation:
    """Put something else where a picture, caption or json of a raw record belongs."""
    number = rng.randrange(len(shard.parts))
    part = shard.parts[number]
    is_interleaved = any(p.key == part.key and p.extension == "0.png" for p in shard.parts)
    if part.extension in ("json", "txt"):
        what, data = (hostile_json if part.extension == "json" and is_interleaved else hostile_text)(rng)
        # A json next to a caption is for people.
        is_refused = is_interleaved or not (part.extension == "json" or _is_caption(data))
    elif rng.randrange(3) == 0:
        what, data = hostile_picture(rng)
        # Pillow takes rows that are missing for black.
        is_refused = not what.startswith(("a PNG of one long", "a PNG at the limit", "a large PNG"))
    else:
        (what, data), is_refused = any_damage(rng, part.data), False
    parts = [*shard.parts[:number], part._replace(data=data), *shard.parts[number + 1 :]]
    key = frozenset([part.key])
    return Mutation(f"{what} in {part.key}.{part.extension}", tar(parts), key, key if is_refused else frozenset())


def _is_caption(data: bytes) -> bool:
    try:
        return bool(data.decode().strip())
    except ValueError:
        return False


RAW_MUTATIONS = [m for m in SHARD_MUTATIONS if m is not hostile_contents] + [hostile_raw] * 8


def hostile_lines(rng: random.Random, lines: list[bytes], pack: Callable[[bytes], bytes]) -> Mutation:
    """Damage lines.jsonl, compressed by `pack`: in its bytes, in a line, or by bombs."""
    data = pack(b"".join(lines))
    match rng.randrange(7):
        case 0:
            what, rest = cut(rng, data)
            # Before or after a line's end what is left is whole lines, and nothing shows that there were more.
            is_whole = pack is plain and (not rest or b"\n" in data[len(rest) - 1 : len(rest) + 1])
            return Mutation(what, rest, None if is_whole else frozenset())
        case 1:
            return Mutation(*any_damage(rng, data), touched=None)
        case 2:
            number = rng.randrange(len(lines))
            what, line = hostile_text(rng)
            key = frozenset([f"lines-{number:08d}"])
            changed = [*lines[:number], line.replace(b"\n", b"") + b"\n", *lines[number + 1 :]]
            return Mutation(f"{what} in line {number}", pack(b"".join(changed)), key, key)
        case 3:
            half = len(lines) // 2
            return Mutation("two parts", pack(b"".join(lines[:half])) + pack(b"".join(lines[half:])))
        case 4:
            other = rng.choice([gz, zst, plain, lzma.compress])(lines[0])[rng.choice([0, 0, 1, 5]) :]
            head = rng.choice([0, rng.randrange(len(data)), len(data)])
            return Mutation(f"{head} bytes and another tail", data[:head] + other, None)
        case 5:
            size = rng.choice([*[1] * 9, 80]) << 20
            key = frozenset([f"lines-{len(lines):08d}"])
            return Mutation(f"a line of {size} bytes", data + pack(b"x" * size), key, key)
    size, window = rng.choice([*[1] * 9, 200]) << 20, rng.choice([0x38, 0x88, 0xA8, 0xFF])
    return Mutation(f"a zstd bomb of {size} bytes, window {window:#x}", zst_bomb(size, window), None)


def gz(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


def plain(data: bytes) -> bytes:
    return data


def zst_bomb(size: int, window: int = 0x38) -> bytes:
    """Return a zstd frame of one byte `size` times, four bytes a block; `window` is the byte that claims its window."""
    ends = range(1 << 17, size + 1, 1 << 17)
    blocks = [((1 << 17) << 3 | 2 | (end >= size)).to_bytes(3, "little") + b"x" for end in ends]
    return struct.pack("<IBB", 0xFD2FB528, 0, window) + b"".join(blocks)
