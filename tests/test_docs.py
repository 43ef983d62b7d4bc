"""What the pages for people name is there: files, programs, promises."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "bench" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROMISES = [f"P{number}" for number in range(1, 15)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(
        re.findall(r"\b(?:data|model|train|slurm|configs|bench|tests|docs)/[\w/.-]*\.(?:py|yaml|sh|md|png)\b", text)
    )
    linked = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    missing = {path for path in named if not (ROOT / path).exists()}
    missing |= {link for link in linked if not (page.parent / link).exists()}
    assert not missing


def test_every_promise_is_defined_once_and_shown_by_a_test() -> None:
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \*\*(P\d+)\*\*", design, re.MULTILINE) == PROMISES
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [promise for promise in PROMISES if not re.search(rf"\b{promise}\b", tests)]


def test_no_promise_is_cited_that_the_design_lacks() -> None:
    for path in (
        path for folder in ("data", "model", "train", "slurm", "bench") for path in (ROOT / folder).rglob("*.py")
    ):
        cited = set(re.findall(r"\((?:[^()]*\b)?(P\d+)\)", path.read_text(encoding="utf-8")))
        assert cited <= set(PROMISES), path


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
