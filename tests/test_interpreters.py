"""Python versions read each other's files: a run resumes under another Python, and back, with the same result (P4).

Debian's own Python is the README's platform; python3.12 and python3.13 are tested where they are on PATH and can import
the packages of requirements.txt.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from data.tokenizer import Tokenizer
from model.autoencoders import load_latent_space
from tests.runs import finish, saved_state, settings
from tests.sources import make_source, pairs, texts
from train.checkpoints import checkpoint
from train.distributed.ranks import alone
from train.inference.saved_model import LoadedModel

ROOT = Path(__file__).parent.parent
PYTHONS = ("/usr/bin/python3", "python3.12", "python3.13")
RESUME_AND_EXPORT = """
import json, sys
try:
    import torch, omegaconf
except ImportError:
    sys.exit("packages are missing")
from train import export, pretrain
resume, take = map(json.loads, sys.argv[1:])
assert not pretrain.main(resume)
export.main(take)
"""


def other_python(name: str) -> tuple[str, dict[str, str]]:
    """Return an interpreter that is not this one, and the environment in which it finds our packages."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    asked = [name, "-c", "import sys; print(sys.version)"]
    found = subprocess.run(asked, capture_output=True, text=True) if shutil.which(name) else None
    if found is None or found.returncode or found.stdout.strip() == sys.version:
        pytest.skip(f"{name} is not installed, or is this Python")
    if found.stdout.split(".")[:2] == sys.version.split(".")[:2]:  # compiled packages work for both
        environment["PYTHONPATH"] += f":{sysconfig.get_path('purelib')}"
    return name, environment


def _from_step(step: int, run: Path, there: Path) -> Path:
    """Copy a run as it was at a step."""
    shutil.copytree(run, there)
    for folder in checkpoint.saved(there / "checkpoints"):
        if checkpoint.step_of(folder) > step:
            shutil.rmtree(folder)
    return there


def _assert_same_end(run: Path, expected: Path) -> None:
    """Compare weights within the tolerance between builds of torch, lanes and counters exactly."""
    (tensors, lanes, meta), (other_tensors, other_lanes, other_meta) = saved_state(run), saved_state(expected)
    assert tensors.keys() == other_tensors.keys() and lanes == other_lanes and meta["progress"]["step"] == 6
    assert meta["progress"] == other_meta["progress"] and meta["fingerprint"] == other_meta["fingerprint"]
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, other_tensors[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", PYTHONS)
def test_a_run_continues_under_another_python_and_back(
    name: str, tmp_path: Path, tokenizer: Tokenizer, vae_folder: Path
) -> None:
    python, environment = other_python(name)
    hashed = load_latent_space(str(vae_folder)).hash
    sources = {"pairs": make_source(tmp_path / "pairs", tokenizer, pairs(30, grids=[(8, 8)]), vae_hash=hashed)}
    sources |= {f"texts{n}": make_source(tmp_path / f"texts{n}", tokenizer, texts(20, seed=n)) for n in range(3)}
    weights = {f"data__sources__texts{n}__weight": 0.1 for n in range(3)}  # their sum depends on its order

    def arguments(run: Path) -> list[str]:
        changes = {"optim__steps": 6, "checkpoint__interval_steps": 2, "checkpoint__keep_last": 3}
        return settings(run, tokenizer, sources, vae=vae_folder, data__image_share=0.3, **changes, **weights)

    finish(arguments(tmp_path / "ours"), None)
    theirs = _from_step(2, tmp_path / "ours", tmp_path / "theirs")
    take = [f"checkpoint={theirs}", f"output={tmp_path / 'export'}", "weights=model"]
    words = [python, "-c", RESUME_AND_EXPORT, json.dumps(arguments(theirs)), json.dumps(take)]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    if done.stderr == "packages are missing\n":
        pytest.skip(f"{name} lacks the packages of requirements.txt")
    assert done.returncode == 0 and f"from {theirs}/checkpoints/step-00000002" in done.stdout, done.stdout + done.stderr
    _assert_same_end(theirs, tmp_path / "ours")
    again = _from_step(4, theirs, tmp_path / "again")
    assert f"from {again}/checkpoints/step-00000004" in finish(arguments(again), None)
    _assert_same_end(again, tmp_path / "ours")
    exported, trained = (LoadedModel.load(path, alone(), "model").model for path in (tmp_path / "export", theirs))
    for one, other in zip(exported.parameters(), trained.parameters(), strict=True):
        assert torch.equal(one, other)
