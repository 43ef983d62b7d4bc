"""Report a run in one HTML file: scores, curves, pictures, failures, config. The file needs no network.

Sections without data say why they are empty, so a run in progress can be reported too.
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


def main(argv: list[str]) -> None:
    config = load_config(CONFIG, argv)
    inputs = gather(config, shlex.join(["python", "-m", "train.report", *argv]))
    sections, left_out = [], []
    for name, title, write in SECTIONS:
        try:
            inside = write(inputs)
        except LeftOut as reason:
            inside = f'<p class="absent">{escape(str(reason))}</p>'
            left_out.append(f"left out {title}: {reason}")
        sections.append((name, title, inside))
    output = Path(config.output or f"{config.run}/report.html")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(document(config.title, _progress(inputs), sections).encode())
    print(f"report: wrote {output}, {output.stat().st_size / 1e6:.2f} MB")
    for line in left_out + inputs.unreadable:
        print(f"report: {line}")


def _progress(inputs: ReportInputs) -> dict[str, str]:
    """Return the header's facts: how far the run is, and when the report was made."""
    facts = {"run": inputs.config.run}
    if inputs.rows:
        row = inputs.rows[-1]
        steps = inputs.recipe.optim.steps if inputs.recipe else None
        facts["step"] = f"{row['step']:,}" + (f" of {steps:,}" if steps else "")
        names = {"images_seen": "pictures seen", "tokens_seen": "tokens seen", "epoch_mean": "epoch"}
        names |= {"skipped_updates": "skipped updates", "skipped_documents": "skipped documents"}
        facts |= {name: f"{round(row[key], 2):,}" for key, name in names.items() if key in row}
    return facts | {"reported": time.strftime("%Y-%m-%d %H:%M")}


if __name__ == "__main__":
    run_program(main)
