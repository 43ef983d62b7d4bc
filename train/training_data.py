"""The data that a run trains on: opened, checked against the config, and described so that ranks can compare it."""

from data.dataset import DataSet, open_data
from data.manifest import Manifest
from train.distributed.agreement import facts_of
from train.pretrain_config import PretrainConfig

# Settings that may differ between ranks: devices, paths (their contents are compared), how data is read.
MAY_DIFFER = (
    *("run_dir", "device", "vae", "data.tokenizer", "data.sources.*.path", "evaluation.heldout.*"),
    *("data.cache_*", "data.num_workers", "data.prefetch_steps", "data.read_*"),
)


def open_training_data(config: PretrainConfig) -> DataSet:
    """Open the data; raise ValueError or OSError for what this run cannot train on."""
    data = open_data(config.data, config.seed, config.model.patch_size)
    spec = data.latent_spec
    if spec is not None and spec.channels != config.model.latent_channels:
        raise ValueError(
            f"model.latent_channels={config.model.latent_channels}, but the data's images, {spec.images}, have "
            f"{spec.channels} channels; set model.latent_channels={spec.channels}"
        )
    too_long, most = data.too_long, config.data.max_bad_documents
    if len(too_long) > most:
        raise ValueError(
            f"{len(too_long)} documents are longer than data.sequence_length={config.data.sequence_length}, more than "
            f"data.max_bad_documents={most} (and only texts may be cut): {'; '.join(too_long[:4])}; use longer "
            "sequences, shorten their captions, or allow more"
        )
    return data


def facts_in_common(config: PretrainConfig, data: DataSet) -> dict[str, str]:
    """Return what must be the same on all ranks: settings, and the contents of the paths among them."""
    contents = {"data.tokenizer": data.tokenizer.hash}
    for name, source in zip(config.data.sources, data.sources, strict=True):
        contents[f"data.sources.{name}.path (number, contents)"] = f"{source.number}, {source.manifest.content_hash}"
    for name, path in config.evaluation.measured.items():
        contents[f"evaluation.heldout.{name} (contents)"] = Manifest.load(path).content_hash
    return {**facts_of(config, MAY_DIFFER), **contents}
