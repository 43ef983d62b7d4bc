"""What the cases of bench/gpu.py have in common: sizes, data, and the command line of a training run on them.

The data are the paper's mix: half text tokens, half patches of 32x32 latents, in shards as train.encode writes them,
with a vocabulary as large as Llama-2's. `cpu` stands for a tiny model and little data, through the same code.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import sentencepiece

from bench.loader import GRID, PATCH, make_data
from data.tokenizer import BOI_PIECE, EOI_PIECE
from model.transformer import SIZES, TransformerConfig
from model.transfusion import TransfusionConfig
from model.unet import UNetConfig
from train.config import load_config
from train.pretrain_config import PretrainConfig

PAPER = Path(__file__).parents[1] / "configs" / "paper"
VOCAB = 32_002  # Llama-2's pieces, BOI and EOI
# Sequences a micro-step, and micro-steps of a step: enough that the update, which many GPUs would share, takes little.
ROWS = {"0.16b": 16, "0.76b": 8, "1.4b": 8, "7b": 2, "toy": 2}
MICRO_STEPS = {"0.16b": 2, "0.76b": 2, "1.4b": 2, "7b": 4, "toy": 2}
TOY = TransformerConfig(width=32, layers=2, heads=2)
TOY_UNET = UNetConfig(channels=(8, 8), blocks=1)
PATCHES = GRID[0] * GRID[1] // PATCH**2  # tokens of an image

Patcher = Literal["linear", "unet"]


@dataclass(frozen=True)
class Setting:
    """Where the data is, and the device."""

    folder: Path
    device: Literal["cpu", "cuda"]

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 4096 if self.on_cuda else 512

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.model"

    def make(self) -> None:
        """Write the tokenizer and the shards; seconds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        make_tokenizer(self.tokenizer, VOCAB if self.on_cuda else 512)
        pairs, texts = (2048, 1024) if self.on_cuda else (16, 16)
        make_data(self.folder, pairs, texts)

    def trunk(self, size: str) -> TransformerConfig:
        return SIZES[size] if self.on_cuda else TOY

    def model(self, size: str, patches: Patcher = "linear") -> TransfusionConfig:
        """Return the model of a size, as `config` does."""
        unet = UNetConfig() if self.on_cuda else TOY_UNET
        return TransfusionConfig(transformer=self.trunk(size), patches=patches, unet=unet)

    def arguments(self, size: str, run_dir: Path, patches: Patcher = "linear") -> list[str]:
        """Return the arguments of train.pretrain for a run of this size on the mixed data."""
        rows = ROWS[size]
        shared = {
            "run_dir": run_dir,
            "device": self.device,
            "micro_batch_size": rows,
            "data.tokenizer": self.tokenizer,
            "data.sources.pairs.path": self.folder / "pairs",
            "data.sources.texts.path": self.folder / "texts",
            "data.image_share": 0.5,
            "data.lanes": rows * MICRO_STEPS[size],
            "data.sequence_length": self.length,
            "model.patches": patches,
        }
        if self.on_cuda:
            return [f"config={PAPER / f'{size}.yaml'}", *(f"{key}={value}" for key, value in shared.items())]
        tiny = {f"model.transformer.{key}": getattr(TOY, key) for key in ("width", "layers", "heads")}
        tiny |= {"model.unet.channels": [8, 8], "model.unet.blocks": 1}
        tiny |= {"data.shuffle_block": 8, "data.look_ahead": 4, "data.num_workers": 1, "parallel.dtype": "float32"}
        return [f"{key}={value}" for key, value in (shared | tiny).items()]

    def config(
        self, size: str, run_dir: Path, patches: Patcher = "linear", *, text_only: bool = False
    ) -> PretrainConfig:
        """Return the config of that run; `text_only` leaves out the images."""
        config = load_config(PretrainConfig, self.arguments(size, run_dir, patches))
        if not text_only:
            return config
        sources = {name: source for name, source in config.data.sources.items() if name == "texts"}
        return replace(config, data=replace(config.data, sources=sources, image_share=None))


def make_tokenizer(path: Path, vocab_size: int) -> None:
    """Write a model of `vocab_size` whole words, in a tenth of a second."""
    words = [f"word{number}" for number in range(vocab_size)]
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(" ".join(words[start : start + 100]) for start in range(0, vocab_size, 100)),
            model_writer=file,
            vocab_size=vocab_size,
            model_type="word",
            control_symbols=[BOI_PIECE, EOI_PIECE],
            pad_id=3,
            minloglevel=2,
        )
