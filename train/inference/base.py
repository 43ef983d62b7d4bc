"""Where a run's frozen parameters come from: a language model, another run's weights, or the seed.

Checkpoints do not hold them. They are made again whenever one is opened, from the same source, whose contents are
pinned by a hash in the checkpoint.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from model.lora import is_adapter
from model.modalities import text_name
from train.checkpoints import checkpoint
from train.checkpoints.lookup import identity
from train.distributed.parallelize import draw
from train.distributed.ranks import Ranks
from train.inference.saved_model import SavedModel
from train.llm_folder import LLMFolder
from train.pretrain_config import PretrainConfig


def base_of(config: PretrainConfig, ranks: Ranks) -> str:
    """Return what identifies the source of a run's frozen parameters. Collective.

    Raises FileNotFoundError or ValueError if it is gone, or differs between ranks.
    """
    if config.init_from_llm is not None:
        found = f"language model {LLMFolder(config.init_from_llm).hash}"
        ranks.require_alike({"init_from_llm (contents)": found})
        return found
    if config.init_from is not None:
        return SavedModel.use(
            config.init_from, ranks, lambda saved: f"weights {saved.chosen(config.init_weights)} of {saved.identity}"
        )
    return f"seed {config.seed}"


def read_base(
    config: PretrainConfig, parameters: Mapping[str, torch.Tensor], vocab_size: int, expected: str, ranks: Ranks
) -> None:
    """Fill frozen parameters, or shards of them, by plain name, from the source that a run's config names. Collective.

    `expected` is what `base_of` returned when the run began. Raises FileNotFoundError or ValueError if that is gone or
    something else now.
    """
    name = "init_from_llm" if expected.startswith("language model") else "init_from"
    if (path := config.init_from) is not None:
        config = replace(config, init_from=ranks.on_first(lambda: _checkpoint_of(path, expected)))
    try:
        found = base_of(config, ranks)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. Frozen parameters are not in checkpoints and come from there: bring it back, or say where it is "
            f"now: base=PATH for programs that use a trained model, {name}=PATH in training"
        ) from None
    if found != expected:
        raise ValueError(
            f"{name}={getattr(config, name)} is {found}, but the run's frozen parameters came from {expected}; bring "
            f"that back, or say where it is now: base=PATH for programs that use a trained model, {name}=PATH in "
            "training"
        )
    if config.init_from_llm is not None:
        LLMFolder(config.init_from_llm).read(parameters, config.model, vocab_size, config.seed)
    elif config.init_from is not None:
        SavedModel.use(
            config.init_from, ranks, lambda saved: read_saved(saved, config, parameters, vocab_size, ranks, whole=False)
        )
    else:
        draw(parameters, config.model, vocab_size, config.seed)


def _checkpoint_of(path: str, expected: str) -> str:
    """Return the checkpoint of the run at `path` that is `expected`, as the run may have gone on; else `path`."""
    for folder in checkpoint.saved(Path(path) / "checkpoints"):
        if (found := identity(folder)) is not None and expected.endswith(f" of {found}"):
            return str(folder)
    return path


def read_saved(
    saved: SavedModel,
    config: PretrainConfig,
    parameters: Mapping[str, torch.Tensor],
    vocab_size: int,
    ranks: Ranks,
    *,
    whole: bool = True,
) -> str:
    """Fill parameters, or shards, by plain name from a trained model; return which of its weights were read.

    What it may lack: images' own parts, adapters among them, are copies of text's then; other adapters are drawn. The
    parameters are all that it has, or some with whole=False. Collective; raises ValueError for others, and other sizes.
    """
    names, copies, drawn, known = saved.names(), {}, {}, {}
    for name, parameter in parameters.items():
        of_text = text_name(name)
        if name in names:
            known[name] = parameter
        elif of_text in names:
            copies[of_text] = parameter
        elif is_adapter(name):
            drawn[name] = parameter
        else:
            known[name] = parameter  # refused below, by name
    draw(drawn, config.model, vocab_size, config.seed)
    saved.read(config.init_weights, copies, ranks, whole=False)
    return saved.read(config.init_weights, known, ranks, whole=whole)


def with_base(config: PretrainConfig, path: str | None) -> PretrainConfig:
    """Return a run's config with the source of its frozen parameters at another path; None: where it was."""
    if path is None:
        return config
    if config.init_from_llm is not None:
        return replace(config, init_from_llm=path)
    if config.init_from is not None:
        return replace(config, init_from=path)
    raise ValueError(f"base={path}: the model was not started from anything; leave base out")
