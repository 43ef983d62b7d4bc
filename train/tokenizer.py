"""Train a SentencePiece tokenizer from captions (.txt members of .tar shards) and text (.jsonl, .txt files)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from data.raw import read_texts
from data.tokenizer import Tokenizer, train_tokenizer
from train.config import load_config, run_program


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    inputs: list[str] = field(default_factory=list)  # files or folders of .tar, .jsonl and .txt
    output: str = "runs/tokenizer.model"  # the model file to write
    vocab_size: int = 32000  # pieces, the special ones and 256 byte pieces included, > 264
    max_texts: int = 1_000_000  # texts read for training, from the first file on

    def __post_init__(self) -> None:
        if self.vocab_size <= 264:
            raise ValueError(f"vocab_size={self.vocab_size}: expected more than 264 (256 bytes and special pieces)")


CONFIG = TokenizerConfig


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    output = Path(config.output)
    if output.is_file():
        print(f"tokenizer: {output} is there (vocabulary {Tokenizer(output).vocab_size}); delete it to train again")
        return
    train_tokenizer(_texts(config), output, config.vocab_size)
    tokenizer = Tokenizer(output)
    print(f"tokenizer: wrote {output}, vocabulary {tokenizer.vocab_size}, hash {tokenizer.hash}")


def _texts(config: TokenizerConfig) -> Iterator[str]:
    with tqdm(desc="tokenizer: texts", unit="text", mininterval=1) as progress:
        for count, (text, _) in enumerate(read_texts(config.inputs)):
            if count == config.max_texts:
                return
            progress.update()
            yield text


if __name__ == "__main__":
    run_program(main)
