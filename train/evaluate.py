"""Evaluate a trained model on held-out scenes and shards: the judge's scores, text loss and noise error.

Writes evaluation.json (scores and the settings they depend on), examples.jsonl and the pictures they name.
"""

import json
import time
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path

from tqdm import tqdm

from data.manifest import Manifest
from data.pictures import encode_png
from data.shards import atomic_write
from data.storage import Location
from model.sampler import SamplerConfig
from train.agreement import facts_of
from train.config import load_config, run_program
from train.distributed import init_ranks
from train.evaluation import judge_captions, judge_drawings, read_scenes, shares
from train.generation import BAR_FORMAT, Generation, GenerationConfig
from train.heldout import Heldout, HeldoutConfig
from train.output_folder import make_writable
from train.signals import StopSignal


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(GenerationConfig):
    output: Location = "runs/evaluation"  # folder to write
    scenes: Location | None = None  # raw held-out scenes (train.scenes) to draw and to describe; null: no judge
    max_prompts: int = 200  # scenes of each split
    heldout: dict[str, Location] = field(default_factory=dict)  # encoded folders by name, for the held-out losses

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_prompts < 1:
            raise ValueError(f"max_prompts={self.max_prompts}: expected at least 1")


CONFIG = EvaluateConfig
GROUP = True  # its ranks work together
OWN = ("checkpoint", "output", "scenes", "heldout.*", "device", "vae")  # of each rank: what they hold is compared


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    contents = {f"heldout.{name} (contents)": Manifest.load(path).content_hash for name, path in config.heldout.items()}
    ranks = init_ranks(timeout_s=1800, device=config.device, facts={**facts_of(config, OWN), **contents})
    start = time.monotonic()
    generation, recipe, step = Generation.load(config, ranks)
    output = Path(config.output)
    ranks.on_first(lambda: make_writable(output))  # which alone writes there
    settings = {field.name: getattr(config, field.name) for field in fields(SamplerConfig)}
    results: dict = {"step": step, "seed": config.seed, "settings": settings, "weights": generation.weights}
    if config.heldout:
        sources = HeldoutConfig(heldout=config.heldout)
        of_model = recipe.data, recipe.seed, recipe.model.patch_size, recipe.diffusion, generation.vae_hash
        heldout = Heldout(sources, *of_model, ranks)
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
