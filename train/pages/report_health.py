"""The report's first sections: is each run healthy, what happened to it and when, and how do several runs differ."""

import time
from html import escape
from typing import Any

from train.nested import leaves
from train.pages.page import block, note, table
from train.pages.reference_band import Verdict
from train.pages.report_inputs import LeftOut, ReportInputs, RunInputs
from train.pages.run_health import Finding, findings
from train.pages.run_timeline import MOST, timeline
from train.pages.svg_chart import Chart, Curve, draw_chart

LONGEST = 60  # characters of a setting that are shown


def health(inputs: ReportInputs) -> str:
    parts = []
    for i, run in enumerate(inputs.runs):
        found = findings(run) + _reference(inputs, run)
        if found:
            title = f"<h3>{chr(65 + i)} {escape(run.name)}</h3>" if len(inputs.runs) > 1 else ""
            parts.append(block("health", [title, _summary(found), *map(_finding, found)]))
    if not parts:
        raise LeftOut(f"No rows in {inputs.runs[0].folder}/metrics.jsonl yet: nothing is known of the run.")
    return block("runs", parts)


def _summary(found: list[Finding]) -> str:
    look = [finding.topic for finding in found if finding.healthy is False]
    well = sum(finding.healthy is True for finding in found)
    if not look:
        return f'<p class="verdict ok">✓ Healthy in all {well} topics.</p>'
    words = f"▲ Look at {', '.join(look)}; {well} other topics are healthy."
    return f'<p class="verdict look">{escape(words)}</p>'


def _finding(finding: Finding) -> str:
    signs = {True: ("✓", "ok", "healthy"), False: ("▲", "look", "look at this"), None: ("○", "note", "not known")}
    sign, kind, word = signs[finding.healthy]
    head = f'<dt><span class="{kind}" title="{word}">{sign}</span> {escape(finding.topic)}</dt>'
    kind = "finding look" if finding.healthy is False else "finding"
    return f'<dl class="{kind}">{head}<dd>{escape(finding.words)}<i>Look if {escape(finding.rule)}.</i></dd></dl>'


def _reference(inputs: ReportInputs, run: RunInputs) -> list[Finding]:
    verdict: Verdict | None = inputs.verdicts.get(run.name)
    if verdict is None:
        return []
    words = f"{verdict.words[0].upper()}{verdict.words[1:]}."
    healthy = verdict.within if verdict.by_metric else None  # it cannot be compared
    return [
        Finding(
            "Reference",
            healthy,
            words,
            "more than a tenth of a curve's rows, or its last three, lie outside of the band",
        )
    ]


def timelines(inputs: ReportInputs) -> str:
    tables, several = [], len(inputs.runs) > 1
    for i, run in enumerate(inputs.runs):
        moments, number = timeline(run)
        rows = [
            [moment.when, "" if moment.step is None else f"{moment.step:,}", moment.kind, moment.words]
            for moment in moments
        ]
        if rows:
            title = f"<h4>{chr(65 + i)} {escape(run.name)}</h4>" if several else ""
            about = note(f"The newest of {number} moments.") if len(moments) == MOST else ""
            escaped = [[escape(cell) for cell in row] for row in rows]
            tables.append(
                title + about + table([f"time ({time.strftime('%Z')})", "step", "what", ""], escaped, "moments")
            )
    chart = _over_time(inputs.runs)
    if not (tables or chart):
        raise LeftOut("Nothing happened yet: fewer than two rows, no events.jsonl and no bad_updates.jsonl.")
    return block("beside", [chart, *(block("part", [of_run]) for of_run in tables)])


def _over_time(runs: list[RunInputs]) -> str:
    """Return each run's steps over the time since its first row; starts after that are marked for a single run."""
    known = [(i, run, run.columns["time"]) for i, run in enumerate(runs) if len(run.columns["time"]) > 1]
    if not known:
        return ""
    longest = max(float(times.values[-1] - times.values[0]) for _, _, times in known)
    unit, size = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)
    curves = [
        Curve(run.name if len(runs) > 1 else "", (times.values - times.values[0]) / size, times.steps, i, exact=True)
        for i, run, times in known
    ]
    first = float(known[0][2].values[0])
    starts = [event.get("time") for event in runs[0].events if event.get("kind") == "start"] if len(runs) == 1 else []
    marks = [(at - first) / size for at in starts if isinstance(at, int | float) and at > first][:MOST]
    about = f"{unit} since the first row" + ("; dashed: started again" if marks else "")
    return draw_chart(Chart("Steps over time", about, "zero", over=unit, marks=marks, letters=len(runs) > 1), curves)


def differences(inputs: ReportInputs) -> str:
    """Return the settings that are not the same in all runs; where a run writes is left out."""
    if len(inputs.runs) < 2:
        raise LeftOut("One run: nothing to compare (run=A run=B).")
    settings = [dict(leaves(run.recipe)) for run in inputs.runs]
    names = [name for name in dict.fromkeys(name for of_run in settings for name in of_run) if name != "run_dir"]
    missing = object()
    rows = []
    for name in names:
        values = [of_run.get(name, missing) for of_run in settings]
        if any(value != values[0] for value in values):
            rows.append([f"<code>{escape(name)}</code>", *("—" if v is missing else _setting(v) for v in values)])
    if not rows:
        return note(f"All {len(names)} settings are the same.")
    head = ["setting", *(f"{chr(65 + i)} {escape(run.name)}" for i, run in enumerate(inputs.runs))]
    return note(f"{len(rows)} of {len(names)} settings differ; a dash: the run's version has none.") + table(
        head, rows, "texts"
    )


def _setting(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return escape(text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…")
