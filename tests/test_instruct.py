"""The demo's best model is taught edits and answers by the commands of configs/instruct, at toy length (slow)."""

import json
import shlex
from pathlib import Path

import pytest

from data.scene_edits import KINDS
from data.scene_questions import KINDS as QUESTION_KINDS
from train.demo import HERE, STAGES, DemoConfig, _run

STEPS = "optim.steps=4 optim.warmup_steps=1 checkpoint.interval_steps=2 log.interval_steps=1"
SCENES = "scenes output=runs/demo/scenes-{0} two_shapes_share={1} num_train=60 processes=1"
PART = "inputs=[runs/demo/scenes-{0}/train] output=runs/demo/pixels/scenes-{0}/train"
PIXELS = f"encode config=demo/encode.yaml vae=pixels {PART}"
ENCODE = "encode config=instruct/encode.yaml inputs=[runs/instruct/scenes/{0}] output=runs/instruct/pixels/{0}"
COMMANDS = (  # those in the headers of configs/best/demo.yaml and configs/instruct, with what makes them short
    SCENES.format("ones", 0),
    SCENES.format("pairs", 1),
    PIXELS.format("ones"),
    PIXELS.format("pairs"),
    f"pretrain config=demo/pretrain.yaml config=best/demo.yaml preview.interval_steps=null {STEPS}",
    "scenes config=instruct/scenes.yaml num_edits=60 num_questions=40 processes=1",
    "scenes config=instruct/heldout.yaml num_heldout_edits=40 num_heldout_questions=40 processes=1",
    ENCODE.format("edits"),
    ENCODE.format("questions"),
    f"pretrain config=instruct/pretrain.yaml {STEPS}",
    "evaluate config=instruct/evaluate.yaml steps=2 max_prompts=1",
    "sample config=instruct/sample.yaml steps=2",
)


@pytest.mark.slow
def test_the_demos_best_model_is_taught_edits_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured in docs/instruct.md, with real programs and ranks; it learns nothing in four steps."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = DemoConfig(root=str(tmp_path), smoke=True, ranks=1)
    for stage in STAGES[: 1 + [stage.name for stage in STAGES].index("encode text")]:
        assert _run(stage.command(config), tmp_path) == 0
    for words in COMMANDS:
        program, *rest = shlex.split(words.replace("config=", f"config={HERE}/configs/"))
        launcher = ["torchrun", "--nproc-per-node", "2"] if program in ("pretrain", "evaluate") else ["python"]
        assert _run([*launcher, "-m", f"train.{program}", *rest], tmp_path) == 0
    folder = tmp_path / "runs" / "instruct"
    rows = [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "text_loss" in row] == [1, 2, 3, 4]
    scores = json.loads((folder / "evaluation" / "evaluation.json").read_text())["scores"]
    names = {f"edits/{name}" for name in ("all", "unchanged", *KINDS)}
    assert names | {f"questions/{name}" for name in ("all", *QUESTION_KINDS)} <= set(scores)
    samples = [json.loads(line) for line in (folder / "samples" / "results.jsonl").read_text().splitlines()]
    kinds = [[key for part in sample["output"] for key in part] for sample in samples]
    assert [("image" in kind) for kind in kinds] == [True] * 5 + [False]
