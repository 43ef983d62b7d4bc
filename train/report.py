"""Report runs in one HTML file: health, curves, where time went, scores, pictures, config. The file needs no network.

One run, or several side by side: run=A run=B. Sections without data say why they are empty, so a run in progress can be
reported too.
"""

import shlex
import time
from html import escape
from pathlib import Path

from data.durable import atomic_write
from data.strict_json import dumps
from train.config import load_config, run_program
from train.evaluation.texts import OTHER_FORM
from train.pages.page import document
from train.pages.report_inputs import LeftOut, ReportConfig, ReportInputs, RunInputs, gather
from train.pages.report_sections import SECTIONS

CONFIG = ReportConfig
GATHERED = ("run", "evaluation")  # may be given several times


def main(argv: list[str]) -> None:
    config = load_config(CONFIG, gathered(argv))
    inputs = gather(config, shlex.join(["python", "-m", "train.report", *argv]))
    sections: list[tuple[str, str, str]] = []
    left_out: dict[str, str] = {}
    for name, title, write in SECTIONS:
        try:
            inside = write(inputs)
        except LeftOut as reason:
            left_out[title] = str(reason)
            continue
        except OTHER_FORM as error:  # a file was damaged, or another version wrote it: the other sections stand
            left_out[title] = f"A number or text that it shows has another form than expected: {error!r}."
            continue
        sections.append((name, title, inside))
    if left_out:
        sections.insert(-1, ("absent", "Left out", _listed(left_out)))
    output = Path(config.output or f"{config.run[0]}/report.html")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(document(config.title, _progress(inputs), sections).encode(errors="replace"))
    print(f"report: wrote {output}, {output.stat().st_size / 1e6:.2f} MB")
    for name, verdict in inputs.verdicts.items():
        print(f"report: {name} is {verdict.words}")
    for line in [f"left out {title}: {reason}" for title, reason in left_out.items()] + inputs.unreadable:
        print(f"report: {line}")


def _listed(left_out: dict[str, str]) -> str:
    """Return each section that has nothing to show, and why."""
    rows = [f"<li><b>{escape(title)}</b> {escape(reason)}</li>" for title, reason in left_out.items()]
    return f'<ul class="absent">{"".join(rows)}</ul>'


def gathered(argv: list[str]) -> list[str]:
    """Return the arguments with run=A run=B as run=[A,B], and evaluation= likewise; a list replaces those before it.

    `--resolve` reads them so too (train/config.py).
    """
    kept = [argument for argument in argv if argument.partition("=")[0] not in GATHERED]
    for key in GATHERED:
        given = [value for name, _, value in (argument.partition("=") for argument in argv) if name == key]
        if len(given) > 1 and not any(value.startswith("[") for value in given):
            given = [dumps(given, ensure_ascii=False)]
        kept += [f"{key}={value}" for value in given]
    return kept


def _progress(inputs: ReportInputs) -> dict[str, str]:
    """Return the header's facts: how far each run is, and when the report was made."""
    facts: dict[str, str] = {}
    for i, run in enumerate(inputs.runs):
        letter = f"{chr(65 + i)} " if len(inputs.runs) > 1 else ""
        facts[f"{letter}run"] = str(run.folder)
        if len(inputs.runs) == 1:
            facts |= _facts_of(run)
        elif (step := run.columns.last("step")) is not None:
            facts[f"{letter}run"] += f", step {int(step):,}"
    return facts | {"reported": time.strftime("%Y-%m-%d %H:%M")}


def _facts_of(run: RunInputs) -> dict[str, str]:
    step, steps = run.columns.last("step"), run.setting("optim.steps")
    if step is None:
        return {}
    facts = {"step": f"{int(step):,}" + (f" of {steps:,}" if isinstance(steps, int) else "")}
    names = {"images_seen": "pictures seen", "tokens_seen": "tokens seen", "epoch_mean": "epoch"}
    for key, name in names.items():
        if (value := run.columns.last(key)) is not None:
            facts[name] = f"{value:,.2f}" if key == "epoch_mean" else f"{int(value):,}"
    return facts


if __name__ == "__main__":
    run_program(main)
