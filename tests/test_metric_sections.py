"""Sections of a run's page are those of docs/metrics.md."""

import re
from pathlib import Path

from train.metric_sections import HEADLINE, NO_PANEL, page_name, section_of

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"
SECTIONS = {
    "Losses": "loss",
    "Gradients and updates": "gradients",
    "Data": "data",
    "Speed": "speed",
    "Memory": "memory",
    "Progress": "progress",
    "Held-out": "heldout",
}


def test_each_metric_lies_in_its_section_of_the_documentation_the_headline_above_them_all() -> None:
    found = set()
    for part in DOCS.read_text().split("\n## ")[1:]:
        title, _, rest = part.partition("\n")
        if title not in SECTIONS:
            continue
        for line in re.findall(r"^\| (`.*?) \|", rest, re.MULTILINE):
            for name in re.findall(r"`([^`]+)`", line):
                stem = name.split("/")[0]
                found.add(name)
                expected = None if stem in NO_PANEL else SECTIONS[title]
                assert section_of(name) == expected, name
                shown = page_name(name)
                if name in HEADLINE:
                    assert shown == name
                elif expected is not None:
                    assert shown is not None and shown.split("/")[0] == expected and shown.count("/") >= 1, name
    assert {*HEADLINE, *NO_PANEL} <= found
    assert page_name("text_loss/pairs") == "loss/text_loss/pairs" and page_name("a_new_one") == "other/a_new_one"
    assert page_name("heldout_ema/pairs/text_loss") == "heldout/pairs/text_loss_ema"
