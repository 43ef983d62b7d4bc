"""Picture bytes -> pixels at the encoder's resolution, and back; contact sheets."""

import io
import json
import re
import struct
import textwrap
import warnings
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin

from data.shards import BadRecord
from data.strict_json import dumps

MAX_PIXELS = 64 * 1024 * 1024  # more is taken for a decompression bomb
MAX_SCANS = 100  # of a JPEG: each is a pass over all pixels, however few its bytes; 1 to 12 are usual
JPEG_QUALITY = 95  # 0...100
MARGIN, LINE, LINES = 6, 12, 3  # of a contact sheet: pixels, pixels, lines of text under a picture
CELLS = "cells"  # in the PNG of a contact sheet: left, upper, right, lower and title of each picture, as JSON
_TILE = 2048  # pixels a side that are made opaque at a time
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # of a segment or the end; others occur in compressed data
Size = tuple[int, int]  # pixels, (height, width)
# What turns pictures of EXIF orientations 2, 3, ... 8 upright; 1 is upright.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_UPRIGHT = {orientation: Image.Transpose[name] for orientation, name in enumerate(_TURNS, start=2)}


def bucket_sizes(resolution: int, multiple: int, max_aspect: float = 2.0) -> tuple[Size, ...]:
    """Return the sizes of aspect buckets: sides divisible by `multiple`, at most resolution x resolution pixels each.

    One for each width whose aspect is within `max_aspect` either way, the square among them.
    """
    sizes = {(resolution, resolution)}
    for width in range(multiple, round(resolution * max_aspect) + 1, multiple):
        height = resolution * resolution // width // multiple * multiple
        if height and max(width / height, height / width) <= max_aspect:
            sizes.add((height, width))
    return tuple(sorted(sizes))


def decode_picture(data: bytes, sizes: Sequence[Size], where: str) -> np.ndarray:
    """Return a picture file's pixels, uint8 [H, W, 3]: upright, resized to cover and centre cropped.

    (H, W) is the one of `sizes` with the nearest aspect. Raises BadRecord for what does not decode.
    """
    if not data:
        raise BadRecord("empty picture", where)
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as file:
            if file.width * file.height > MAX_PIXELS:
                raise BadRecord("oversized picture", where, f"{file.width}x{file.height}")
            if data.startswith(b"\xff\xd8") and (scans := _num_scans(data)) > MAX_SCANS:
                raise BadRecord("oversized picture", where, f"{scans} scans")
            picture = _to_rgb(_upright(file))
    except (BadRecord, MemoryError):  # the latter need not be the picture's fault
        raise
    except Image.DecompressionBombError as error:
        raise BadRecord("oversized picture", where, str(error)) from None
    except Exception as error:  # Pillow's decoders share no error class, and any error is the picture's fault
        raise BadRecord("undecodable picture", where, str(error)) from None
    height, width = min(sizes, key=lambda size: abs(np.log(size[1] / size[0] * picture.height / picture.width)))
    if picture.size != (width, height):
        kept_width = min(picture.width, picture.height * width / height)
        kept_height = min(picture.height, picture.width * height / width)
        left, top = (picture.width - kept_width) // 2, (picture.height - kept_height) // 2
        box = (left, top, left + kept_width, top + kept_height)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(picture)


def resized(pixels: np.ndarray, size: Size, resample: int) -> np.ndarray:
    """Return uint8 [H, W, 3] at another size by one of Pillow's filters (2 bilinear, 3 bicubic), which antialias."""
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling(resample)))


@cache
def _silence_pillow() -> None:
    """Silence Pillow's warnings about what it tolerates (odd EXIF, large pictures), as nothing can be done."""
    # Permanently, as `catch_warnings` would change other threads' filters.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _upright(picture: Image.Image) -> Image.Image:
    """Turn a picture upright by its EXIF, if that is readable."""
    # Rejected: ImageOps.exif_transpose, which rewrites the EXIF and cannot write all that it reads.
    picture.load()  # a PNG's EXIF may follow its pixels, whose damage is not the EXIF's
    try:
        turn = _UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, OSError, struct.error):
        return picture  # as viewers do
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any mode; 16-bit greys keep their upper byte (Pillow clips to white), transparency becomes white."""
    if picture.mode == "RGB" and not picture.has_transparency_data:
        picture.load()
        return picture  # `convert` would copy it
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    opaque = Image.new("RGB", picture.size)
    for top, left in product(range(0, picture.height, _TILE), range(0, picture.width, _TILE)):
        # Tile by tile: each whole copy of the largest pictures would take a quarter of a GiB.
        box = (left, top, min(left + _TILE, picture.width), min(top + _TILE, picture.height))
        tile = picture.crop(box).convert("RGBA")
        opaque.paste(Image.alpha_composite(Image.new("RGBA", tile.size, "white"), tile).convert("RGB"), box)
    return opaque


def _num_scans(jpeg: bytes) -> int:
    """Count the scans of a JPEG file by its markers, up to its end."""
    scans, place = 0, 2
    while (match := _JPEG_MARKER.search(jpeg, place)) and match[1] != b"\xd9":
        scans += match[1] == b"\xda"
        place = match.end() + int.from_bytes(jpeg[match.end() : match.end() + 2], "big")
    return scans


def encode_png(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as JPEG bytes of JPEG_QUALITY."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def encode_preview(pixels: np.ndarray, side: int) -> bytes:
    """Return uint8 [H, W, 3] as a lossy WebP file of at most `side` pixels a side."""
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((side, side))
    picture.save(buffer, "WEBP", quality=80, method=0)
    return buffer.getvalue()


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> f32 [N, 3, H, W] in [-1, 1], the VAE's range."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1


def from_unit(pixels: np.ndarray) -> np.ndarray:
    """f32 [N, 3, H, W] in [-1, 1] (clipped) -> uint8 [N, H, W, 3]."""
    return ((np.clip(pixels, -1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)


def write_sheet(file: BinaryIO, pictures: Sequence[np.ndarray], titles: Sequence[str]) -> None:
    """Write a contact sheet as a PNG that also says where each picture is and what its title is."""
    sheet, boxes = _contact_sheet(pictures, titles)
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CELLS, dumps([[*box, title] for box, title in zip(boxes, titles, strict=True)]))
    sheet.save(file, "PNG", pnginfo=info)


def read_sheet(path: Path) -> list[tuple[np.ndarray, str]]:
    """Return the pictures of a contact sheet, uint8 [H, W, 3] at its scale, and their titles."""
    with Image.open(path, formats=("PNG",)) as file:
        sheet, cells = file.convert("RGB"), json.loads(file.info.get(CELLS, "[]"))
    whole = [(0, 0, *sheet.size, "")]  # of an earlier version
    return [(np.asarray(sheet.crop(tuple(box))), title) for *box, title in cells or whole]


def contact_sheet(pictures: Sequence[np.ndarray], titles: Sequence[str], columns: int = 4) -> Image.Image:
    """Return a sheet of uint8 [H, W, 3] pictures, all at one scale, each with its title below."""
    return _contact_sheet(pictures, titles, columns)[0]


def _contact_sheet(
    pictures: Sequence[np.ndarray], titles: Sequence[str], columns: int = 4
) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """Return the sheet, and of each picture the left, upper, right and lower pixel."""
    assert len(pictures) == len(titles) > 0, (len(pictures), len(titles))
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    scale = max(1, round(128 / width))
    cell_w, cell_h = width * scale + MARGIN, height * scale + LINES * LINE + MARGIN
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_w + MARGIN, rows * cell_h + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    boxes = []
    for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left, top = MARGIN + i % columns * cell_w, MARGIN + i // columns * cell_h
        size = picture.shape[1] * scale, picture.shape[0] * scale
        sheet.paste(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC), (left, top))
        boxes.append((left, top, left + size[0], top + size[1]))
        lines = textwrap.wrap(title, max(8, width * scale // 6))[:LINES]
        pen.multiline_text((left, top + height * scale + 1), "\n".join(lines), fill="black", font=font, spacing=1)
    return sheet, boxes
