"""Three small raw shards, and the program that encodes them."""

from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from tests.encoding.jobs import OUT, Contents, Encode, arguments, contents_of, picture_record, raw_folder
from train.encode import main


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three raw shards of 5, 3 and 6 pictures."""
    folder = tmp_path_factory.mktemp("raw") / "pictures"
    shards = {"a": range(5), "b": range(5, 8), "c": range(8, 14)}
    return raw_folder(folder, {name: [picture_record(i) for i in numbers] for name, numbers in shards.items()})


@pytest.fixture
def encode(tokenizer: Tokenizer, vae_folder: Path) -> Encode:
    """Run the program in this process and return the files of its output folder."""

    def run(inputs: Path | str, output: Path = OUT, **options: object) -> Contents:
        main(arguments(inputs, output, tokenizer, **{"vae": vae_folder, **options}))
        return contents_of(output)

    return run


@pytest.fixture(scope="module")
def expected(raw: Path, tokenizer: Tokenizer, vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    """What an undisturbed run on one rank makes of `raw`."""
    output = tmp_path_factory.mktemp("expected") / "out"
    main(arguments(raw, output, tokenizer, vae=vae_folder))
    return contents_of(output)
