"""Pictures of a published benchmark's prompts, for its own scorer. Batches whose files are there are not drawn again.

What the pictures depend on is kept beside their folder, so that a call with other settings is refused instead of mixing
them. Ranks divide the batches, which are the same on any number of them: so is every picture (P12).
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.durable import write_durably
from data.pictures import encode_jpeg, encode_png
from train.distributed.shared_folder import require_shared
from train.evaluation.benchmark_layouts import Benchmark, File, Layout, read_layout
from train.evaluation.drawn_folder import begin
from train.evaluation.part import Inputs, Part, fingerprint_of

SHOWN = 32  # files among the examples


def draw_benchmark(benchmark: Benchmark, prompts: Sequence[str], inputs: Inputs) -> Part:
    """Draw what is missing of output/BENCHMARK, the folder that its scorer reads; give no scores. Collective.

    Raises ValueError if the folder was begun with other settings, which output/BENCHMARK.json holds.
    """
    pipeline, ranks = inputs.pipeline, inputs.ranks
    layout = read_layout(benchmark, prompts)
    side = [length * pipeline.space.stride for length in pipeline.grid]
    if benchmark == "dpg" and side[0] != side[1]:
        raise ValueError(f"benchmark=dpg with pictures of {side}: its scorer cuts squares; expected a square grid")
    fingerprint = fingerprint_of("benchmark_prompts", layout, ranks)
    folder = inputs.output / benchmark
    ranks.on_first(lambda: _begin(folder, layout, {**inputs.drawn_by, "prompts": fingerprint}))
    require_shared(folder, "output", ranks)
    batches = list(_batches(layout.files, pipeline.batch_size))
    missing = ranks.on_first(
        lambda: [i for i, batch in enumerate(batches) if not all((folder / file.name).is_file() for file, _ in batch)]
    )
    mine = [batches[i] for i in missing[ranks.rank :: ranks.world_size]]
    with inputs.bar(benchmark, sum(file.pictures for batch in mine for file, _ in batch)) as progress:
        for batch in mine:
            numbers = [first + k for file, first in batch for k in range(file.pictures)]
            texts = [file.prompt for file, _ in batch for _ in range(file.pictures)]
            pictures = iter(pipeline.draw(texts, inputs.sampler, inputs.seed, progress.update, numbers))
            for file, _ in batch:
                of_file = [next(pictures) for _ in range(file.pictures)]
                if not (folder / file.name).is_file():
                    _write(folder / file.name, of_file)
    ranks.gather(None)  # all files are there before a line says so
    examples = [{"prompt": file.prompt, "drawn": f"{benchmark}/{file.name}"} for file in layout.files[:SHOWN]]
    data = {"name": benchmark, "folder": str(folder), "files": len(layout.files), "fingerprint": fingerprint}
    return Part({}, examples if ranks.is_first else [], data)


def _begin(folder: Path, layout: Layout, settings: dict[str, Any]) -> None:
    """Make the folder, its folders and its text files; see `begin`."""
    begin(folder, folder.with_suffix(".json"), settings)
    for path in {(folder / file.name).parent for file in layout.files}:
        path.mkdir(parents=True, exist_ok=True)
    for name, text in layout.beside.items():
        write_durably(folder / name, text.encode())


def _batches(files: Sequence[File], most: int) -> Iterator[list[tuple[File, int]]]:
    """Yield files, each with the number of its first picture, of at most `most` pictures together or one of more."""
    batch: list[tuple[File, int]] = []
    start = number = 0
    for file in files:
        if batch and number + file.pictures - start > most:
            yield batch
            batch, start = [], number
        batch.append((file, number))
        number += file.pictures
    if batch:
        yield batch


def _write(path: Path, pictures: Sequence[np.ndarray]) -> None:
    """Write uint8 [H, W, 3] pictures, a square number of them, as one file of the kind that its name says."""
    side = math.isqrt(len(pictures))
    rows = [np.concatenate(pictures[i * side : (i + 1) * side], axis=1) for i in range(side)]
    encode = encode_jpeg if path.suffix == ".jpg" else encode_png
    write_durably(path, encode(np.concatenate(rows)))
