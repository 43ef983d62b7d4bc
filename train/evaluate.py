"""Evaluate a trained model on held-out scenes and shards: the judge's scores, losses of text and images, x0 error.

Writes evaluation.json (scores, data and every setting that they depend on), examples.jsonl and its pictures. Held-out
folders with training records are refused.
"""

import json
import time
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.durable import atomic_write
from data.manifest import Manifest
from data.pictures import encode_png
from data.scene_judge import Verdict
from data.storage import Location
from model.sampler_config import SamplerConfig
from train.checkpoints.trained_records import TrainedRecords
from train.config import load_config, run_program
from train.distributed.agreement import facts_of
from train.distributed.ranks import Ranks, init_ranks
from train.distributed.signals import StopSignal
from train.heldout import Heldout, HeldoutConfig
from train.inference.pipeline import BAR_FORMAT, Pipeline, PipelineConfig
from train.inference.saved_model import SavedModel
from train.inference.scene_scores import SceneItem, describe_scenes, judge, read_scenes, shares
from train.output_folder import make_writable


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(PipelineConfig):
    output: Location = "runs/evaluation"  # folder to write
    scenes: Location | None = None  # raw held-out scenes (train.scenes) to draw and to describe; null: none
    max_prompts: int = 200  # scenes of each split, >= 1
    # Encoded folders by name, not trained on: text_loss and image_loss (drawing) with captions first, captioning_loss
    # with captions last, x0_error (drawing, comparable between predictions and schedules; docs/training.md).
    heldout: dict[str, Location] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_prompts < 1:
            raise ValueError(f"max_prompts={self.max_prompts}: expected at least 1")


CONFIG = EvaluateConfig
GROUP = True  # its ranks form a process group
# May differ between ranks; the contents are compared instead.
OWN = ("checkpoint", "output", "scenes", "heldout.*", "device", "vae", "tokenizer", "guide")


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    manifests = {name: Manifest.load(path) for name, path in config.heldout.items()}
    fingerprints = {name: manifest.content_hash for name, manifest in manifests.items()}
    contents = {f"heldout.{name} (contents)": value for name, value in fingerprints.items()}
    ranks = init_ranks(timeout_s=1800, device=config.device, facts={**facts_of(config, OWN), **contents})
    start = time.monotonic()
    pipeline = Pipeline.load(config, ranks)
    saved, sampler = pipeline.saved, config.suited_to(pipeline.config.diffusion)
    assert saved is not None
    output = Path(config.output)
    ranks.on_first(lambda: make_writable(output))  # only rank 0 writes
    trained = saved.meta["fingerprint"]  # exports of an earlier version have only the tokenizer's
    training = {
        name: {"path": source.path, "fingerprint": trained.get(f"source {number}", "unknown").split()[0]}
        for number, (name, source) in enumerate(saved.config.data.sources.items())
    }
    results: dict[str, Any] = {
        "checkpoint": str(saved.folder.resolve()),
        "step": saved.step,
        "weights": pipeline.weights,
        "guide": pipeline.describe_guide(),
        "dtype": config.dtype,
        "seed": config.seed,
        "settings": {field.name: getattr(sampler, field.name) for field in fields(SamplerConfig)},
        "world_size": ranks.world_size,
        "data": {"training": training},
    }
    if config.heldout:
        results["data"]["heldout"] = {
            name: {
                "path": path,
                "fingerprint": fingerprints[name],
                **({"captions": manifests[name].captions} if manifests[name].captions else {}),  # weights
            }
            for name, path in config.heldout.items()
        }
        _refuse_trained(saved, config.heldout, ranks)
        heldout = Heldout(HeldoutConfig(heldout=config.heldout), pipeline.config, pipeline.latent_spec, ranks)
        never = StopSignal()  # not installed: Ctrl-C ends the program
        results["heldout"] = heldout.losses(pipeline.model, pipeline.stats, never)
    if config.scenes is not None:
        items = read_scenes(Path(config.scenes), pipeline.latent_spec.resolution, config.max_prompts)
        results["data"]["scenes"] = {"path": config.scenes, **describe_scenes(items)}
        results |= _scene_scores(config, pipeline, items, output, ranks)
    results["seconds"] = time.monotonic() - start
    if ranks.is_first:
        with atomic_write(output / "evaluation.json") as file:
            file.write(json.dumps(results, indent=1).encode())
        print(json.dumps(results, indent=1))
    ranks.close()
    return 0


def _scene_scores(
    config: EvaluateConfig, pipeline: Pipeline, items: list[SceneItem], output: Path, ranks: Ranks
) -> dict[str, dict[str, float | None]]:
    """Return the judge's scores of drawn and of described scenes; write every example on rank 0. Collective."""
    ranks.require_alike({"scenes (contents)": str(zlib.crc32(repr([item.caption for item in items]).encode()))})
    total = 2 * -(-len(items) // ranks.world_size)
    with tqdm(desc="evaluate", total=total, bar_format=BAR_FORMAT, disable=not ranks.is_first, mininterval=1) as bar:
        drawn, described = judge(pipeline, items, config, config.seed, ranks, bar.update)
    if ranks.is_first:
        _write_examples(output, items, drawn, described)
    return {
        "text_to_image": shares(items, [verdict for _, verdict in drawn]),
        "image_to_text": shares(items, [verdict for _, verdict in described]),
    }


def _refuse_trained(saved: SavedModel, heldout: dict[str, str], ranks: Ranks) -> None:
    """Raise ValueError for held-out data that the model was trained on (P10). Collective."""
    if saved.trained_records is not None:
        saved.trained_records.check(heldout, ranks)
        return
    try:
        sources = [Manifest.load(source.path) for source in saved.config.data.sources.values()]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{saved.folder} was written by an earlier version and does not say which records it was trained on, and "
            f"{error}: evaluate it where its training data is, or train one more step and export that"
        ) from None
    TrainedRecords.read(sources, heldout, ranks)


def _write_examples(
    output: Path, items: list[SceneItem], drawn: list[tuple[np.ndarray, Verdict]], described: list[tuple[str, Verdict]]
) -> None:
    """Write each scene's drawn and true pictures, its caption and both verdicts."""
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    lines = []
    examples = zip(items, drawn, described, strict=True)
    for i, (item, (picture, drawn_verdict), (caption, caption_verdict)) in enumerate(examples):
        for name, pixels in (("drawn", picture), ("true", item.picture)):
            with atomic_write(folder / f"{i:04d}-{name}.png") as file:
                file.write(encode_png(pixels))
        lines.append(
            {
                "split": item.split,
                "prompt": item.caption,
                "drawn": f"pictures/{i:04d}-drawn.png",
                "drawn_verdict": vars(drawn_verdict),
                "true": f"pictures/{i:04d}-true.png",
                "caption": caption,
                "caption_verdict": vars(caption_verdict),
            }
        )
    with atomic_write(output / "examples.jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


if __name__ == "__main__":
    run_program(main)
