"""Report a run in one HTML file: scores, curves, pictures, failures, config. Nothing in it needs the network.

Whatever is not there yet is left out with a sentence that says why, so a run in progress can be reported too.
"""

import shlex
import time
from html import escape
from pathlib import Path

from data.durable import atomic_write
from train.config import load_config, run_program
from train.pages.page import document
from train.pages.report_inputs import ReportConfig, ReportInputs, gather
from train.pages.report_sections import SECTIONS, LeftOut

CONFIG = ReportConfig


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    findings = gather(config, shlex.join(["python", "-m", "train.report", *argv]))
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    page, left_out = render(findings)
    with atomic_write(output) as file:
        file.write(page.encode())
    print(f"report: wrote {output}, {output.stat().st_size / 1e6:.2f} MB")
    for line in [f"left out {reason}" for reason in left_out] + findings.unreadable:
        print(f"report: {line}")


def render(findings: ReportInputs) -> tuple[str, list[str]]:
    """Return the page, and what it leaves out with the reason of each."""
    sections, left_out = [], []
    for name, title, write in SECTIONS:
        try:
            inside = write(findings)
        except LeftOut as reason:
            inside = f'<p class="absent">{escape(str(reason))}</p>'
            left_out.append(f"{title}: {reason}")
        sections.append((name, title, inside))
    return document(findings.config.title, _progress(findings), sections), left_out


def _progress(findings: ReportInputs) -> dict[str, str]:
    """Return what the header says: how far the run is and when it was looked at."""
    facts = {"run": findings.config.run}
    if findings.rows:
        row = findings.rows[-1]
        steps = findings.recipe.optim.steps if findings.recipe else None
        facts["step"] = f"{row['step']:,}" + (f" of {steps:,}" if steps else "")
        names = {"images_seen": "pictures seen", "tokens_seen": "tokens seen", "epoch_mean": "epoch"}
        names |= {"skipped_updates": "skipped updates", "skipped_documents": "skipped documents"}
        facts |= {name: f"{round(row[key], 2):,}" for key, name in names.items() if key in row}
    return facts | {"reported": time.strftime("%Y-%m-%d %H:%M")}


if __name__ == "__main__":
    run_program(main)
