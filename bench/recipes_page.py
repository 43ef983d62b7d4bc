"""The tables of bench.recipes: means over seeds, and each case less the recipe that it departs from."""

from typing import Any

from bench.comparison_page import COLUMNS, difference, markdown, measured_how, over_seeds

LOSSES = {"text loss": "text_loss", "captioning loss": "captioning_loss", "x0 error": "x0_error"}
DIFFERENCES = {**LOSSES, "image→text seen": "image_to_text/all", "text→image seen": "text_to_image/all"}


def table(cases: dict[str, Any]) -> str:
    """Return a Markdown table, a row a case: seeds, steps, CPU-seconds of training, means of all scores."""
    rows = {}
    for name, case in cases.items():
        spent = case["train_cpu_s"]
        row = [str(len(case["seeds"])), str(case["steps"]), f"{sum(spent) / len(spent):.0f}" if spent else "–"]
        row += [f"{mean(case[key]):.4f}" for key in LOSSES.values()]
        rows[name] = row + [f"{mean(case['/'.join(share)]):.3f}" for share in COLUMNS.values()]
    return markdown(["seeds", "steps", "CPU-s", *LOSSES, *(name.strip() for name in COLUMNS)], rows)


def differences(cases: dict[str, Any], reference: str, names: list[str]) -> str:
    """Return a Markdown table of cases less the reference, by the same seeds: means and 95 % intervals over seeds."""
    rows = {name: [difference(cases[name], cases[reference], key, 3) for key in DIFFERENCES.values()] for name in names}
    return markdown([*DIFFERENCES], rows)


def shares(cases: dict[str, Any]) -> str:
    """Return a Markdown table of the judge's shares: means with Student's intervals over seeds."""
    rows = {name: [over_seeds(case["/".join(share)], 3) for share in COLUMNS.values()] for name, case in cases.items()}
    return markdown([name.strip() for name in COLUMNS], rows)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def paragraphs(record: dict[str, Any]) -> list[str]:
    """Return what the page says."""
    costs = ", ".join(
        f"{name} {ratio:.2f} ({low:.2f} to {high:.2f})"
        for name, (ratio, low, high) in record["step_over_paper"].items()
    )
    cases = record["cases"]
    text = [
        "# Recipes: which departures from the paper's pay",
        f"{measured_how(record, 'up to ')} Text loss is that of held-out texts, "
        "captioning loss and the error of x0 those of held-out scenes; shares are the judge's. CPU-s: of training, a "
        f"run. A step's CPU time over the paper's, median (lowest to highest): {costs}. `--help` explains the cases.",
        f"## Means over seeds\n\n{table(cases)}",
    ]
    for reference, title in {"paper": "One factor changed", "best": "The winners but for one"}.items():
        names = [n for n in cases if n != reference and n.startswith("best-without") == (reference == "best")]
        if reference in cases and names:
            text.append(f"## {title}, less `{reference}`\n\nOf the same seeds, with Student's intervals of 95 %.")
            text.append(differences(cases, reference, names))
    drawing = {name: case for name, case in cases.items() if name.startswith("best")}
    if drawing:
        text.append(f"## What the winners draw and describe\n\n{shares(drawing)}")
    return text
