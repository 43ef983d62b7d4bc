"""Train a SentencePiece tokenizer from the captions of .tar shards, rows of .jsonl or .parquet, and text (.txt).

Or take that of a pretrained language model (source=FOLDER), with unused tokens of its vocabulary as BOI, EOI and PAD.
(Without this program they are appended to the vocabulary; then tokenizer=FOLDER is enough everywhere.)
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data.durable import atomic_write
from data.json_tokenizer import TOKENIZER, self_contained
from data.raw import read_texts
from data.raw_document import KeysConfig
from data.shards import BadRecords
from data.storage import Location
from data.strict_json import dumps
from data.tokenizer import Tokenizer, train_tokenizer
from train.config import load_config, run_program


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(KeysConfig):
    inputs: list[Location] = field(default_factory=list)  # files or folders of .tar, .jsonl, .parquet and .txt
    output: Location = "runs/tokenizer.model"  # the file to write; .json with `source`
    # A folder with tokenizer.json and config.json, or that file: its tokenizer is written, none is trained.
    source: Location | None = None
    # With `source`: which of its tokens boi, eoi and pad are, by name; those left out are appended.
    special: dict[str, str] = field(default_factory=dict)
    vocab_size: int = 32000  # pieces, including the special ones and 256 byte pieces, > 264
    max_texts: int = 1_000_000  # texts used for training, the first ones of `inputs`
    max_bad_fraction: float = 0.01  # share of records, and of the files' bytes, that may be skipped, in [0, 1]
    max_failed_files: int = 0  # files that may hold nothing readable, >= 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size <= 264:
            raise ValueError(f"vocab_size={self.vocab_size}: expected more than 264 (256 bytes and special pieces)")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}: expected a share in [0, 1]")
        if self.special and self.source is None:
            raise ValueError(f"special={self.special}: expected source=FOLDER with it")
        if self.source is not None and not self.output.endswith(".json"):
            raise ValueError(f"output={self.output}: expected a name that ends in .json, as with source")
        if self.source is not None and self.inputs:
            raise ValueError(f"source={self.source} and inputs={self.inputs}: expected one of them; none is trained")
        if self.max_failed_files < 0:
            raise ValueError(f"max_failed_files={self.max_failed_files}: expected 0 or more")


CONFIG = TokenizerConfig


def main(argv: list[str]) -> None:
    config = load_config(CONFIG, argv)
    output = Path(config.output)
    if config.source is not None:
        take(Path(config.source), config.special, output)
        return
    if output.is_file():
        if (found := Tokenizer(output).vocab_size) != config.vocab_size:
            raise ValueError(
                f"output={output} exists with vocabulary {found}, expected vocab_size={config.vocab_size}: delete it "
                "to train again, or name another file"
            )
        print(f"tokenizer: {output} exists (vocabulary {found}); delete it to train again")
        return
    bad = BadRecords(config.max_bad_fraction, max_failed_files=config.max_failed_files)
    try:
        train_tokenizer(_texts(config, bad), output, config.vocab_size)
    except ValueError:  # SentencePiece wraps what its iterator raises
        bad.check(final=True)
        raise
    trained = Tokenizer(output)
    print(f"tokenizer: wrote {output}, vocabulary {trained.vocab_size}, hash {trained.hash}; skipped {bad.summary()}")


def take(source: Path, special: dict[str, str], output: Path) -> None:
    """Write a pretrained model's tokenizer with its special ids; raise ValueError if `output` holds another."""
    path = source / TOKENIZER if source.is_dir() else source
    if not path.is_file():
        raise FileNotFoundError(f"source={source}: expected a {TOKENIZER}; a SentencePiece model is used as it is")
    content = self_contained(path, special)
    written = dumps(content, sort_keys=True, ensure_ascii=False).encode()
    if output.is_file() and output.read_bytes() != written:
        raise ValueError(f"output={output} exists and differs: delete it, or name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(written)
    taken = Tokenizer(output)
    ids = ", ".join(f"{name} {token_id}" for name, token_id in vars(taken.special).items())
    form = "with its chat template" if taken.chat else "no chat template"
    print(f"tokenizer: wrote {output}, vocabulary {taken.vocab_size}, hash {taken.hash}; {ids}; {form}")


def _texts(config: TokenizerConfig, bad: BadRecords) -> Iterator[str]:
    with tqdm(desc="tokenizer: texts", unit="text", mininterval=1) as progress:
        for text in islice(read_texts(config.inputs, bad, config), config.max_texts):
            progress.update()
            yield text
    for remark in [*(f"skipped {name}" for name in bad.names), *bad.remarks()]:
        print(f"tokenizer: {remark}")
    bad.check(final=True)


if __name__ == "__main__":
    run_program(main)
