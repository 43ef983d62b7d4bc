"""What a browser would make of a page."""

import base64
import io
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
from PIL import Image

VOID = {"meta", "img", "input", "br", "use", "path", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, the visible text, the cards."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.elements, self.text, self.open, self.unbalanced = html, [], "", [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data

    def section(self, name: str) -> "Page":
        return Page(re.search(rf'<section id="{name}">.*?</section>', self.html, re.DOTALL)[0])

    def classes(self) -> Counter:
        return Counter(attrs["class"] for _, attrs in self.elements if "class" in attrs)

    def pictures(self) -> list[np.ndarray]:
        found = [attrs["src"].split(",", 1)[1] for tag, attrs in self.elements if tag == "img"]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]
