"""The sampling program: pictures, captions and a sheet, or one clear message."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.pictures import encode_png
from tests.ranks import ProgramRanks
from tests.runs import PROMPTS, DrawingRun
from train import sample


def _argv(drawn: DrawingRun, output: Path) -> list[str]:
    quick = ["sampler=ddim", "steps=2", "max_new_tokens=4", "device=cpu"]
    return [f"checkpoint={drawn.run_dir}", f"output={output}", *quick]


def test_prompts_become_pictures_and_pictures_captions(drawn: DrawingRun, tmp_path: Path) -> None:
    """`n` of each prompt, from the line, the list and the file; every result has a line that names how it was made."""
    given = tmp_path / "given.png"
    given.write_bytes(encode_png(np.full((48, 40, 3), 200, np.uint8)))
    (tmp_path / "prompts.txt").write_text("a circle\n\n  a square \n")
    output = tmp_path / "output"
    argv = [*_argv(drawn, output), "n=2", "seed=4", f"pictures=[{given}]", f"prompts_file={tmp_path / 'prompts.txt'}"]
    argv += [f"prompt={PROMPTS[0]}", f"prompts={json.dumps(PROMPTS[1:])}"]
    with ProgramRanks(sample.main, argv, None, tmp_path / "log") as run:
        assert run.wait() == [0], run.output
    results = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    prompts = [prompt for prompt in (*PROMPTS, "a circle", "a square") for _ in range(2)]
    assert [result.get("prompt") for result in results] == [*prompts, None]
    assert all(result["seed"] == 4 and result["step"] == 6 for result in results)
    assert results[-1]["picture"] == str(given) and isinstance(results[-1]["caption"], str)
    pictures = [np.asarray(Image.open(output / result["picture"])) for result in results[:-1]]
    assert all(picture.shape == (32, 32, 3) for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1]), "two of one prompt differ"
    assert Image.open(output / "sheet.png").size[0] > 5 * 32
    assert not list(output.glob("*tmp*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ([], "nothing to do"),
        (["prompt=x", "n=0"], "n=0"),
        (["prompt=x", "checkpoint=/nowhere"], "neither a checkpoint nor a run folder"),
        (["prompt=x", "vae=/nowhere"], "no such folder"),
        (["pictures=[/nowhere.png]"], "nowhere.png"),
        (["pictures=[BROKEN]"], "broken.png"),
        (["prompt=x", "weights=best"], "weights"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_message(
    drawn: DrawingRun, tmp_path: Path, change: list[str], words: str
) -> None:
    """P10."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    argv = [argument.replace("BROKEN", str(tmp_path / "broken.png")) for argument in change]
    with ProgramRanks(sample.main, [*_argv(drawn, tmp_path / "output"), *argv], None, tmp_path / "log") as run:
        assert run.wait() == [2], run.output
    lines = [line for line in run.output.splitlines() if "train.sample: " in line]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in run.output, run.output
