"""The tables of bench.objectives: shares with their intervals, and the error of x0, space by space."""

from typing import Any

from bench.comparison_page import COLUMNS, markdown, measured_how, number, share


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


def paragraphs(record: dict[str, Any]) -> list[str]:
    """Return what the page says, a table a space."""
    text = [
        "# Objectives and captions on scenes",
        f"{measured_how(record)} By seed: seen scenes that were drawn rightly. "
        "Shares are over all seeds, with Wilson intervals of 95 %. The error of x0 is that of whitened latents or of "
        "pixels, on held-out scenes with their captions, and is compared within a table. `--help` explains the cases.",
    ]
    for space in dict.fromkeys(name.partition("-")[0] for name in record["cases"]):
        cases = {name: case for name, case in record["cases"].items() if name.partition("-")[0] == space}
        text.append(f"## {space.capitalize()}\n\n{table(cases)}\n\n{levels_table(cases)}")
    return text
