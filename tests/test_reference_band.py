"""A run lies within its recipe's band up to its step, a fault outside; what cannot be compared is not. On real runs."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chi2, norm

from bench import bands
from train.config import load_config, to_yaml
from train.demo import STAGES
from train.pages.reference_band import Band, compare, compare_folder, load_band, settings_of
from train.pretrain_config import PretrainConfig

ROOT = Path(__file__).parent.parent
FILE = ROOT / "bench" / "results" / "bands" / "demo.json"
CONFIG = f"config={ROOT}/configs/demo/pretrain.yaml"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def band() -> Band:
    return load_band("demo")


def stored(kind: str) -> dict[str, Rows]:
    """Return the rows of the real runs, or faults, that the band's file holds."""
    found = json.loads(FILE.read_text(encoding="utf-8"))[kind]
    runs = {name: {key: of for key, of in run.items() if key != "settings"} for name, run in found.items()}
    return {n: [dict(zip(run, row, strict=True)) for row in zip(*run.values(), strict=True)] for n, run in runs.items()}


def changed(rows: Rows, metric: str, factor: float, first: int, last: int = 10**9) -> Rows:
    return [{**row, metric: row[metric] * (factor if first <= row["step"] <= last else 1)} for row in rows]


def test_each_run_lies_within_the_band_of_the_others(band: Band) -> None:
    """So the band is not too narrow for a seed or a machine that it has not seen. Also at every earlier step."""
    runs = stored("runs")
    for name, rows in runs.items():
        others = bands.band_of("demo", {n: of for n, of in runs.items() if n != name}, band.settings, "others")
        assert compare(rows, others).within, compare(rows, others).words
        for length in range(5, len(rows), 5):
            assert compare(rows[:length], band).within, (name, length)


def test_real_faults_leave_the_band(band: Band) -> None:
    """So it is not too wide.

    Clipping that is lost may not show, as Muon's updates hardly depend on gradients' sizes. Nor does attention that is
    causal inside images, which costs these pictures less than a seed does.
    """
    verdicts = {name: compare(rows, band) for name, rows in stored("faults").items()}
    found = {name for name, verdict in verdicts.items() if not verdict.within}
    assert found >= {"rate-x10", "pictures-always-first", "no-image-loss"}
    assert {name for name in verdicts if name not in found} <= {"no-clipping", "causal-in-images"}
    assert "image loss is above it from step" in verdicts["no-image-loss"].words


def test_the_words_say_what_leaves_the_band_where_and_which_way(band: Band) -> None:
    """A row or two after the first that is outside, as values are medians."""
    rows = changed(next(iter(stored("runs").values())), "text_loss", 2, 240)
    verdict = compare(rows, band)
    assert not verdict.within and re.search("text loss is above it from step 2[68]0 on: ", verdict.words)
    assert "at step 800, expected 0." in verdict.words and "image" not in verdict.words
    assert verdict.by_metric["text_loss"] in verdict.words and verdict.by_metric["x0_error"] == ""
    lowered = changed(next(iter(stored("runs").values())), "text_loss", 0.5, 240, 500)
    assert re.search("text loss is below it from step 2[68]0 to 5[24]0: ", compare(lowered, band).words)


def test_odd_rows_change_nothing_and_numbers_that_are_none_do(band: Band) -> None:
    rows = next(iter(stored("runs").values()))
    odd = changed(changed(rows, "grad_norm", 50, 300, 320), "text_loss", 9, 500, 500)
    assert compare(odd, band).within
    assert not compare(changed(rows, "image_loss", float("nan"), 700), band).within
    assert compare([{**row, "x0_error": None} for row in rows], band).by_metric.keys() == band.curves.keys() - {
        "x0_error"
    }


def test_a_run_in_progress_is_compared_up_to_its_step(band: Band, tmp_path: Path) -> None:
    """Rows of held-out losses, of other steps, and one that is being written do not count."""
    rows = changed(next(iter(stored("runs").values())), "text_loss", 2, 100)[:12]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(PretrainConfig, [CONFIG])))
    lines = [json.dumps(row) for row in [{"step": 40, "heldout/a/text_loss": 9.0}, *rows, {**rows[0], "step": 33}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 260, "text_l']))
    verdict = compare_folder(tmp_path, band)
    assert not verdict.within and "up to step 240: text loss is above" in verdict.words
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:5], ""]))
    assert "too short to compare" in compare_folder(tmp_path, band).words


def test_another_recipe_or_other_data_is_not_compared(band: Band) -> None:
    rows = next(iter(stored("runs").values()))

    def words(*settings: str, rows: Rows = rows) -> str:
        verdict = compare(rows, band, asdict(load_config(PretrainConfig, [CONFIG, *settings])))
        assert verdict.within != verdict.words.startswith("not comparable")
        return verdict.words

    elsewhere = (
        "run_dir=x",
        "vae=y",
        "data.tokenizer=z",
        "data.sources.scenes.path=w",
        "micro_batch_size=24",
        "seed=7",
    )
    assert words(*elsewhere, "parallel.dtype=float32", "data.num_workers=1", "evaluation.lanes=4").startswith("within")
    assert "optim.steps is 12, the band's 800" in words("optim.steps=12", "optim.warmup_steps=2")
    assert "data.lanes is 12, the band's 24" in words("data.lanes=12")
    assert "data.sources.more.weight is 1, the band's absent" in words("data.sources.more.path=p")
    assert "log.interval_steps is 10" in words("log.interval_steps=10")
    fewer = [{**row, "images_seen": 0.9 * row["images_seen"]} for row in rows]
    assert "other data: 79 images a step, the band's 88" in words(rows=fewer)


def test_the_band_is_of_the_demo_as_it_is(band: Band) -> None:
    """A change of the demo's recipe needs a new band: `python -m bench.bands`."""
    mine = settings_of(asdict(load_config(PretrainConfig, [CONFIG])))
    assert json.loads(json.dumps(mine)).items() >= band.settings.items()


@pytest.mark.parametrize("text", ["", "[]", '{"curves": {}}', '{"curves": {"loss": {"low": []}}}'])
def test_what_is_no_band_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "band.json").write_text(text)
    with pytest.raises(ValueError, match="is not a file of"):
        load_band(str(tmp_path / "band.json"))
    with pytest.raises(FileNotFoundError, match="reference=dema: no such band; expected demo"):
        load_band("dema")


def test_comparing_needs_no_torch() -> None:
    program = "import sys, train.pages.reference_band; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_the_tolerance_factor_is_howes() -> None:
    """Within 1 % of scipy's quantiles, which he took from tables; 3.02 for ten (ISO 16269-6, 90 % and 95 %)."""
    for runs in (4, 8, 20, 100):
        howe = norm.ppf(0.975) * ((runs - 1) * (1 + 1 / runs) / chi2.ppf(0.1, runs - 1)) ** 0.5
        assert bands.tolerance_factor(runs) == pytest.approx(howe, rel=0.01)
    assert bands.tolerance_factor(10) == pytest.approx(3.018, rel=0.01)


def test_finished_runs_are_collected_and_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The committed file is what its command makes of its runs."""
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    runs, faults, arguments = stored("runs"), stored("faults"), shlex.split(kept["command"])[3:]
    recipe = to_yaml(load_config(PretrainConfig, [CONFIG]))
    for training in bands.trainings(load_config(bands.BandsConfig, arguments)):
        root = tmp_path / training.machine
        run_dir = root / "runs" / "demo" / training.name
        run_dir.mkdir(parents=True)
        rows = faults[training.fault] if training.fault else runs[f"{training.machine}-{training.seed}"]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run_dir / "config.yaml").write_text(recipe)
        (root / "logs").mkdir(exist_ok=True)
        for stage in STAGES:
            (root / "logs" / f"{stage.name.replace(' ', '-')}.done").touch()
    assert bands.main([*arguments, f"folder={tmp_path}", f"output={tmp_path}/band.json"]) == 0
    made = json.loads((tmp_path / "band.json").read_text(encoding="utf-8"))
    for key in ("name", "steps", "per_step", "made_from", "how", "command", "runs", "faults"):
        assert made[key] == kept[key], key
    assert {**made["settings"], **kept["settings"]} == made["settings"]
    for metric, curve in made["curves"].items():
        for name, values in curve.items():
            assert values == pytest.approx(kept["curves"][metric][name], rel=1e-3), (metric, name)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["faults_found"].keys() == faults.keys()


@pytest.mark.slow
def test_every_training_is_settings_that_pretrain_accepts() -> None:
    """Faults train with the rates of the full length's first half."""
    parsed = [load_config(PretrainConfig, [CONFIG, *t.settings()]) for t in bands.trainings(bands.BandsConfig())]
    assert {config.optim.steps for config in parsed} == {800, 400}
    faulty = next(config for config in parsed if config.run_dir.endswith("no-image-loss")).optim
    full = load_config(PretrainConfig, [CONFIG]).optim
    for step in (10, 200, 400):
        assert bands.learning_rate(step, faulty) == pytest.approx(bands.learning_rate(step, full), rel=1e-9)
