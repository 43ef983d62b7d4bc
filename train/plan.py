"""Say what a training config amounts to before anything runs: parameters by part, tokens a step and in all.

Needs neither data nor a GPU: `python -m train.plan config=configs/paper/7b.yaml model.patches=unet`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from data.dataset import DataConfig
from data.tokenizer import Tokenizer
from train.config import load_config, run_program
from train.estimate import parameters
from train.recipe import PretrainConfig

LLAMA_2 = 32_000 + 2  # its pieces, BOI and EOI


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PretrainConfig):
    run_dir: str = "runs/plan"  # of the planned run; not touched
    # Token ids; null: those of data.tokenizer, or of Llama-2's tokenizer with BOI and EOI if that file is not here.
    vocab_size: int | None = None
    data: DataConfig = field(default_factory=lambda: DataConfig(tokenizer="runs/tokenizer.model"))
    json: bool = False  # print one JSON object instead of text

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size}: expected 1 or more, or null")


CONFIG = PlanConfig


def main(argv: list[str]) -> None:
    config = load_config(CONFIG, argv)
    vocab_size, whence = config.vocab_size, "as given"
    if vocab_size is None and Path(str(config.data.tokenizer)).is_file():
        vocab_size, whence = Tokenizer(config.data.tokenizer).vocab_size, f"of {config.data.tokenizer}"
    elif vocab_size is None:
        vocab_size, whence = LLAMA_2, f"Llama-2's, BOI and EOI: {config.data.tokenizer} is not here"
    step_tokens = config.data.lanes * config.data.sequence_length
    try:
        counts = parameters(config.model, vocab_size)
    except (RuntimeError, OverflowError) as error:  # torch's, of sizes past what it can count
        raise ValueError(f"model and vocab_size={vocab_size} are too large to count: {error}") from None
    plan = {
        "parameters": counts,
        "vocab_size": vocab_size,
        "vocab_size_from": whence,
        "tokens_a_step": step_tokens,
        "steps": config.optim.steps,
        "tokens": step_tokens * config.optim.steps,
    }
    print(json.dumps(plan) if config.json else _text(config, plan))


def _text(config: PlanConfig, plan: dict) -> str:
    trunk, counts = config.model.transformer, plan["parameters"]
    notes = {
        "total": "",
        "embeddings": f"{plan['vocab_size']:,} token ids ({plan['vocab_size_from']})",
        "blocks": f"{trunk.layers} layers of width {trunk.width}, {trunk.heads} heads",
        "patches": f"{config.model.patches}, {config.model.patch_size}x{config.model.patch_size} latent pixels a token",
        "heads": "the text head; the noise head is among the patches",
    }
    lines = [
        f"{name:<11}{count / 1e6:>12,.2f}M {100 * count / counts['total']:6.2f} %  {notes[name]}".rstrip()
        for name, count in counts.items()
    ]
    lines.append(
        f"batch      {plan['tokens_a_step']:,} tokens: {config.data.lanes} sequences of "
        f"{config.data.sequence_length}; {plan['steps']:,} steps, {plan['tokens'] / 1e9:,.3g}B tokens in all"
    )
    return "\n".join(["parameters", *lines])


if __name__ == "__main__":
    run_program(main)
