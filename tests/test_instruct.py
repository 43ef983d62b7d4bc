"""The demo's model is taught edits and answers by the commands of configs/instruct, at toy length (slow)."""

import json
import shlex
from pathlib import Path

import pytest

from data.scene_edits import KINDS
from data.scene_questions import KINDS as QUESTION_KINDS
from train.demo import HERE, STAGES, DemoConfig, _run

ENCODE = "inputs=[runs/instruct/scenes/{0}] output=runs/instruct/latents/{0}"
COMMANDS = {  # program -> ranks and what makes it short, for each call
    "scenes": [(1, "num_edits=60 num_questions=40 num_heldout_edits=40 num_heldout_questions=40 processes=1")],
    "encode": [(1, ENCODE.format("edits")), (1, ENCODE.format("questions"))],
    "pretrain": [(2, "optim.steps=4 optim.warmup_steps=1 checkpoint.interval_steps=2 log.interval_steps=1")],
    "evaluate": [(2, "steps=2 max_prompts=1")],
    "sample": [(1, "steps=2")],
}


@pytest.mark.slow
def test_the_demos_model_is_taught_edits_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured in docs/instruct.md, with real programs and ranks; it learns nothing in four steps."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = DemoConfig(root=str(tmp_path), smoke=True, ranks=1)
    for stage in STAGES[: 1 + [stage.name for stage in STAGES].index("pretrain")]:
        assert _run(stage.command(config), tmp_path) == 0
    for program, calls in COMMANDS.items():
        for ranks, settings in calls:
            launcher = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else ["python"]
            command = [*launcher, "-m", f"train.{program}", f"config={HERE}/configs/instruct/{program}.yaml"]
            assert _run([*command, *shlex.split(settings)], tmp_path) == 0
    folder = tmp_path / "runs" / "instruct"
    rows = [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "text_loss" in row] == [1, 2, 3, 4]
    scores = json.loads((folder / "evaluation" / "evaluation.json").read_text())["scores"]
    names = {f"edits/{name}" for name in ("all", "unchanged", *KINDS)}
    assert names | {f"questions/{name}" for name in ("all", *QUESTION_KINDS)} <= set(scores)
    samples = [json.loads(line) for line in (folder / "samples" / "results.jsonl").read_text().splitlines()]
    kinds = [[key for part in sample["output"] for key in part] for sample in samples]
    assert [("image" in kind) for kind in kinds] == [True] * 5 + [False]
