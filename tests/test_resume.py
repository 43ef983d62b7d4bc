"""Where a run starts: auto, none, back to a step, from another run; the same command again continues (P4, P10)."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.manifest import Manifest
from data.tokenizer import Tokenizer
from tests import runs
from tests.encoding.jobs import arguments, picture_record, raw_folder
from tests.runs import SAVE_EVERY, STEPS, DrawingRun
from tests.sources import make_source, pairs
from train import export
from train.checkpoints import checkpoint
from train.checkpoints.resume import find_resume_point
from train.checkpoints.run_folder import RunFolder
from train.distributed.ranks import alone
from train.encode import main as encode_main
from train.inference.saved_model import stored_records


@pytest.fixture
def twin(tmp_path: Path, undisturbed: Path) -> Path:
    """A copy of the finished run, with checkpoints of two steps."""
    return Path(shutil.copytree(undisturbed, tmp_path / "twin"))


def test_a_run_goes_back_to_a_step_once_and_what_it_leaves_is_put_aside(
    twin: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """Back from 24 to 20 and again to 24, by path or by number; the same command again continues instead."""
    first = runs.saved_steps(twin)[0]
    path = twin / "checkpoints" / f"step-{first:08d}"
    argv = [*runs.settings(twin, tokenizer, sources), f"resume={path}", "checkpoint.keep_last=5"]
    said = runs.finish(argv, 2)
    assert f"from {path}, going back as resume= says" in said
    assert runs.numbers(twin) == runs.numbers(undisturbed)
    assert runs.saved_steps(twin) == [first, STEPS]
    (aside,) = twin.glob("abandoned-*")
    assert {path.name for path in aside.iterdir()} == {f"step-{STEPS:08d}", "metrics.jsonl"}
    assert len(runs.rows(aside)) == STEPS
    again = runs.finish([*argv, f"resume={first}", f"optim.steps={STEPS + 2}"], 2)
    assert "the run continues from there" in again and "going back as resume= says" not in again
    assert runs.saved_steps(twin) == [first, STEPS, STEPS + 1, STEPS + 2]
    assert len(list(twin.glob("abandoned-*"))) == 1


def test_what_resume_asks_for_and_is_not_there_is_refused(
    twin: Path, tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P10: one message with what is there; and nothing is touched."""
    steps = runs.saved_steps(twin)
    (twin / "checkpoints" / f"step-{steps[0]:08d}" / "meta.json").write_text("{}")
    argv = runs.settings(twin, tokenizer, sources)
    fresh = runs.settings(tmp_path / "fresh", tokenizer, sources)
    runs.assert_refused(([*fresh, f"resume={tmp_path}/nowhere"], [f"resume={tmp_path}/nowhere", "a path that exists"]))
    runs.assert_refused(([*argv, "resume=7"], ["resume=7", "expected one of 20, 24"]))
    runs.assert_refused(([*argv, f"resume={steps[0]}"], [f"resume={steps[0]}", "is damaged", "meta.json"]))
    runs.assert_refused(([*argv, "resume=none"], ["resume=none", "holds 2 checkpoints", "give another run_dir"]))


def test_a_run_begun_from_another_runs_checkpoint_ends_with_the_same_bits(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """Started again it continues from its own, even if the other run is gone."""
    run_dir, other = tmp_path / "fork", Path(shutil.copytree(undisturbed, tmp_path / "other"))
    path = other / "checkpoints" / f"step-{STEPS // SAVE_EVERY * SAVE_EVERY:08d}"
    argv = [*runs.settings(run_dir, tokenizer, sources), f"resume={path}"]
    assert f"from {path}" in runs.finish(argv, 2)
    runs.assert_same_end(run_dir, undisturbed)
    assert [row["step"] for row in runs.rows(run_dir)] == list(range(STEPS // SAVE_EVERY * SAVE_EVERY + 1, STEPS + 1))
    shutil.rmtree(other)
    assert "done after step 24" in runs.finish(argv, 2)


def test_a_continuation_is_known_by_what_its_checkpoints_say(twin: Path) -> None:
    """Not by their number: later checkpoints of the abandoned course do not count as having gone back."""
    with RunFolder(twin, alone()) as folder:
        first, last = runs.saved_steps(twin)
        meta = json.loads((twin / "checkpoints" / f"step-{last:08d}" / "meta.json").read_text())
        assert meta["back_to"] is None
        assert find_resume_point("auto", folder, alone()).checkpoint.name == f"step-{last:08d}"
        assert find_resume_point(str(last), folder, alone()).back_to == last
        origin = find_resume_point(str(first), folder, alone())
        assert (origin.back_to, origin.checkpoint.name) == (first, f"step-{first:08d}")


def test_a_run_begins_with_the_weights_of_a_checkpoint_or_of_an_export_and_nothing_else(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path, drawn: DrawingRun
) -> None:
    """Other data, seed and schedule, from step 0; bit for bit the stored weights, on ranks that hold shards."""
    export.main([f"checkpoint={drawn.run_dir}", f"output={tmp_path / 'export'}", "weights=ema"])
    path = undisturbed / "checkpoints" / f"step-{STEPS:08d}"
    starts = [
        (undisturbed, "model", [f"init_from={undisturbed}", "init_weights=model"]),
        (undisturbed, "ema-7", [f"init_from={path}", "init_weights=ema"]),
        (drawn.run_dir, "ema-7", [f"init_from={tmp_path / 'export'}", "init_weights=auto"]),
    ]
    for number, (origin, kind, start) in enumerate(starts):
        run_dir = tmp_path / f"run{number}"
        still = {"optim__learning_rate": 0, "optim__min_learning_rate": 0, "optim__ema_half_lives": "[]"}
        argv = runs.settings(run_dir, tokenizer, {"texts": sources["texts"]}, seed=5, optim__steps=1, **still)
        assert f"from the weights ({kind}) of " in runs.finish([*argv, *start], 1 + (number == 0))
        (tensors, _, meta), (kept, _, _) = runs.saved_state(run_dir), runs.saved_state(origin)
        assert meta["progress"]["step"] == 1
        for name in [name for name in tensors if name.startswith("model.")]:
            assert torch.equal(tensors[name], kept[name.replace("model", kind, 1)]), (kind, name)
    assert "done after step 1" in runs.finish([*argv, "init_from=/nowhere"], 1), "its own checkpoint counts now"
    wide = runs.settings(tmp_path / "wide", tokenizer, sources, model__transformer__width=64)
    wide += [f"init_from={undisturbed}", "init_weights=model"]
    runs.assert_refused((wide, ["does not fit", "model.text_head.weight is [300, 32]"]))


def _whitened_differently(folder: Path, copy: Path) -> Path:
    """Return a copy of a data set whose latents are divided by three times as much."""
    manifest = Manifest.load(shutil.copytree(folder, copy))
    spec = manifest.latent_spec
    replace(manifest, latent_spec=replace(spec, std=tuple(3 * std for std in spec.std))).save()
    return copy


def test_weights_meet_no_latents_whitened_differently_and_the_remedy_works(
    tmp_path: Path, tokenizer: Tokenizer, vae_folder: Path, drawn: DrawingRun
) -> None:
    """P10: as the start of a run and on a resume, which names the stored statistics and not the way into the trap."""
    raw, latents = raw_folder(tmp_path / "raw", {"a": [picture_record(n) for n in range(12)]}), tmp_path / "latents"
    encode_main(arguments(raw, latents, tokenizer, vae=vae_folder))
    new = runs.settings(tmp_path / "new", tokenizer, {"pairs": latents}, optim__steps=1)
    export.main([f"checkpoint={drawn.run_dir}", f"output={tmp_path / 'export'}"])
    words = ["whitened differently: latent mean was [0.0, 0.0], is [", "stats_from="]
    starts = [([*new, f"init_from={drawn.run_dir}"], words)]
    starts.append(([*new, f"init_from={tmp_path / 'export'}", f"run_dir={tmp_path / 'other'}"], words))
    scaled = _whitened_differently(drawn.data, tmp_path / "scaled")
    resumed = [*drawn.argv, f"run_dir={shutil.copytree(drawn.run_dir, tmp_path / 'again')}", "log.wandb=disabled"]
    resume = [*resumed, f"data.sources.pairs.path={scaled}"]
    words = ["latent std was [1.0, 1.0], is [3.0, 3.0]", "again with stats_from=", "alone. (Learning rate"]
    starts.append((resume, words))
    runs.assert_refused(*starts)
    for stored in (drawn.run_dir, tmp_path / "export", checkpoint.saved(drawn.run_dir / "checkpoints")[-1]):
        encode_main(arguments(raw, latents, tokenizer, vae=vae_folder, stats_from=stored))
        assert Manifest.load(latents).latent_spec.std == (1.0, 1.0)
    warned = runs.finish([*new, f"init_from={tmp_path / 'export'}", "diffusion.prediction=v"], None)
    assert "trained with different settings: diffusion.prediction was eps, is v" in warned
    carried = stored_records(checkpoint.saved(tmp_path / "new" / "checkpoints")[-1])
    for name, folder in (("now", latents), ("before", drawn.data)):
        with pytest.raises(ValueError, match=f"held-out source {name}: 100 %"):
            carried.check({name: str(folder)}, alone())


def test_data_that_is_added_later_changes_nothing_before_and_counts_from_its_step(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P3, P10: appended on a resume, or there from the start with weight 0 until then: the same bits; and not between
    the others, nor with a weight in the past."""
    more = make_source(tmp_path / "more", tokenizer, pairs(40, seed=55))
    later = [f"data.sources.more.path={more}", "data.sources.more.weight=0", "data.sources.more.weight_from={12: 2}"]
    one, two = tmp_path / "one", tmp_path / "two"
    runs.finish([*runs.settings(one, tokenizer, sources), *later], 1)
    argv = runs.settings(two, tokenizer, sources)
    with runs.launch(argv, 1) as run:
        runs.wait_for((two / "checkpoints" / "step-00000010").exists, run)
        run.signal(signal.SIGKILL)
    for path in two.glob("checkpoints/step-*"):
        if path.name > "step-00000010":
            shutil.rmtree(path)
    past = [*argv, *later[:2], "data.sources.more.weight_from={9: 2}"]
    runs.assert_refused((past, ["source 2 was absent, is ", "2.0 from step 9", "weight_from={11: "]))
    between = [*runs.settings(two, tokenizer, {"a": more, **sources}), "data.sources.a.weight=0"]
    runs.assert_refused(([*between, "data.sources.a.weight_from={12: 2}"], ["source 0 was ", "is absent"]))
    runs.finish([*argv, *later], 1)
    assert runs.numbers(one) == runs.numbers(two)
    runs.assert_same_end(one, two)
    assert all(state["cursors"][2] != [0, 0, 0] for state in runs.saved_state(one)[1].values())
