"""Whatever a picture's mode, shape or damage: RGB at the encoder's resolution, or one typed error."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.pictures import MAX_PIXELS, bucket_sizes, decode_picture, encode_png, from_unit, to_unit
from data.shards import BadRecord
from tests.raw_files import blank_png, encoded

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def decode(data: bytes, resolution: int = 8) -> np.ndarray:
    pixels = decode_picture(data, [(resolution, resolution)], "a.tar/k")
    assert pixels.shape == (resolution, resolution, 3) and pixels.dtype == np.uint8
    return pixels


def reason(data: bytes) -> str:
    with pytest.raises(BadRecord) as caught:
        decode(data)
    assert str(caught.value).startswith("a.tar/k: ")
    return caught.value.reason


def halves(left: tuple, right: tuple, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    picture = Image.new(mode, size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    return picture


def test_a_picture_of_the_right_size_keeps_every_pixel_and_another_the_mean() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(decode(encode_png(pixels), 64), pixels)
    assert np.abs(decode(encode_png(pixels), 16).mean((0, 1)) - pixels.mean((0, 1))).max() < 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_three_formats_are_read(form: str) -> None:
    assert np.abs(decode(encoded(Image.new("RGB", (8, 8), RED), form)).astype(int) - RED).max() <= 4


@pytest.mark.parametrize("size", [(24, 8), (8, 24), (72, 24)])
def test_the_centre_of_the_shorter_sides_length_is_kept(size: tuple[int, int]) -> None:
    """Stripes along the longer side: only the middle third is left."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    thirds = np.array_split(np.arange(max(size)), 3)
    for part, colour in zip(thirds, (RED, GREEN, WHITE), strict=True):
        pixels[(slice(None), part) if width > height else (part,)] = colour
    found = decode(encode_png(pixels)).astype(int)
    if min(size) > 8:  # resized: at its edges the filter sees beyond the crop
        found = found[2:-2, 2:-2]
    assert np.abs(found - GREEN).max() <= (0 if min(size) == 8 else 3)


def test_buckets_have_the_resolutions_area_and_tile() -> None:
    """Every width once, the square among them, aspects from 1:2 to 2:1, at most the square's pixels."""
    sizes = bucket_sizes(256, 32)
    assert (256, 256) in sizes and len({width for _, width in sizes}) == len(sizes)
    for height, width in sizes:
        assert height % 32 == width % 32 == 0 and 0.5 <= width / height <= 2
        assert height * width <= 256 * 256 < (height + 32) * width
    assert set(sizes) == {(w, h) for h, w in sizes} == set(bucket_sizes(256, 32)) and len(sizes) == 5


@pytest.mark.parametrize(("size", "expected"), [((64, 64), (16, 16)), ((99, 64), (12, 20)), ((1000, 10), (12, 20))])
def test_a_bucket_is_the_nearest_aspect_and_keeps_the_most(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Cut only along the side that is too long, evenly, by a gradient that shows what was kept."""
    width, height = size
    ramp = np.broadcast_to(np.linspace(0, 255, width)[None, :, None], (height, width, 3)).astype(np.uint8)
    kept = min(1.0, expected[1] / expected[0] * height / width)
    for pixels, wanted in ((ramp, expected), (ramp.swapaxes(0, 1), expected[::-1])):
        found = decode_picture(encode_png(np.ascontiguousarray(pixels)), bucket_sizes(16, 4), "here")
        assert found.shape == (*wanted, 3)
        assert abs(found.mean() - 127.5) < 3  # centred
        assert abs(np.ptp(found.astype(float)) - 255 * kept) < 255 / expected[1] + 5


def test_other_modes_become_rgb() -> None:
    grey = decode(encoded(Image.new("L", (8, 8), 77)))
    assert (grey == 77).all()
    assert (decode(encoded(Image.new("1", (8, 8), 1))) == 255).all()
    cmyk = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(cmyk.astype(int) - RED).max() <= 4
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    assert (decode(encoded(Image.fromarray(ramp)))[..., 0] == ramp >> 8).all()  # 16 bits: not clipped to white


def test_what_is_transparent_shows_white() -> None:
    """Whether by an alpha channel, a palette entry or a colour: the hidden colour does not come back."""
    rgba = halves((*GREEN, 0), (*RED, 255), mode="RGBA")
    palette = halves(1, 0, mode="P")
    palette.putpalette([*RED, *GREEN])
    cases = [
        encoded(rgba),
        encoded(rgba, "WEBP", lossless=True),
        encoded(palette, transparency=1),
        encoded(halves(GREEN, RED), transparency=GREEN),
    ]
    for data in cases:
        pixels = decode(data)
        assert (pixels[:, :4] == WHITE).all() and (pixels[:, 4:] == RED).all()
    assert (decode(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 51)))) == 204).all()
    assert (decode(encoded(palette))[:, :4] == GREEN).all()  # a palette without transparency


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    with Image.open(io.BytesIO(encoded(stored, exif=exif))) as picture:
        assert np.array_equal(decode(encoded(stored, exif=exif)), np.asarray(ImageOps.exif_transpose(picture)))


def odd_exif(entries: int, *fields: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block that claims `entries` fields of (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHI4s", *field) for field in fields)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, entries) + body + struct.pack("<III", 0, 5, 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_odd_exif_costs_neither_the_picture_nor_its_turn(form: str) -> None:
    """A text for a resolution, n / 0, a field without end: Pillow shows these, though it cannot write them again."""
    turned = (0x0112, 3, 1, b"\6\0\0\0")
    fields = [(0x011A, 2, 4, b"abc\0"), (0x011A, 5, 1, struct.pack("<I", 38)), (0x9000, 7, 1 << 30, b"\xff" * 4)]
    picture = halves(RED, GREEN)
    as_it_lies = decode(encoded(picture, form))
    for exif in [odd_exif(2, turned, field) for field in fields] + [odd_exif(9, turned)]:
        assert np.array_equal(decode(encoded(picture, form, exif=exif)), np.rot90(as_it_lies, -1))
    for exif in (b"Exif\0\0nothing", odd_exif(1, (0x0112, 2, 4, b"six\0")), odd_exif(1, (0x0112, 12, 9, b"\xff" * 4))):
        assert np.array_equal(decode(encoded(picture, form, exif=exif)), as_it_lies)


def test_what_pillow_warns_of_stays_off_the_terminal() -> None:
    """In a process of its own, because pytest sets its own filters."""
    code = """
import sys
from data.pictures import decode_picture
for data in map(bytes.fromhex, sys.argv[1:]):
    try:
        print(decode_picture(data, [(8, 8)], "a").shape)
    except ValueError as error:
        print(error)
"""
    data = [blank_png(10_000, 10_000, rows=0), encoded(halves(RED, GREEN), "JPEG", exif=odd_exif(9))]
    command = [sys.executable, "-W", "always", "-c", code, *(picture.hex() for picture in data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "a: oversized picture (10000x10000)\n(8, 8, 3)\n" and done.stderr == ""


def test_an_animation_gives_its_first_picture() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    for form in ("PNG", "WEBP"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True)
        assert (decode(data) == RED).all()


def test_what_does_not_decode_is_typed() -> None:
    whole = encoded(Image.new("RGB", (8, 8), RED))
    assert reason(b"") == "empty picture"
    for data in (b"not a picture", whole[:20], whole[:45], encoded(Image.new("RGB", (8, 8)), "BMP")):
        assert reason(data) == "undecodable picture"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(MAX_PIXELS // 1000 + 1, 1000), (10_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    assert reason(blank_png(*size, rows=0)) == "oversized picture"


def test_pixels_survive_the_vaes_range() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    unit = to_unit(pixels)
    assert unit.dtype == np.float32 and unit.shape == (1, 3, 16, 16)
    assert unit.min() == -1 and unit.max() == 1
    assert np.array_equal(from_unit(unit), pixels)
    assert from_unit(unit * 3)[0, 0, 0, 0] == 0 and from_unit(unit * 3)[0, -1, -1, 0] == 255  # clipped
