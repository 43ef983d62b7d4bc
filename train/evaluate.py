"""Evaluate a trained model on held-out scenes and shards: the judge's scores, text loss, noise error, captioning loss.

Writes evaluation.json (scores, what they were measured on, and what they depend on), examples.jsonl and the pictures
they name. Held-out folders that hold training records are refused.
"""

import json
import time
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path

from tqdm import tqdm

from data.durable import atomic_write
from data.manifest import Manifest
from data.pictures import encode_png
from data.storage import Location
from model.sampler import SamplerConfig
from train.checkpoints.trained_records import TrainedRecords
from train.config import load_config, run_program
from train.distributed.agreement import facts_of
from train.distributed.ranks import Ranks, init_ranks
from train.distributed.signals import StopSignal
from train.heldout import Heldout, HeldoutConfig
from train.inference.pipeline import BAR_FORMAT, Pipeline, PipelineConfig
from train.inference.saved_model import SavedModel
from train.inference.scene_scores import describe_scenes, judge_captions, judge_drawings, read_scenes, shares
from train.output_folder import make_writable


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(PipelineConfig):
    output: Location = "runs/evaluation"  # folder to write
    scenes: Location | None = None  # raw held-out scenes (train.scenes) to draw and to describe; null: no judge
    max_prompts: int = 200  # scenes of each split
    # Encoded folders by name, never trained on: text_loss and image_loss (drawing) with captions first, captioning_loss
    # with captions last.
    heldout: dict[str, Location] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_prompts < 1:
            raise ValueError(f"max_prompts={self.max_prompts}: expected at least 1")


CONFIG = EvaluateConfig
GROUP = True  # its ranks work together
# Of each rank: what they hold is compared.
OWN = ("checkpoint", "output", "scenes", "heldout.*", "device", "vae", "tokenizer")


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    fingerprints = {name: Manifest.load(path).content_hash for name, path in config.heldout.items()}
    contents = {f"heldout.{name} (contents)": value for name, value in fingerprints.items()}
    ranks = init_ranks(timeout_s=1800, device=config.device, facts={**facts_of(config, OWN), **contents})
    start = time.monotonic()
    generation, recipe, step = Pipeline.load(config, ranks)
    output = Path(config.output)
    ranks.on_first(lambda: make_writable(output))  # which alone writes there
    settings = {field.name: getattr(config, field.name) for field in fields(SamplerConfig)}
    results: dict = {"checkpoint": str(generation.stored.folder.resolve()), "step": step, "weights": generation.weights}
    results |= {"dtype": config.dtype, "seed": config.seed, "settings": settings, "world_size": ranks.world_size}
    results["data"] = {"training": _training_data(generation.stored)}
    if config.heldout:
        _refuse_trained(generation.stored, config.heldout, ranks)
        sources = HeldoutConfig(heldout=config.heldout)
        heldout = Heldout(sources, recipe, generation.vae_hash, ranks)
        results["data"]["heldout"] = {
            name: {"path": path, "fingerprint": fingerprints[name]} for name, path in config.heldout.items()
        }
        results["heldout"] = heldout.losses(generation.model, generation.stats, StopSignal())  # Ctrl-C ends it as ever
    if config.scenes is not None:
        items = read_scenes(Path(config.scenes), generation.resolution, config.max_prompts)
        ranks.require_alike({"scenes (contents)": str(zlib.crc32(repr([item.caption for item in items]).encode()))})
        mine = -(-len(items) // ranks.world_size)
        with tqdm(
            desc="evaluate", total=2 * mine, bar_format=BAR_FORMAT, disable=not ranks.is_first, mininterval=1
        ) as bar:
            drawn = judge_drawings(generation, items, config, config.seed, ranks, bar.update)
            told = judge_captions(generation, items, config, config.seed, ranks, bar.update)
        results["data"]["scenes"] = {"path": config.scenes, **describe_scenes(items)}
        results["text_to_image"] = shares(items, [verdict for _, verdict in drawn])
        results["image_to_text"] = shares(items, [verdict for _, verdict in told])
        if ranks.is_first:
            _write_examples(output, items, drawn, told)
    results["seconds"] = time.monotonic() - start
    if ranks.is_first:
        with atomic_write(output / "evaluation.json") as file:
            file.write(json.dumps(results, indent=1).encode())
        print(json.dumps(results, indent=1))
    ranks.close()
    return 0


def _training_data(stored: SavedModel) -> dict[str, dict[str, str]]:
    """Return path and fingerprint of each source that the model was trained on."""
    fingerprints = stored.meta["fingerprint"]  # of an export of an earlier version, the tokenizer's alone
    return {
        name: {"path": source.path, "fingerprint": fingerprints.get(f"source {number}", "unknown").split()[0]}
        for number, (name, source) in enumerate(stored.recipe.data.sources.items())
    }


def _refuse_trained(stored: SavedModel, heldout: dict[str, str], ranks: Ranks) -> None:
    """Raise ValueError for held-out data that the model was trained on (P10). Collective."""
    if stored.trained is not None:
        stored.trained.check(heldout, ranks)
        return
    try:
        sources = [Manifest.load(source.path) for source in stored.recipe.data.sources.values()]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{stored.folder} was written by an earlier version and does not say which records it was trained on, and "
            f"{error}: evaluate it where its training data is, or go on with its run for a step and export that"
        ) from None
    TrainedRecords.read(sources, heldout, ranks)


def _write_examples(output: Path, items: list, drawn: list, told: list) -> None:
    """Write each scene's drawn and true picture and both verdicts."""
    folder = output / "pictures"
    folder.mkdir(exist_ok=True)
    lines = []
    for i, (item, (picture, drawing), (caption, telling)) in enumerate(zip(items, drawn, told, strict=True)):
        for name, pixels in (("drawn", picture), ("true", item.picture)):
            with atomic_write(folder / f"{i:04d}-{name}.png") as file:
                file.write(encode_png(pixels))
        lines.append(
            {
                "split": item.split,
                "prompt": item.caption,
                "drawn": f"pictures/{i:04d}-drawn.png",
                "drawn_verdict": vars(drawing),
                "true": f"pictures/{i:04d}-true.png",
                "caption": caption,
                "caption_verdict": vars(telling),
            }
        )
    with atomic_write(output / "examples.jsonl") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


if __name__ == "__main__":
    run_program(main)
