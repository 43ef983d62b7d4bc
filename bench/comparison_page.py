"""What the pages of bench.objectives, bench.starts and bench.recipes are made of: tables, and means with intervals."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.evaluation import scores

COLUMNS = {
    "text→image seen": ("text_to_image", "all"),
    "unseen": ("text_to_image", "all_unseen"),
    "two shapes": ("text_to_image", "all_two_shapes"),
    "image→text seen": ("image_to_text", "all"),
    "unseen ": ("image_to_text", "all_unseen"),
    "two shapes ": ("image_to_text", "all_two_shapes"),
}
BELOW = "## What is seen"  # a page's lines from here on are people's
T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t, two-sided, by degrees of freedom


def rewrite(page: Path, record: dict[str, Any], paragraphs: Sequence[str]) -> None:
    """Write a page of the paragraphs and of what failed; keep what it says from BELOW on."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    below = old[old.index(BELOW) :] if BELOW in old else f"{BELOW}\n"
    failed = "\n".join(f"- {name} failed: {error}" for name, error in record["errors"].items())
    page.write_text("\n\n".join([*paragraphs, *([failed] if failed else []), below]), encoding="utf-8")


def measured_how(record: dict[str, Any], up_to: str = "") -> str:
    """Say which command made a record, where and when; `up_to` stands before the number of seeds."""
    versions = ", ".join(f"{name} {which}" for name, which in record["versions"].items())
    return (
        f"`{record['command']}`: {record['steps']} steps a run, {up_to}{record['seeds']} seeds, "
        f"{record['prompts']} scenes a split. {record['date']}, {record['machine']}, {versions}."
    )


def markdown(columns: list[str], rows: dict[str, list[str]]) -> str:
    """Return a Markdown table, a row a case."""
    lines = [["case", *columns], ["---"] * (len(columns) + 1), *([name, *row] for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(right: int, of: int, by_seed: list[int]) -> str:
    if not of:
        return "–"
    score = scores.share(right, of)
    return f"{score.value:.3f} [{score.low:.2f}, {score.high:.2f}]"


def number(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def difference(case: dict[str, Any], other: dict[str, Any], key: str, digits: int = 4) -> str:
    """Return the mean over common seeds of a case's figure less the other's, with Student's interval of 95 %."""
    theirs = dict(zip(other["seeds"], other[key], strict=True))
    found = [value - theirs[seed] for seed, value in zip(case["seeds"], case[key], strict=True) if seed in theirs]
    return over_seeds(found, digits, "+") if found else "–"


def over_seeds(values: list[float], digits: int, sign: str = "") -> str:
    """Return the mean of a figure's values, one a seed, with Student's interval of 95 %."""
    mean, freedom, form = statistics.mean(values), len(values) - 1, f"{sign}.{digits}f"
    if freedom < 1:
        return f"{mean:{form}}"
    half = T_95.get(freedom, 2.6) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"
