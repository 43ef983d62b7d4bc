"""Each benchmark's folder is the one that its scorer's code reads; what is drawn is not drawn again."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.sampler_config import SamplerConfig
from tests.ranks import run_ranks
from tests.runs import DrawingRun
from tests.test_pipeline import load
from train.distributed.ranks import Ranks, alone
from train.evaluation.benchmark_layouts import EXPECTED, READERS, Benchmark, read_layout
from train.evaluation.benchmarks import draw_benchmark
from train.evaluation.part import Inputs, Part, bar_of
from train.inference.pipeline import Pipeline, PipelineConfig

SAMPLER = SamplerConfig(sampler="ddim", steps=1, guidance=1.0)
TEXTS = ["a red circle", "3 small blue squares", "a large circle"]


def write_prompts(folder: Path, benchmark: str) -> list[str]:
    """Write TEXTS in the form of the benchmark's own prompt files; return their paths."""
    folder.mkdir(parents=True)
    rows = {
        "geneval": "".join(json.dumps({"tag": "colors", "include": [], "prompt": text}) + "\n" for text in TEXTS),
        "t2i_compbench": "".join(f"{text}\tseen\n" for text in TEXTS),
        "hpsv2": json.dumps(TEXTS),
        "wise": json.dumps([{"Prompt": t, "prompt_id": 401 + i, "Explanation": "x"} for i, t in enumerate(TEXTS)]),
        "mjhq30k": json.dumps({f"ab{i}": {"category": "art", "prompt": text} for i, text in enumerate(TEXTS)}),
    }
    if benchmark == "dpg":
        for name, text in zip(("1", "256", "COCOval2014_3"), TEXTS, strict=True):
            (folder / f"{name}.txt").write_text(text)
        return [str(folder)]
    names = {"geneval": "evaluation_metadata.jsonl", "t2i_compbench": "color_val.txt", "hpsv2": "anime.json"}
    path = folder / names.get(benchmark, "prompts.json")
    path.write_text(rows[benchmark])
    return [str(path)]


@pytest.fixture(scope="module")
def pipeline(drawn: DrawingRun) -> Pipeline:
    return load(drawn.run_dir, batch_size=5)


def draw(pipeline: Pipeline, benchmark: Benchmark, prompts: list[str], output: Path, seed: int = 3) -> Part:
    inputs = Inputs(pipeline, SAMPLER, seed, output, alone(), bar_of(alone()), {"seed": seed})
    return draw_benchmark(benchmark, prompts, inputs)


def draw_on_ranks(ranks: Ranks, run_dir: Path, benchmark: Benchmark, prompts: list[str], output: Path) -> None:
    pipeline = Pipeline.load(PipelineConfig(checkpoint=str(run_dir), device="cpu"), ranks)
    draw_benchmark(benchmark, prompts, Inputs(pipeline, SAMPLER, 3, output, ranks, bar_of(ranks), {}))


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


GENEVAL = ["metadata.jsonl", *(f"samples/000{k}.png" for k in range(4))]
LAYOUTS = {
    "geneval": [f"0000{i}/{name}" for i in range(3) for name in GENEVAL],
    "dpg": ["1.png", "256.png", "COCOval2014_3.png"],
    "t2i_compbench": sorted(f"samples/{text}_{10 * i + k:06d}.png" for i, text in enumerate(TEXTS) for k in range(10)),
    "hpsv2": [f"anime/0000{i}.jpg" for i in range(3)],
    "wise": ["401.png", "402.png", "403.png"],
    "mjhq30k": ["ab0.png", "ab1.png", "ab2.png"],
}


@pytest.mark.parametrize("benchmark", READERS)
def test_the_layout_is_the_one_that_the_scorer_reads(benchmark: Benchmark, tmp_path: Path) -> None:
    layout = read_layout(benchmark, write_prompts(tmp_path / "prompts", benchmark))
    assert sorted([*(file.name for file in layout.files), *layout.beside]) == LAYOUTS[benchmark]
    prompts = {file.prompt for file in layout.files}
    assert prompts == set(TEXTS) and all(file.pictures == (4 if benchmark == "dpg" else 1) for file in layout.files)
    (tmp_path / "other").write_text('{"x": 1}' if benchmark != "t2i_compbench" else "a/b\n")
    with pytest.raises(ValueError, match=r"benchmark_prompts=.*(expected|empty)"):
        read_layout(benchmark, [str(tmp_path / "other")])
    with pytest.raises(FileNotFoundError if benchmark != "dpg" else ValueError, match="nowhere"):
        read_layout(benchmark, ["/nowhere"])
    assert EXPECTED.keys() == READERS.keys()


def test_genevals_scorer_finds_the_metadata_and_samples_of_each_prompt(pipeline: Pipeline, tmp_path: Path) -> None:
    """As evaluation/evaluate_images.py walks the folder; the prompt and the number decide each picture."""
    prompts = write_prompts(tmp_path / "prompts", "geneval")
    part = draw(pipeline, "geneval", prompts, tmp_path)
    found = {}
    for folder in (tmp_path / "geneval").iterdir():
        if folder.is_dir() and folder.name.isdigit():
            prompt = json.loads((folder / "metadata.jsonl").read_text())["prompt"]
            samples = [path for path in (folder / "samples").iterdir() if re.match(r"\d+\.png", path.name)]
            found[prompt] = [pixels(path) for path in sorted(samples)]
    expected = pipeline.draw([text for text in TEXTS for _ in range(4)], SAMPLER, 3)
    drawings = [picture for text in TEXTS for picture in found[text]]
    assert all(np.array_equal(*pair) for pair in zip(drawings, expected, strict=True))
    assert not part.scores and part.data["files"] == 12 and len(part.examples) == 12
    assert all((tmp_path / line["drawn"]).is_file() for line in part.examples)


def test_dpgs_scorer_cuts_four_pictures_from_a_file_named_like_the_prompt(pipeline: Pipeline, tmp_path: Path) -> None:
    draw(pipeline, "dpg", write_prompts(tmp_path / "prompts", "dpg"), tmp_path)
    grid, side = pixels(tmp_path / "dpg" / "256.png"), 32
    corners = [(0, 0), (0, side), (side, 0), (side, side)]  # (top, left), in the order of compute_dpg_bench.py
    expected = pipeline.draw([TEXTS[1]] * 4, SAMPLER, 3, numbers=range(4, 8))
    assert grid.shape == (64, 64, 3)
    for (top, left), picture in zip(corners, expected, strict=True):
        assert np.array_equal(grid[top : top + side, left : left + side], picture)
    wide, prompts = replace(pipeline, grid=(4, 8)), write_prompts(tmp_path / "more", "dpg")
    with pytest.raises(ValueError, match="cuts squares"):
        draw_benchmark("dpg", prompts, Inputs(wide, SAMPLER, 3, tmp_path, alone(), bar_of(alone()), {}))


def test_jpegs_are_jpegs(pipeline: Pipeline, tmp_path: Path) -> None:
    draw(pipeline, "hpsv2", write_prompts(tmp_path / "prompts", "hpsv2"), tmp_path)
    assert files_of(tmp_path / "hpsv2") == LAYOUTS["hpsv2"]
    assert Image.open(tmp_path / "hpsv2" / "anime" / "00002.jpg").format == "JPEG"


def test_an_interrupted_benchmark_goes_on_and_other_settings_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts", "geneval")
    draw(pipeline, "geneval", prompts, tmp_path)
    files = sorted((tmp_path / "geneval").rglob("*.png"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    for path in files[::5]:
        path.unlink()
    (files[0].parent / f".{files[0].name}.new").write_bytes(b"cut short by a kill")
    draw(replace(pipeline, batch_size=3), "geneval", prompts, tmp_path)
    assert files_of(tmp_path / "geneval") == LAYOUTS["geneval"]
    assert all(path.read_bytes() == before[path][0] for path in files)
    kept = [path for path in files if path.stat().st_mtime_ns == before[path][1]]
    assert kept == [path for i, path in enumerate(files) if i % 5]
    with pytest.raises(ValueError, match="geneval holds pictures drawn with another value of seed"):
        draw(pipeline, "geneval", prompts, tmp_path, seed=4)
    Path(prompts[0]).write_text('{"prompt": "a circle"}')
    with pytest.raises(ValueError, match="drawn with another value of prompts"):
        draw(pipeline, "geneval", prompts, tmp_path)
    (tmp_path / "geneval.json").unlink()
    with pytest.raises(ValueError, match="is not empty"):
        draw(pipeline, "geneval", prompts, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["geneval", "dpg"])
def test_any_number_of_ranks_draws_the_same_files(benchmark: Benchmark, drawn: DrawingRun, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts", benchmark)
    for world_size in (1, 3):
        run_ranks(draw_on_ranks, world_size, drawn.run_dir, benchmark, prompts, tmp_path / str(world_size))
    one, three = (tmp_path / name / benchmark for name in ("1", "3"))
    assert files_of(one) == files_of(three) == LAYOUTS[benchmark]
    assert all((one / name).read_bytes() == (three / name).read_bytes() for name in LAYOUTS[benchmark])
