"""The tables of bench.starts: losses and shares beside those of the case that all are compared with."""

from typing import Any

from bench.comparison_page import difference, markdown, measured_how, number, share

REFERENCE, LANGUAGE = "none", "language"
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


def paragraphs(record: dict[str, Any]) -> list[str]:
    """Return what the page says."""
    slower = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in record["step_over_none"].items())
    text = [
        "# Starting from a language model, and untied weights, on scenes",
        f"{measured_how(record)} Text loss is that of held-out texts, image loss "
        "and the error of x0 that of held-out scenes, by seed. Shares are over all seeds, with Wilson intervals. "
        f"A step over one of `none` in CPU time, at this size: {slower}. `--help` explains the cases.",
        table(record["cases"]),
    ]
    if REFERENCE in record["cases"]:
        text.append("Less `none`, by the same seeds: means, with Student's intervals of 95 %. Below 0 is better.")
        text.append(differences(record["cases"]))
    return text
