"""The weights that a new run starts from, read after checking that they mean the same there."""

import logging
from pathlib import Path

import numpy as np
import torch

from data.dataset import DataSet
from data.tokenizer import Tokenizer, find_copy
from model.transfusion import Transfusion
from train.checkpoints.trained_records import TrainedRecords
from train.distributed.parallelize import plain_name
from train.distributed.ranks import Ranks
from train.inference.base import read_saved
from train.inference.saved_model import SavedModel
from train.llm_folder import LLMFolder
from train.pretrain_config import PretrainConfig
from train.state import differences, meaning

log = logging.getLogger(__name__)

PROBE = "The quick brown fox jumps over 13 lazy dogs.\nÜber naïve Cafés, 中文 и русский."  # told apart by token ids


def read_initial_weights(
    model: Transfusion, config: PretrainConfig, data: DataSet, ranks: Ranks
) -> tuple[str, TrainedRecords | None]:
    """Fill the model from `init_from`; return in words from where, and what those were trained on. Collective.

    Data, schedule and counters are the new run's, and image sizes may differ. Raises ValueError for weights of other
    shapes, or trained with another tokenizer, latent space or latent statistics (P10).
    """

    def read(stored: SavedModel) -> tuple[str, TrainedRecords | None]:
        _refuse_other_meaning(stored, config, data)
        parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        with torch.no_grad():
            chosen = read_saved(stored, config, parameters, model.vocab_size, ranks)
        if ranks.is_first and (changed := differences(meaning(stored.config), meaning(config))):
            log.warning("%s was trained with different settings: %s", stored.folder, "; ".join(changed.values()))
        return f"from the weights ({chosen}) of {stored.folder}, step {stored.step}", stored.trained_records

    assert config.init_from is not None
    return SavedModel.use(config.init_from, ranks, read, "init_from")


def read_llm(model: Transfusion, config: PretrainConfig, data: DataSet, ranks: Ranks) -> str:
    """Fill the model from `init_from_llm`, and by drawing what that lacks; return in words from where. Collective.

    Raises ValueError for a model whose tokenizer is not the data's, or whose vocabulary is larger (P10).
    """
    assert config.init_from_llm is not None
    folder = LLMFolder(config.init_from_llm)
    found, ours = folder.model.vocab_size, model.vocab_size
    if ours < found or not ranks.on_first(lambda: _is_tokenizer_of(folder.path, data.tokenizer)):
        raise ValueError(
            f"init_from_llm={config.init_from_llm} has a vocabulary of {found}, the data was encoded with "
            f"data.tokenizer={config.data.tokenizer} of {ours}, another one: expected the model's own, with BOI, EOI "
            f"and PAD; encode the data with tokenizer={config.init_from_llm}"
        )
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    folder.read(parameters, config.model, ours, config.seed)
    new = f", {ours - found} new ones at the mean" if ours > found else ""
    return f"from the {folder.model.family} in {folder.path} ({found:,} token ids{new})"


def _is_tokenizer_of(folder: Path, tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer gives the ids that the one in a model's folder does; True if there is none."""
    if find_copy(folder) is None:
        return True
    return np.array_equal(Tokenizer(folder).encode(PROBE), tokenizer.encode(PROBE))


def _refuse_other_meaning(stored: SavedModel, config: PretrainConfig, data: DataSet) -> None:
    """Raise ValueError where token ids or latents mean something else to the weights than in the data."""
    then, now = stored.latent_spec, data.latent_spec
    tokenizers = (stored.meta["fingerprint"]["tokenizer"], data.tokenizer.hash)
    meant = {"tokenizer": tuple(f"tokenizer {hashed}" for hashed in tokenizers)}
    if then is not None and now is not None:
        meant["vae"] = (then.images, now.images)
    for option, (old, new) in meant.items():
        if old != new:
            raise ValueError(
                f"init_from={config.init_from} was trained with {old}, the data was encoded with {new}; encode it with "
                f"the {option}= of {stored.folder}"
            )
    if then is not None and now is not None and (changed := differences(then.statistics, now.statistics)):
        raise ValueError(
            f"init_from={config.init_from} was trained with latents whitened differently: "
            f"{'; '.join(changed.values())}; run the data's train.encode command again with "
            f"stats_from={stored.folder}, which rewrites the manifest alone"
        )
