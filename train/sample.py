"""Draw pictures from prompts and describe pictures, with a trained model.

Writes one PNG a picture, one JSON line a result (results.jsonl) and a contact sheet (sheet.png) into `output`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.pictures import decode_picture, encode_png
from data.shards import BadRecord, atomic_write
from train.config import load_config, run_program
from train.distributed import init_ranks
from train.figures import contact_sheet
from train.generation import Generation, GenerationConfig


@dataclass(frozen=True, kw_only=True)
class SampleConfig(GenerationConfig):
    output: str = "runs/samples"  # folder to write
    prompt: str | None = None  # one caption to draw
    prompts: list[str] = field(default_factory=list)  # captions to draw
    prompts_file: str | None = None  # text file with one caption a line
    pictures: list[str] = field(default_factory=list)  # picture files to describe
    n: int = 1  # pictures a prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"n={self.n}: expected at least 1")


CONFIG = SampleConfig


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    prompts = ([config.prompt] if config.prompt is not None else []) + list(config.prompts)
    if config.prompts_file is not None:
        prompts += [line.strip() for line in Path(config.prompts_file).read_text().splitlines() if line.strip()]
    prompts = [prompt for prompt in prompts for _ in range(config.n)]
    if not prompts and not config.pictures:
        raise ValueError('nothing to do: give prompt="...", prompts_file=FILE or pictures=[FILE,...]')
    ranks = init_ranks(timeout_s=600, device=config.device)
    generation, _, step = Generation.load(config.checkpoint, ranks, config.weights, config.vae)
    given = [_read_picture(Path(name), generation) for name in config.pictures]
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with tqdm(desc="sample", total=len(prompts) + len(given), unit="sample") as progress:
        drawn = generation.draw(prompts, config, config.seed, progress.update)
        captions = generation.describe(given, config, config.seed, progress.update)
    results = []
    for i, (prompt, picture) in enumerate(zip(prompts, drawn, strict=True)):
        name = f"{i:04d}.png"
        _save(picture, output / name)
        results.append({"prompt": prompt, "picture": name, "seed": config.seed, "index": i, "step": step})
    for name, caption in zip(config.pictures, captions, strict=True):
        results.append({"picture": name, "caption": caption, "seed": config.seed, "step": step})
        print(f"{name}: {caption}")
    with atomic_write(output / "results.jsonl") as file:
        file.write("".join(json.dumps(result) + "\n" for result in results).encode())
    sheet = contact_sheet([*drawn, *given], [*prompts, *captions], columns=5)
    with atomic_write(output / "sheet.png") as file:
        sheet.save(file, "PNG")
    print(f"sample: {len(results)} results of step {step} in {output}, contact sheet {output / 'sheet.png'}")
    ranks.close()
    return 0


def _read_picture(path: Path, generation: Generation) -> np.ndarray:
    try:
        return decode_picture({path.suffix.lstrip(".").lower(): path.read_bytes()}, generation.resolution, str(path))
    except BadRecord as error:
        raise ValueError(str(error)) from None


def _save(picture: np.ndarray, path: Path) -> None:
    with atomic_write(path) as file:
        file.write(encode_png(picture))


if __name__ == "__main__":
    run_program(main)
