"""The parts of the report's HTML page: pictures as data URIs, cards, marks, facts, and the document around them.

All text passes through `escape` here or where it enters a section, as captions and file names are data. The page's
policy forbids any request and any script, so a mistake shows as a missing picture and not as a leak.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH = 96  # CSS pixels of a picture
LOSSLESS = 64  # pixels; wider pictures are stored lossily, at twice their shown width at most


def document(title: str, facts: dict[str, Any], sections: Sequence[tuple[str, str, str]]) -> str:
    """Return the whole page; sections are (id, title, HTML)."""
    links, body = "", ""
    for name, heading, html in sections:
        links += f'<a href="#{name}">{escape(heading)}</a>'
        body += f'<section id="{name}"><h2>{escape(heading)}</h2>{html}</section>\n'
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>\n{Path(__file__).with_suffix('.css').read_text(encoding='utf-8')}</style></head>\n<body>"
        f"<header><h1>{escape(title)}</h1>{fact_list(facts)}<nav>{links}</nav></header>\n{body}</body></html>\n"
    )


def fact_list(facts: dict[str, Any]) -> str:
    pairs = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(fact))}</dd></div>" for name, fact in facts.items())
    return f'<dl class="facts">{pairs}</dl>'


def note(text: str) -> str:
    """Return a paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """Return a table whose cells are HTML."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    rows_of = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="{kind}">{rows_of}</table></div>'


def block(kind: str, parts: Sequence[str]) -> str:
    """Lay parts (HTML) out as the style of this kind says."""
    return f'<div class="{kind}">{"".join(parts)}</div>'


def read_picture(folder: Path, name: str) -> np.ndarray | None:
    """Read a picture as uint8 [H, W, 3]; None if it is missing, broken or outside `folder`."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return None
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def image(pixels: np.ndarray | None, alt: str, width: int = WIDTH) -> str:
    """Return an `<img>` of uint8 [H, W, 3], `width` CSS pixels wide; a sentence where there is no picture."""
    if pixels is None:
        return '<p class="absent">picture missing or unreadable</p>'
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    if picture.width <= LOSSLESS:
        picture.save(buffer, "WEBP", lossless=True, method=6)
    else:
        stored = min(picture.width, 2 * width)
        size = (stored, max(1, round(picture.height * stored / picture.width)))
        picture.resize(size, Image.Resampling.LANCZOS).save(buffer, "WEBP", quality=88, method=6)
    height = round(width * picture.height / picture.width)
    uri = f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img src="{uri}" alt="{escape(alt)}" width="{width}" height="{height}" loading="lazy">'


def mark(right: bool, what: str = "") -> str:
    """Return a tick or a cross; sign and word carry the meaning, colour only repeats it."""
    sign, kind, word = ("✓", "ok", "right") if right else ("✗", "no", "wrong")
    return f'<span class="{kind}" title="{word}">{sign} {escape(what)}</span>'


def card(head: str, text: str, verdict: dict[str, bool], below: str = "") -> str:
    """Return a picture (HTML) with its text and, if it was judged, a mark per attribute; failures stand out."""
    marks = block("marks", [mark(right, name) for name, right in verdict.items()])
    words = f"<p>{escape(text) or '<i>no text</i>'}</p>"
    return block("card" if all(verdict.values()) else "card failed", [block("head", [head, marks]), words, below])


def spread(items: Sequence, number: int) -> list:
    """Return at most `number` items at equal distances, the first and (from 2 on) the last among them."""
    number = min(number, len(items))
    return [items[i * (len(items) - 1) // max(number - 1, 1)] for i in range(number)]
