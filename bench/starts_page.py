"""The tables of bench.starts: losses and shares beside those of the case that all are compared with."""

import statistics
from pathlib import Path
from typing import Any

from bench.objectives_page import BELOW, markdown, number, share

REFERENCE, LANGUAGE = "none", "language"
T_95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t, two-sided, by degrees of freedom
LOSSES = {"text loss": "text_loss", "image loss": "image_loss", "x0 error": "x0_error"}
SHARES = {
    "text→image seen": ("text_to_image", "all"),
    "unseen": ("text_to_image", "all_unseen"),
    "image→text seen": ("image_to_text", "all"),
}


def table(cases: dict[str, Any]) -> str:
    """Return a Markdown table, a row a case: steps, parameters, losses by seed, shares over all seeds."""
    rows = {}
    for name, case in cases.items():
        counts = case["parameters"]
        row = [str(case["steps"]), *(f"{counts[key] / 1e6:.3f}" for key in ("all", "trained", "trunk_of_a_token"))]
        row += [", ".join(map(number, case.get(key, []))) or "–" for key in LOSSES.values()]
        row += [share(**case["judge"][task][goal]) if case["judge"] else "–" for task, goal in SHARES.values()]
        rows[name] = row
    return markdown(["steps", "parameters, M", "trained", "trunk of a token", *LOSSES, *SHARES], rows)


def differences(cases: dict[str, Any]) -> str:
    """Return a Markdown table of each case less the reference, the same seeds: means and 95 % intervals over seeds."""
    rows: dict[str, list[str]] = {}
    for name, case in cases.items():
        if name not in (REFERENCE, LANGUAGE):
            rows[name] = [difference(case, cases[REFERENCE], key) for key in LOSSES.values()]
            start = cases.get(LANGUAGE)
            rows[name].append(difference(case, start, "text_loss") if start and name.startswith("llm-") else "–")
    return markdown([*LOSSES, "text loss since the start"], rows)


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


def rewrite(page: Path, record: dict[str, Any]) -> None:
    """Write the record's tables to a page; keep what it says from BELOW on."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    below = old[old.index(BELOW) :] if BELOW in old else f"{BELOW}\n"
    versions = ", ".join(f"{name} {which}" for name, which in record["versions"].items())
    slower = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in record["step_over_none"].items())
    text = [
        "# Starting from a language model, and untied weights, on scenes",
        f"`{record['command']}`: {record['steps']} steps a run, {record['seeds']} seeds, {record['prompts']} scenes a "
        f"split. {record['date']}, {record['machine']}, {versions}. Text loss is that of held-out texts, image loss "
        "and the error of x0 that of held-out scenes, by seed. Shares are over all seeds, with Wilson intervals. "
        f"A step over one of `none` in CPU time, at this size: {slower}. `--help` explains the cases.",
        table(record["cases"]),
    ]
    if REFERENCE in record["cases"]:
        text.append("Less `none`, by the same seeds: means, with Student's intervals of 95 %. Below 0 is better.")
        text.append(differences(record["cases"]))
    if record["errors"]:
        text.append("\n".join(f"- {name} failed: {error}" for name, error in record["errors"].items()))
    page.write_text("\n\n".join([*text, below]), encoding="utf-8")
