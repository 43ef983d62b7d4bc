"""Pictures that people look at: contact sheets. Pillow only; curves are the report's."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, LINE, LINES = 6, 12, 3  # pixels, pixels, lines of text under a picture


def contact_sheet(pictures: Sequence[np.ndarray], titles: Sequence[str], columns: int = 4) -> Image.Image:
    """Return a sheet of uint8 [H, W, 3] pictures, all at one scale, each with its title below."""
    assert len(pictures) == len(titles) > 0, (len(pictures), len(titles))
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    scale = max(1, round(128 / width))
    cell_w, cell_h = width * scale + MARGIN, height * scale + LINES * LINE + MARGIN
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_w + MARGIN, rows * cell_h + MARGIN), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        left, top = MARGIN + i % columns * cell_w, MARGIN + i // columns * cell_h
        size = picture.shape[1] * scale, picture.shape[0] * scale
        large = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        sheet.paste(large, (left, top))
        lines = textwrap.wrap(title, max(8, width * scale // 6))[:LINES]
        pen.multiline_text((left, top + height * scale + 1), "\n".join(lines), fill="black", font=font, spacing=1)
    return sheet
