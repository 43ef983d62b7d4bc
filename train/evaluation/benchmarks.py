"""Pictures of a published benchmark's prompts, for its own scorer. Files that are there are not drawn again.

What the pictures depend on is kept beside their folder, so that a call with other settings is refused instead of mixing
them. Ranks divide the files; a picture is the same whichever rank draws it and whenever (P12).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.durable import write_durably
from data.pictures import encode_jpeg, encode_png
from model.sampler_config import SamplerConfig
from train.distributed.ranks import Ranks
from train.distributed.shared_folder import require_shared
from train.evaluation.benchmark_layouts import Benchmark, File, Layout, read_layout
from train.evaluation.part import Bar, Part
from train.inference.pipeline import Pipeline
from train.output_folder import make_writable

SHOWN = 32  # files among the examples


def draw_benchmark(
    pipeline: Pipeline,
    benchmark: Benchmark,
    prompts: Sequence[str],
    sampler: SamplerConfig,
    seed: int,
    output: Path,
    ranks: Ranks,
    bar: Bar,
) -> Part:
    """Draw what is missing of output/BENCHMARK, the folder that its scorer reads; give no scores. Collective.

    Raises ValueError if the folder was begun with other settings, which `output/BENCHMARK.json` holds.
    """
    layout = read_layout(benchmark, prompts)
    side = [length * pipeline.space.stride for length in pipeline.grid]
    if benchmark == "dpg" and side[0] != side[1]:
        raise ValueError(f"benchmark=dpg with pictures of {side}: its scorer cuts squares; expected a square grid")
    record = _record(pipeline, benchmark, layout, sampler, seed)
    ranks.require_alike({"benchmark_prompts (contents)": record["prompts"]})
    folder = output / benchmark
    ranks.on_first(lambda: _begin(folder, layout, record))
    require_shared(folder, "output", ranks)
    missing = ranks.on_first(lambda: [i for i, file in enumerate(layout.files) if not (folder / file.name).is_file()])
    firsts = np.cumsum([0, *(file.pictures for file in layout.files)]).tolist()  # sample numbers
    mine = missing[ranks.rank :: ranks.world_size]
    with bar(benchmark, sum(layout.files[i].pictures for i in mine)) as progress:
        for chunk in _chunks(mine, layout.files, pipeline.batch_size):
            numbers = [firsts[i] + k for i in chunk for k in range(layout.files[i].pictures)]
            texts = [layout.files[i].prompt for i in chunk for _ in range(layout.files[i].pictures)]
            pictures = iter(pipeline.draw(texts, sampler, seed, progress.update, numbers))
            for i in chunk:
                _write(folder / layout.files[i].name, [next(pictures) for _ in range(layout.files[i].pictures)])
    ranks.gather(None)  # all files are there before a line says so
    examples = [{"prompt": file.prompt, "drawn": f"{benchmark}/{file.name}"} for file in layout.files[:SHOWN]]
    data = {"name": benchmark, "folder": str(folder), "files": len(layout.files), "fingerprint": record["prompts"]}
    return Part({}, examples if ranks.is_first else [], data)


def _record(pipeline: Pipeline, benchmark: str, layout: Layout, sampler: SamplerConfig, seed: int) -> dict[str, Any]:
    """Return what the pictures depend on."""
    saved, guide = pipeline.saved, pipeline.describe_guide()
    assert saved is not None
    record = {
        "benchmark": benchmark,
        "prompts": hashlib.sha256(repr(layout).encode()).hexdigest()[:16],
        "checkpoint": saved.identity,
        "step": saved.step,
        "weights": pipeline.weights,
        "guide": guide and {**guide, "checkpoint": pipeline.guide and pipeline.guide.saved.identity},
        "dtype": str(next(pipeline.model.parameters()).dtype).removeprefix("torch."),
        "size": [side * pipeline.space.stride for side in pipeline.grid],
        "seed": seed,
        **vars(sampler),
    }
    return json.loads(json.dumps(record))  # as it is read back


def _begin(folder: Path, layout: Layout, record: dict[str, Any]) -> None:
    """Make the folder and its text files; raise ValueError for one that was begun with other settings."""
    path = folder.with_suffix(".json")
    make_writable(folder)
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        if changed := [key for key in record if before.get(key) != record[key]]:
            found = ", ".join(f"{key} was {before.get(key)}, now {record[key]}" for key in changed)
            raise ValueError(f"{folder} holds pictures of other settings ({found}); choose another output or remove it")
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and {path.name} beside it is missing; choose another output")
    write_durably(path, json.dumps(record, indent=1).encode())
    for name in {Path(file.name).parent for file in layout.files}:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, text in layout.beside.items():
        write_durably(folder / name, text.encode())


def _chunks(numbers: Sequence[int], files: Sequence[File], most: int) -> Iterator[list[int]]:
    """Yield files of at most `most` pictures together; one of more by itself."""
    chunk: list[int] = []
    for number in numbers:
        if chunk and sum(files[i].pictures for i in [*chunk, number]) > most:
            yield chunk
            chunk = []
        chunk.append(number)
    if chunk:
        yield chunk


def _write(path: Path, pictures: Sequence[np.ndarray]) -> None:
    """Write uint8 [H, W, 3] pictures, a square number of them, as one file of the kind that its name says."""
    side = math.isqrt(len(pictures))
    rows = [np.concatenate(pictures[i * side : (i + 1) * side], axis=1) for i in range(side)]
    encode = encode_jpeg if path.suffix == ".jpg" else encode_png
    write_durably(path, encode(np.concatenate(rows)))
