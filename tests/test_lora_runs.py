"""Runs that train adapters alone: what their checkpoints hold, how they resume, and what is exported from them."""

from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from tests import runs
from tests.test_language_model import save_llm


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm")
    save_llm(folder, "qwen2.5-7b", vocab_size=296)
    return folder


@pytest.fixture(scope="module")
def adapted(
    tmp_path_factory: pytest.TempPathFactory, llm: Path, tokenizer: Tokenizer, sources: dict[str, Path]
) -> tuple[Path, list[str]]:
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    argv = lora_run(run_dir, llm, tokenizer, sources)
    print(runs.finish(argv, 2))
    return run_dir, argv


def lora_run(run_dir: Path, llm: Path, tokenizer: Tokenizer, sources: dict[str, Path]) -> list[str]:
    settings = {"init_from_llm": llm, "model__lora__rank": 4, "optim__steps": 8, "checkpoint__interval_steps": 3}
    argv = runs.settings(run_dir, tokenizer, sources, **settings)
    return [argument for argument in argv if "model.transformer" not in argument]


def test_x(adapted):
    run_dir, _ = adapted
    tensors, _, meta = runs.saved_state(run_dir)
    print(sorted(tensors))
    print(meta)
    print((run_dir / "config.yaml").read_text())
