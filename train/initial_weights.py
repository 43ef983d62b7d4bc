"""The weights that `init_from` names, read into a new run's model after checking that they mean the same there."""

import logging

import torch

from data.dataset import DataSet
from model.transfusion import Transfusion
from train.checkpoints.trained_records import TrainedRecords
from train.distributed.parallelize import plain_name
from train.distributed.ranks import Ranks
from train.inference.saved_model import SavedModel
from train.pretrain_config import PretrainConfig
from train.state import differences, meaning

log = logging.getLogger(__name__)


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
            chosen = stored.read(config.init_weights, parameters, ranks)
        if ranks.is_first and (changed := differences(meaning(stored.config), meaning(config))):
            log.warning("%s was trained with different settings: %s", stored.folder, "; ".join(changed.values()))
        return f"from the weights ({chosen}) of {stored.folder}, step {stored.step}", stored.trained_records

    assert config.init_from is not None
    return SavedModel.use(config.init_from, ranks, read, "init_from")


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
