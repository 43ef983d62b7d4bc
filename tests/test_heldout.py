"""A run that measures itself on held-out data: the same training, stopped at once (P6)."""

import shutil
import signal
from pathlib import Path

import pytest

from data.manifest import Manifest
from data.tokenizer import Tokenizer
from tests import runs
from tests.sources import make_source, pairs, texts
from train.config import load_config
from train.distributed.ranks import alone
from train.heldout import KINDS, Heldout, HeldoutConfig
from train.pretrain_config import PretrainConfig


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_source(tmp_path_factory.mktemp("heldout") / "pairs", tokenizer, pairs(60, seed=77))


def _measured(run_dir: Path) -> dict[int, tuple[float, ...]]:
    names = [f"heldout/pairs/{kind}" for kind in KINDS]
    return {row["step"]: tuple(row[name] for name in names) for row in runs.rows(run_dir) if names[0] in row}


def test_a_run_measures_itself_and_trains_the_same(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], heldout: Path, undisturbed: Path
) -> None:
    """Bit for bit; and the best checkpoint by the metric is kept in addition to the last."""
    best = {"checkpoint__keep_last": 1, "checkpoint__keep_best": 1, "checkpoint__interval_steps": 6}
    best |= {"checkpoint__best_metric": "heldout/pairs/x0_error", "optim__learning_rate": 0.1, "evaluation__ema": False}
    argv = runs.settings(
        tmp_path / "worse", tokenizer, sources, evaluation__interval_steps=6, evaluation__heldout__pairs=heldout
    )
    runs.finish([*argv, *(f"{name.replace('__', '.')}={value}" for name, value in best.items())], 1)
    losses = {step: x0 for step, (*_, x0) in _measured(tmp_path / "worse").items()}
    assert list(losses) == [6, 12, 18, 24]
    assert set(runs.saved_steps(tmp_path / "worse")) == {min(losses, key=losses.get), 24}

    two = tmp_path / "two"
    argv = runs.settings(two, tokenizer, sources, evaluation__interval_steps=10, evaluation__heldout__pairs=heldout)
    runs.finish(argv, 2)
    assert runs.numbers(two) == runs.numbers(undisturbed)
    runs.assert_same_end(two, undisturbed)
    assert list(_measured(two)) == [10, 20]


def test_a_stop_during_an_evaluation_ends_it_and_the_resumed_run_repeats_it(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> None:
    """P6: within a batch, not after thousands, so that nothing is measured."""
    run_dir = tmp_path / "run"
    large = make_source(tmp_path / "large", tokenizer, pairs(4_000, seed=78))
    argv = runs.settings(run_dir, tokenizer, sources, evaluation__interval_steps=4, evaluation__heldout__pairs=large)
    with runs.launch([*argv, "optim.steps=4"], 2) as run:
        runs.wait_for(lambda: [row for row in runs.rows(run_dir) if row["step"] == 4], run)
        run.signal(signal.SIGTERM, rank=1)
        assert run.wait() == [75, 75], run.output
    assert runs.saved_steps(run_dir) == [4] and runs.saved_state(run_dir)[2]["metrics"] == {} and not _measured(run_dir)
    runs.finish([*argv, "optim.steps=4", "evaluation.max_batches=2"], 2)
    assert list(_measured(run_dir)) == [4]


def test_what_cannot_be_measured_is_refused_at_the_start(
    tmp_path: Path, tokenizer: Tokenizer, sources: dict[str, Path], heldout: Path
) -> None:
    """P10: held-out data inside training data, a metric that is not measured."""
    twin = Path(shutil.copytree(sources["pairs"], tmp_path / "twin"))
    argv = runs.settings(tmp_path / "run", tokenizer, sources, evaluation__interval_steps=4)
    best = ["checkpoint.keep_best=1", "checkpoint.best_metric=heldout/pears/text_loss"]
    starts = [
        ([*argv, f"evaluation.heldout.twin={twin}"], ["held-out source twin", "are training data too"]),
        ([*argv, f"evaluation.heldout.pairs={heldout}", *best], ["best_metric=heldout/pears/text_loss"]),
        (argv, ["evaluation.interval_steps=4", "evaluation.heldout.NAME=FOLDER"]),
    ]
    runs.assert_refused(*starts)
    argv = [*argv, f"evaluation.heldout.texts={heldout}", "checkpoint.keep_best=1"]
    uneven = [*argv, "checkpoint.best_metric=heldout/texts/text_loss"]
    words = ["checkpoint.interval_steps=5 and evaluation.interval_steps=4", "a multiple of the other"]
    starts = [(uneven, words)]
    text_only = make_source(tmp_path / "texts", tokenizer, texts(20, seed=79))
    silent = [*argv, f"evaluation.heldout.texts={text_only}", "checkpoint.best_metric=heldout/texts/image_loss"]
    both = "expected one of ['heldout/texts/text_loss', 'heldout_ema/texts/text_loss']"
    starts.append(([*silent, "evaluation.interval_steps=5"], [both]))
    runs.assert_refused(*starts)


def test_held_out_images_of_another_kind_or_for_a_model_of_texts_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, pairs_folder: Path
) -> None:
    config = load_config(PretrainConfig, runs.settings(tmp_path / "run", tokenizer, {"data": pairs_folder}))
    pixels = make_source(tmp_path / "pixels", tokenizer, pairs(9, kind="pixels"), kind="pixels")
    for spec, trained_on in ((Manifest.load(pairs_folder).latent_spec, "latents of VAE aaa.*"), (None, "text alone")):
        with pytest.raises(ValueError, match=f"source lone: .* holds pixels, the model was trained on {trained_on}; "):
            Heldout(HeldoutConfig(heldout={"lone": str(pixels)}), config, spec, alone())
