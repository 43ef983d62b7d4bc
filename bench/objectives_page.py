"""The tables of bench.objectives: shares with their intervals, and the page that they are written to."""

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


def table(cases: dict[str, Any]) -> str:
    """Return a Markdown table, a row a case: seen scenes drawn rightly by seed, shares over all seeds with their
    intervals, the error of x0 by seed.
    """
    rows = {
        name: [
            ", ".join(map(str, case["text_to_image"]["all"]["by_seed"])),
            *(share(**case[task][goal]) for task, goal in COLUMNS.values()),
            ", ".join(map(number, case["x0_error"])),
        ]
        for name, case in cases.items()
    }
    return markdown(["by seed", *(name.strip() for name in COLUMNS), "x0 error"], rows)


def levels_table(cases: dict[str, Any]) -> str:
    """Return a Markdown table of the error of x0 by log SNR, means of the seeds."""
    levels = {name: case["x0_error_by_log_snr"] for name, case in cases.items()}
    rows = {name: [number(sum(errors) / len(errors)) for errors in found.values()] for name, found in levels.items()}
    return markdown([f"log SNR {name}" for name in next(iter(levels.values()))], rows)


def rewrite(page: Path, record: dict[str, Any]) -> None:
    """Write the record's tables to a page, a table a space; keep what it says from BELOW on."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    below = old[old.index(BELOW) :] if BELOW in old else f"{BELOW}\n"
    versions = ", ".join(f"{name} {which}" for name, which in record["versions"].items())
    text = [
        "# Objectives and captions on scenes",
        f"`{record['command']}`: {record['steps']} steps a run, {record['seeds']} seeds, {record['prompts']} scenes a "
        f"split. {record['date']}, {record['machine']}, {versions}. By seed: seen scenes that were drawn rightly. "
        "Shares are over all seeds, with Wilson intervals of 95 %. The error of x0 is that of whitened latents or of "
        "pixels, on held-out scenes with their captions, and is compared within a table. `--help` explains the cases.",
    ]
    for space in dict.fromkeys(name.partition("-")[0] for name in record["cases"]):
        cases = {name: case for name, case in record["cases"].items() if name.partition("-")[0] == space}
        text.append(f"## {space.capitalize()}\n\n{table(cases)}\n\n{levels_table(cases)}")
    if record["errors"]:
        text.append("\n".join(f"- {name} failed: {error}" for name, error in record["errors"].items()))
    page.write_text("\n\n".join([*text, below]), encoding="utf-8")


def share(right: int, of: int, by_seed: list[int]) -> str:
    if not of:
        return "–"
    score = scores.share(right, of)
    return f"{score.value:.3f} [{score.low:.2f}, {score.high:.2f}]"


def number(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def markdown(columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [["case", *columns], ["---"] * (len(columns) + 1), *([name, *row] for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
