"""A pretrained language model on disk, in transformers' layout: config.json and safetensors, one file or several.

Weights are read by rows, straight into a rank's shards, in pieces of bounded size: no rank holds a full copy, and the
library that wrote them is not needed.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from model.language_model import EMBEDDING, HEAD, LanguageModel, Piece, pieces, read_settings, to_pairs
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig
from train.config_layers import expanded
from train.distributed.local_shards import first_element, local
from train.distributed.parallelize import draw
from train.pretrain_config import PretrainConfig, read_config

Config = TypeVar("Config", bound=PretrainConfig)

CHUNK = 1 << 22  # elements read at once; changing it does not change what is read
SAMPLES, SAMPLE = 4, 1024  # parts of each tensor that the hash reads, and their bytes
DTYPES = ("F32", "BF16", "F16")


class LLMFolder:
    def __init__(self, path: str | Path, key: str = "init_from_llm") -> None:
        """Read config.json; raise FileNotFoundError or ValueError for anything but a family that the trunk computes.

        `key` is the option that names the folder.
        """
        self.path, self._name = Path(path), f"{key}={path}"
        try:
            contents = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self._name}: no config.json there; expected a folder with config.json and model.safetensors, as "
                "transformers' save_pretrained writes it"
            ) from None
        except ValueError as error:
            raise ValueError(f"{self._name}: config.json is not JSON: {error}; fetch it again") from None
        if not isinstance(contents, dict):
            raise ValueError(f"{self._name}: config.json is {type(contents).__name__}, expected a mapping")
        try:
            self.model: LanguageModel = read_settings(contents, self._name)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{self._name}: config.json: {error}; fetch it again") from None

    @cached_property
    def hash(self) -> str:
        """Return 16 hex digits that identify the weights.

        They cover each file's size and header (names, shapes, dtypes) and samples of every tensor, among them its first
        and last bytes. So another model, dtype or fine-tuning of any tensor is noticed, and so are files that are cut;
        a few numbers changed in the middle of a tensor may not be. Of a model of 8B that is 1 MB to read.
        """
        digest = xxhash.xxh3_64()
        for file in self._files:
            try:
                _digest(file, digest)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self._name}: {file.name} is damaged: {error}; fetch it again") from None
        return digest.hexdigest()

    def read(
        self, parameters: Mapping[str, torch.Tensor], config: TransfusionConfig, vocab_size: int, seed: int
    ) -> None:
        """Fill parameters of a model of `config`, or shards of them, by plain name: any subset, of any float dtype.

        Rows of the vocabulary that the language model lacks get the mean of its rows, those from `vocab_size` on zeros.
        Images' own parts get what text's have. What no language model has, such as patchers, is drawn from (seed,
        name). Raises ValueError for files that do not hold the model of config.json.
        """
        trunk, files = self.model.transformer, self._files
        with ExitStack() as stack, torch.no_grad():
            try:
                tensors = _open(files, stack)
                self._check(tensors)
                for name, parameter in parameters.items():
                    made_of = pieces(name, trunk)
                    if name.startswith("text_"):
                        self._read_vocabulary(tensors[made_of[0].name], parameter, vocab_size)
                    elif made_of:
                        self._read_rows(tensors, made_of, parameter)
                    else:
                        draw({name: parameter}, config, vocab_size, seed)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self._name}: damaged: {error}; fetch it again") from None

    @property
    def _files(self) -> list[Path]:
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                files = [self.path / Path(name).name for name in names]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self._name}: {index.name} is damaged: {error}; fetch it again") from None
        else:
            files = [single]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(
                f"{self._name}: {', '.join(missing[:4])} missing; expected safetensors (of a folder with .bin files, "
                "transformers' save_pretrained makes them)"
            )
        return files

    def _check(self, tensors: dict[str, Any]) -> None:
        """Raise ValueError unless the files hold the tensors of config.json, in its shapes."""
        model, shapes = self.model, self._shapes()
        ignored = {HEAD} if model.tied_embeddings else set()
        problems = [f"{name} is missing" for name in sorted(shapes.keys() - tensors.keys())]
        problems += [
            f"{name} is not in a {model.family} of this config.json"
            for name in sorted(tensors.keys() - shapes.keys() - ignored)
            if not name.endswith("rotary_emb.inv_freq")
        ]
        for name in sorted(shapes.keys() & tensors.keys()):
            if (found := list(tensors[name].get_shape())) != shapes[name]:
                problems.append(f"{name} is {found}, expected {shapes[name]}")
            elif (dtype := tensors[name].get_dtype()) not in DTYPES:
                problems.append(f"{name} is {dtype}, expected one of {', '.join(DTYPES)}")
        if not problems and ignored & tensors.keys() and not self._ties(tensors):
            problems.append(f"tie_word_embeddings=true, but {HEAD} is not {EMBEDDING}")
        if problems:
            raise ValueError(f"{self._name} does not fit its config.json: {'; '.join(problems[:6])}; fetch it again")

    def _ties(self, tensors: dict[str, Any]) -> bool:
        """Return whether the head that the files hold is the embedding."""
        head, embedding = tensors[HEAD], tensors[EMBEDDING]
        count, width = embedding.get_shape()
        step = max(1, CHUNK // width)
        return head.get_shape() == [count, width] and all(
            torch.equal(head[at : at + step], embedding[at : at + step]) for at in range(0, count, step)
        )

    def _shapes(self) -> dict[str, list[int]]:
        """Return the shapes of the tensors that the model has, by their names."""
        trunk, vocab_size = self.model.transformer, self.model.vocab_size
        with torch.device("meta"):
            config = TransfusionConfig(transformer=trunk, tied_embeddings=self.model.tied_embeddings)
            ours = Transfusion(config, vocab_size)
        return {
            piece.name: [piece.rows or vocab_size, *parameter.shape[1:]]
            for name, parameter in ours.named_parameters()
            for piece in pieces(name, trunk)
        }

    def _read_rows(self, tensors: dict[str, Any], made_of: list[Piece], parameter: torch.Tensor) -> None:
        mine, row_size = local(parameter), max(1, parameter[0].numel())
        first = first_element(parameter) // row_size
        start = -first  # of the piece, relative to this rank's rows
        for piece in made_of:
            low, high = max(0, -start), min(piece.rows, len(mine) - start)  # rows of the piece that are this rank's
            unit = self.model.transformer.head_width if piece.kind == "rotary" else 1  # whole heads are read
            step = max(1, CHUNK // (unit * row_size)) * unit
            for at in range(low - low % unit, high, step):
                rows = tensors[piece.name][at : min(at + step, piece.rows)]
                rows = to_pairs(rows, unit) if piece.kind == "rotary" else rows
                begin, end = max(low, at), min(high, at + step)
                mine[start + begin : start + end] = rows[begin - at : end - at]
            start += piece.rows

    def _read_vocabulary(self, tensor: Any, parameter: torch.Tensor, vocab_size: int) -> None:
        mine, (_, width) = local(parameter), parameter.shape
        first, known, step = first_element(parameter) // width, self.model.vocab_size, max(1, CHUNK // width)
        for at in range(0, len(mine), step):
            last = min(first + at + step, first + len(mine), known)
            if last > first + at:
                mine[at : last - first] = tensor[first + at : last]
        new = slice(max(0, known - first), max(0, vocab_size - first))
        mine[new.stop :].zero_()
        if len(mine[new]):
            total = torch.zeros(width, dtype=torch.float64)  # in one order for every number of ranks (P3)
            for at in range(0, known, step):
                total += tensor[at : min(at + step, known)].double().sum(0)
            mine[new] = (total / known).float().to(mine)  # rounded as every other row


def _digest(file: Path, digest: xxhash.xxh3_64) -> None:
    """Add a safetensors file's size, header and samples (see `LLMFolder.hash`)."""
    with file.open("rb") as stream:
        start, size = 8 + int.from_bytes(stream.read(8), "little"), file.stat().st_size
        if start > size:
            raise ValueError(f"a header of {start} bytes in {size}")
        header = stream.read(start - 8)
        digest.update(header + str(size).encode())
        for name, tensor in json.loads(header).items():
            if name == "__metadata__":
                continue
            first, last = tensor["data_offsets"]
            for sample in range(SAMPLES):
                stream.seek(start + first + sample * max(0, last - first - SAMPLE) // (SAMPLES - 1))
                digest.update(stream.read(min(SAMPLE, last - first)))


def _open(files: list[Path], stack: ExitStack) -> dict[str, Any]:
    """Return the files' tensors by name, as slices that read what they are asked for."""
    tensors: dict[str, Any] = {}
    for file in files:
        opened = stack.enter_context(safe_open(file, framework="pt"))
        tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not iterable)
    return tensors


def with_llm(config: Config) -> Config:
    """Return the config with model.transformer and tied_embeddings as the language model of `init_from_llm` has them.

    A run that has begun needs that folder no more; without it, its own config.yaml says the same. Raises ValueError
    where the config says something else, or trains on sequences that the model does not see whole.
    """
    if (path := config.init_from_llm) is None:
        return config
    path = expanded("init_from_llm", path)
    if not Path(path).exists() and (stored := _stored_model(config, path)) is not None:
        transformer, tied = stored.transformer, stored.tied_embeddings
    else:
        llm = LLMFolder(path).model
        transformer, tied, length = llm.transformer, llm.tied_embeddings, config.data.sequence_length
        if llm.window is not None and length > llm.window:
            raise ValueError(
                f"data.sequence_length={length}: some layers of init_from_llm={path} see windows of {llm.window} "
                f"tokens, which the trunk does not have; expected at most {llm.window}, or another model"
            )
    given, defaults = config.model.transformer, TransformerConfig()
    transformer = replace(transformer, rope_2d=given.rope_2d, ffn_multiple_of=given.ffn_multiple_of)  # ours; not read
    pairs = {
        f"transformer.{field.name}": tuple(getattr(of, field.name) for of in (given, defaults, transformer))
        for field in fields(TransformerConfig)
    }
    pairs["transformer.head_dim"] = (given.head_dim, None, transformer.head_width)
    pairs["tied_embeddings"] = (config.model.tied_embeddings, False, tied)
    if contradictions := [
        f"model.{name}={value}, but it has {its}" for name, (value, default, its) in pairs.items()
        if value not in (default, its)
    ]:  # fmt: skip
        raise ValueError(
            f"init_from_llm={path}: {'; '.join(contradictions)}; leave these settings out, its config.json gives them"
        )
    return replace(config, model=replace(config.model, transformer=transformer, tied_embeddings=tied))


def _stored_model(config: PretrainConfig, path: str) -> TransfusionConfig | None:
    """Return the model of the run's own config.yaml if the run started from the same path."""
    saved = Path(config.run_dir) / "config.yaml"
    stored = read_config(saved) if saved.is_file() else None
    return stored.model if stored is not None and stored.init_from_llm == path else None
