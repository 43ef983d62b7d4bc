"""Picture bytes -> pixels at the encoder's resolution, and back. Everything Pillow stays here."""

import io

import numpy as np
from PIL import Image, ImageOps

from data.shards import BadRecord, Record

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_PIXELS = 64 * 1024 * 1024  # a header that claims more is a decompression bomb


def decode_picture(record: Record, resolution: int, where: str) -> np.ndarray:
    """Return the record's picture as uint8 [resolution, resolution, 3]: upright, shorter side resized, centre cropped.

    Raises BadRecord when there is none or it does not decode.
    """
    extension = next((name for name in EXTENSIONS if name in record), None)
    if extension is None:
        raise BadRecord("no picture", where, f"members {sorted(record)}")
    try:
        with Image.open(io.BytesIO(record[extension]), formats=("JPEG", "PNG", "WEBP")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise BadRecord("oversized picture", where, f"{picture.width}x{picture.height}")
            ImageOps.exif_transpose(picture, in_place=True)
            picture = _to_rgb(picture)
    except BadRecord:
        raise
    except Image.DecompressionBombError as error:
        raise BadRecord("oversized picture", where, str(error)) from None
    except Exception as error:  # Pillow's decoders share no error class, and what they raise is the picture's fault
        raise BadRecord("undecodable picture", where, str(error)) from None
    if picture.size != (resolution, resolution):
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        picture = picture.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
    return np.asarray(picture)


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any mode; 16-bit greys keep their upper byte (Pillow clips them to white), transparency shows white."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def encode_png(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> f32 [N, 3, H, W] in [-1, 1], the VAE's range."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1


def from_unit(pixels: np.ndarray) -> np.ndarray:
    """f32 [N, 3, H, W] in [-1, 1] (clipped) -> uint8 [N, H, W, 3]."""
    return ((np.clip(pixels, -1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
