"""The report's first sections: is each run healthy, what happened to it and when, and how do several runs differ."""

from html import escape
from typing import Any

from train.nested import leaves
from train.pages.page import block, note, table
from train.pages.reference_band import Verdict
from train.pages.report_inputs import LeftOut, ReportInputs, RunInputs
from train.pages.run_health import Finding, findings
from train.pages.run_timeline import timeline
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
    look = [finding.topic for finding in found if not finding.healthy]
    if not look:
        return f'<p class="verdict ok">✓ Healthy in all {len(found)} topics.</p>'
    words = f"▲ Look at {', '.join(look)}; the other {len(found) - len(look)} topics are healthy."
    return f'<p class="verdict look">{escape(words)}</p>'


def _finding(finding: Finding) -> str:
    sign, kind, word = ("✓", "ok", "healthy") if finding.healthy else ("▲", "look", "look at this")
    head = f'<dt><span class="{kind}" title="{word}">{sign}</span> {escape(finding.topic)}</dt>'
    kind = "finding" if finding.healthy else "finding look"
    return f'<dl class="{kind}">{head}<dd>{escape(finding.words)}<i>Look if {escape(finding.rule)}.</i></dd></dl>'


def _reference(inputs: ReportInputs, run: RunInputs) -> list[Finding]:
    verdict: Verdict | None = inputs.verdicts.get(run.name)
    if verdict is None:
        return []
    words = f"{verdict.words[0].upper()}{verdict.words[1:]}."
    return [Finding("Reference", verdict.within, words, "a tenth of a curve's rows lie outside of the band")]


def timelines(inputs: ReportInputs) -> str:
    html = ""
    for run in inputs.runs:
        moments, number = timeline(run)
        chart = _over_time(run)
        if not (moments or chart):
            continue
        html += f"<h3>{escape(run.name)}</h3>" if len(inputs.runs) > 1 else ""
        rows = [
            [
                escape(moment.when),
                "" if moment.step is None else f"{moment.step:,}",
                escape(moment.kind),
                escape(moment.words),
            ]
            for moment in moments
        ]
        html += block("charts wide", [chart]) if chart else ""
        left_out = f"The newest of {number} moments." if len(moments) < min(number, 80) else ""
        html += (
            table(["time", "step", "what", ""], rows, "moments") + (note(left_out) if left_out else "") if rows else ""
        )
    if not html:
        raise LeftOut("Nothing happened yet: fewer than two rows, no events.jsonl and no bad_updates.jsonl.")
    return html


def _over_time(run: RunInputs) -> str:
    times = run.columns["time"]
    if len(times) < 2:
        return ""
    start = float(times.values[0])
    hours = (times.values - start) / 3600
    unit, hours = ("hours", hours) if hours[-1] >= 2 else ("minutes", 60 * hours)
    starts = [event.get("time") for event in run.events if event.get("kind") == "start"]
    scale = 3600 if unit == "hours" else 60
    marks = [(at - start) / scale for at in starts if isinstance(at, int | float) and at > start]
    chart = Chart(
        "Steps over time", f"{unit} since the first row; dashed: started again", "zero", over=unit, marks=marks[:50]
    )
    return draw_chart(chart, [Curve("", hours, times.steps, dotted=True)])


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
