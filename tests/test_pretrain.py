"""The training program as people and schedulers meet it: killed, stopped, resumed, refused, starved, out of disk."""

import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenizer import Tokenizer, train_tokenizer
from tests.runs import (
    SAVE_EVERY,
    STEPS,
    assert_same_end,
    finish,
    launch,
    numbers,
    reached,
    rows,
    saved_state,
    saved_steps,
    settings,
    wait_for,
)
from tests.sources import make_source, pairs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def sources(pairs_folder: Path, texts_folder: Path) -> dict[str, Path]:
    return {"pairs": pairs_folder, "texts": texts_folder}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, sources: dict[str, Path]) -> Path:
    """A run on two ranks that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(settings(run_dir, tokenizer, sources), 2)
    return run_dir


def test_a_run_reaches_its_end_and_leaves_what_it_promised(undisturbed: Path) -> None:
    """A row for each step, the last two checkpoints, the resolved config, and nothing half-written."""
    assert [row["step"] for row in rows(undisturbed)] == list(range(1, STEPS + 1))
    assert saved_steps(undisturbed) == [STEPS // SAVE_EVERY * SAVE_EVERY, STEPS]
    assert (undisturbed / "config.yaml").read_text().startswith(f"run_dir: {undisturbed}")
    names = {str(path.relative_to(undisturbed)) for path in undisturbed.rglob("*") if path.is_file()}
    assert not [name for name in names if "tmp" in name or name.endswith(".new")]
    first, last = rows(undisturbed)[0], rows(undisturbed)[-1]
    assert last["text_loss"] < first["text_loss"] and last["skipped_documents"] == 0


def test_killed_at_any_instant_a_run_ends_with_the_same_bits(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """P4, P5: `kill -9` of all ranks during the start, steps, saves and commits; every step is logged once, and each
    checkpoint that has its name verifies whenever one looks."""
    run_dir, luck = tmp_path / "run", random.Random(4)
    argv = settings(run_dir, tokenizer, sources)
    checkpoints = run_dir / "checkpoints"

    def saving() -> bool:
        return any(checkpoints.glob(".tmp-step-*/__*"))

    def newly_saved(after: int) -> bool:
        return any(checkpoints.glob(f"step-*{after + SAVE_EVERY:02d}"))

    instants = [
        lambda: time.monotonic() > started + 2.0 * luck.random(),  # wherever that is
        saving,
        reached(run_dir, 8),
        lambda: newly_saved(5),
        saving,
        reached(run_dir, STEPS - 2),
    ]
    for instant in instants:
        started = time.monotonic()
        with launch(argv, 2) as run:
            wait_for(instant, run)
            time.sleep(0.03 * luck.random())
            run.signal(signal.SIGKILL)
            run.wait()
        saved_steps(run_dir)
    output = finish(argv, 2)
    assert "from " in output and "from scratch" not in output
    assert numbers(run_dir) == numbers(undisturbed)
    assert_same_end(run_dir, undisturbed)
    assert not list(checkpoints.glob(".*"))


def test_a_run_resumed_on_other_numbers_of_ranks_meets_the_same_batches(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], undisturbed: Path
) -> None:
    """P3, P4, P6: 2 ranks, stopped by SIGTERM, then 1, stopped by SIGUSR1, then 3; losses as if nothing had been."""
    run_dir = tmp_path / "run"
    argv = settings(run_dir, tokenizer, sources)
    for world_size, until, number in [(2, 6, signal.SIGTERM), (1, 12, signal.SIGUSR1)]:
        with launch(argv, world_size) as run:
            wait_for(reached(run_dir, until), run)
            before = len(rows(run_dir))
            run.signal(number, rank=world_size - 1)
            assert run.wait() == [75] * world_size, run.output
            assert f"after step {saved_steps(run_dir)[-1]}; saved" in run.output
        assert rows(run_dir)[-1]["step"] == saved_steps(run_dir)[-1] <= before + 3, "within a step"
    finish(argv, 3)
    for found, expected in zip(numbers(run_dir), numbers(undisturbed), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    (_, lanes, meta), (_, expected_lanes, expected_meta) = saved_state(run_dir), saved_state(undisturbed)
    assert (lanes, meta) == (expected_lanes, expected_meta)


def test_stopped_started_again_prolonged_and_refused(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P6, P10: the life of one run, started directly: Ctrl-C is 130 and a second start goes on, SIGUSR2 is 75, a
    finished run does nothing, more steps go on; rate and intervals may change, what decides the batches may not."""
    run_dir = tmp_path / "run"
    argv = settings(run_dir, tokenizer, sources, optim__steps=30, log__interval_steps=4)

    def changed(**changes: Any) -> list[str]:
        return [*argv, *(f"{name.replace('__', '.')}={value}" for name, value in changes.items())]

    for number, status, after in [(signal.SIGINT, 130, 4), (signal.SIGUSR2, 75, 12)]:
        with launch(argv, None) as run:
            wait_for(reached(run_dir, after), run)
            run.signal(number)
            assert run.wait() == [status], run.output
        stopped = saved_steps(run_dir)[-1]
        assert f"stopped by {signal.Signals(number).name} after step {stopped}; saved" in run.output
        last = rows(run_dir)[-1]
        assert (last["step"], last["interval_steps"]) == (stopped, stopped % 4 or 4), "no step is left out of the rows"
    finish(changed(optim__learning_rate=5e-4, checkpoint__keep_last=1), None)
    assert sum(row["interval_steps"] for row in rows(run_dir)) == 30
    assert saved_steps(run_dir) == [30]

    before = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
    assert "done after step 30" in finish(argv, None)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(rows(run_dir)) == len({row["step"] for row in rows(run_dir)})

    assert "from " in finish(changed(optim__steps=33), None)
    assert saved_steps(run_dir) == [30, 33]

    refusals = {
        "seed was 0, is 1": changed(seed=1),
        "lanes was 5, is 4": changed(data__lanes=4),
        "sequence_length was 64, is 80": changed(data__sequence_length=80),
        "shuffle_block was 8, is 9": changed(data__shuffle_block=9),
        "model.transformer.heads was 2, is 4": changed(model__transformer__heads=4),
        "model.transformer.rope_theta was 10000.0, is 500.0": changed(model__transformer__rope_theta=500),
        "diffusion.prediction was eps, is v": changed(diffusion__prediction="v"),
        "order was": changed(data__order__caption_first=0.5),
        "sources was": [a for a in argv if "texts" not in a],
    }
    state = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and "attempt" not in path.name}
    _assert_refused(refusals)
    for path, content in state.items():
        assert path.read_bytes() == content or path.name == ".lock", f"{path} was touched"


def _assert_refused(expected: dict[str, list[str]], world_size: int | None = None) -> None:
    """Each start, all side by side, exits 2 with the words in its one message and without a traceback."""
    with ExitStack() as stack:
        runs = {words: stack.enter_context(launch(argv, world_size)) for words, argv in expected.items()}
        statuses = {words: run.wait() for words, run in runs.items()}
        for words, run in runs.items():
            for log in run.logs:
                message = [line for line in log.read_text().splitlines() if "Warning" not in line]
                assert len(message) == 1 and "train.pretrain: " in message[0] and words in message[0], (words, message)
            assert set(statuses[words]) == {2}, (words, statuses, run.output)


def test_what_cannot_work_is_refused_before_it_starts(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P10: config, folders, data, devices; one message each, exit 2, no traceback, no run folder where none is needed."""
    other_vae = make_source(tmp_path / "other_vae", tokenizer, pairs(8), vae_hash="b" * 16)
    other_tokenizer = tmp_path / "other.model"
    train_tokenizer((f"green triangles, {i} of them, small or large" for i in range(200)), other_tokenizer, 290)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()

    def changed(**changes: Any) -> list[str]:
        return settings(tmp_path / f"run{len(changes)}-{next(iter(changes))}", tokenizer, sources, **changes)

    refusals = {
        "unknown key 'optim.step'; did you mean 'optim.steps'?": changed(optim__step=3),
        "optim.steps: Value 'many'": changed(optim__steps="many"),
        "optim.steps=0": changed(optim__steps=0),
        "run_dir is required": [a for a in changed(seed=0) if "run_dir" not in a]
        + ["config=" + str(tmp_path / "c.yaml")],
        f"run folder {tmp_path}/file/run is not writable": settings(tmp_path / "file" / "run", tokenizer, sources),
        f"data folder {tmp_path}/nowhere does not exist": changed(data__sources__more__path=tmp_path / "nowhere"),
        f"data folder {tmp_path}/empty has no manifest.json": changed(data__sources__more__path=tmp_path / "empty"),
        "holds latents of VAE bbbb": changed(data__sources__more__path=other_vae),
        "was encoded with tokenizer": changed(data__tokenizer=other_tokenizer),
        "set model.latent_channels=2": changed(model__latent_channels=4),
        "fewer than data.lanes=55": changed(data__lanes=55),
        "more than data.sequence_length=11": changed(data__sequence_length=11),
        "no VAE: set vae=FOLDER": changed(preview__interval_steps=1, preview__prompts="[a circle]"),
        "preview.interval_steps": changed(preview__interval_steps=1),
    }
    if not torch.cuda.is_available():
        refusals["device=cuda, but torch finds no CUDA device"] = changed(device="cuda")
    (tmp_path / "c.yaml").write_text("seed: 1\n")
    _assert_refused(refusals)
    assert not list(tmp_path.glob("run*/checkpoints/*")) and not list(tmp_path.glob("run*/metrics.jsonl"))


def test_what_only_some_ranks_could_notice_is_refused_by_all_without_a_hang(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P10: more ranks than lanes; previews that only rank 0 would draw; a folder that only rank 0 would write."""
    (tmp_path / "file").write_text("")
    _assert_refused(
        {
            "3 ranks, but data.lanes=2": settings(tmp_path / "lanes", tokenizer, sources, data__lanes=2),
            "no VAE: set vae=FOLDER": settings(
                tmp_path / "vae", tokenizer, sources, preview__interval_steps=1, preview__prompts="[a circle]"
            ),
            f"run folder {tmp_path}/file/run is not writable": settings(tmp_path / "file" / "run", tokenizer, sources),
        },
        world_size=3,
    )
