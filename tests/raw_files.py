"""Raw files: pictures, texts and compressed lines, and what hostile ones hold."""

import gzip
import io
import json
import lzma
import pickle
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import zstandard
from PIL import Image

from tests.arrays import Bomb
from tests.damage import Mutation, any_damage, cut
from tests.tars import Shard, tar


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
