"""The folders that the scorers of published benchmarks read: which pictures of which prompts under which names.

Each layout was read from the scorer's own code, and takes that benchmark's own prompt files (docs/evaluation.md). A
picture is drawn from its prompt and its number, so neither depends on what else is drawn.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from train.evaluation.texts import OTHER_FORM, read_lines, text_of

Benchmark = Literal["geneval", "dpg", "t2i_compbench", "hpsv2", "wise", "mjhq30k"]
LONGEST = 240  # bytes of a file's name: most disks take 255, of which the name while it is written needs some


@dataclass(frozen=True)
class File:
    """A file to draw: one picture of `prompt`, or several in a square grid, row by row."""

    name: str  # below the benchmark's folder
    prompt: str
    pictures: int = 1


@dataclass(frozen=True)
class Layout:
    files: list[File]
    beside: dict[str, str] = field(default_factory=dict)  # contents of the text files among them, by name


def read_layout(benchmark: Benchmark, prompts: Sequence[str]) -> Layout:
    """Return the layout for a benchmark's prompt files.

    Raises FileNotFoundError, or ValueError for files of another form, without prompts, or with files of equal names.
    """
    files: list[File] = []
    beside: dict[str, str] = {}
    for path in map(Path, prompts):
        try:
            layout = READERS[benchmark](path)
        except OTHER_FORM as error:
            raise ValueError(
                f"benchmark_prompts={path}: not the prompts of {benchmark} ({type(error).__name__}: {error}); "
                f"expected {EXPECTED[benchmark]}"
            ) from None
        files += layout.files
        beside |= layout.beside
    names = [file.name for file in files]
    if not files or not all(file.prompt.strip() for file in files):
        raise ValueError(f"benchmark_prompts={list(prompts)}: empty prompts, or none; expected {EXPECTED[benchmark]}")
    if (bad := next((name for name in names if not _is_safe(name)), None)) is not None:
        raise ValueError(
            f"benchmark_prompts={list(prompts)}: {bad[:80]!r} would be a file; expected a name below the folder, of at "
            f"most {LONGEST} bytes a part"
        )
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"benchmark_prompts={list(prompts)}: {twice} is named twice; give each file of prompts once")
    return Layout(files, beside)


def _geneval(path: Path) -> Layout:
    """NNNNN/metadata.jsonl is a line of the file; four pictures are in NNNNN/samples."""
    files, beside = [], {}
    for index, (_, line) in enumerate(read_lines(path)):
        beside[f"{index:05d}/metadata.jsonl"] = line
        prompt = text_of(json.loads(line)["prompt"])
        files += [File(f"{index:05d}/samples/{i:04d}.png", prompt) for i in range(4)]
    return Layout(files, beside)


def _dpg(path: Path) -> Layout:
    """The four pictures of PROMPT.txt are a grid of two by two in PROMPT.png."""
    if not path.is_dir():
        raise TypeError("no folder")
    texts = sorted(path.glob("*.txt"))
    return Layout([File(f"{text.stem}.png", text.read_text(encoding="utf-8").strip(), 4) for text in texts])


def _t2i_compbench(path: Path) -> Layout:
    """Ten pictures a prompt; the scorers take the prompt from the name, up to the first underscore."""
    prompts = [line.split("\t")[0].strip() for _, line in read_lines(path)]
    if bad := next((prompt for prompt in prompts if "/" in prompt or "_" in prompt), None):
        raise ValueError(f"{bad!r} cannot be a file's name: it has '/' or '_'")
    names = (prompt for prompt in prompts for _ in range(10))
    return Layout([File(f"samples/{prompt}_{number:06d}.png", prompt) for number, prompt in enumerate(names)])


def _hpsv2(path: Path) -> Layout:
    """STYLE.json lists the prompts of STYLE/NNNNN.jpg."""
    prompts = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(prompts, list):
        raise TypeError("no list")
    return Layout([File(f"{path.stem}/{index:05d}.jpg", text_of(prompt)) for index, prompt in enumerate(prompts)])


def _wise(path: Path) -> Layout:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return Layout([File(f"{int(row['prompt_id'])}.png", text_of(row["Prompt"])) for row in rows])


def _mjhq30k(path: Path) -> Layout:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return Layout([File(f"{text_of(name)}.png", text_of(row["prompt"])) for name, row in rows.items()])


def _is_safe(name: str) -> bool:
    """Return whether a name, which may come from a prompt file, is that of a file below the folder."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\0" in part or len(part.encode()) > LONGEST for part in parts)


READERS: dict[Benchmark, Callable[[Path], Layout]] = {
    "geneval": _geneval,
    "dpg": _dpg,
    "t2i_compbench": _t2i_compbench,
    "hpsv2": _hpsv2,
    "wise": _wise,
    "mjhq30k": _mjhq30k,
}
EXPECTED: dict[Benchmark, str] = {
    "geneval": "its prompts/evaluation_metadata.jsonl",
    "dpg": "the folder dpg_bench/prompts of ELLA",
    "t2i_compbench": "one of its examples/dataset/*_val.txt",
    "hpsv2": "anime.json, concept-art.json, paintings.json and photo.json of HPDv2's benchmark",
    "wise": "its data/cultural_common_sense.json, spatio-temporal_reasoning.json and natural_science.json",
    "mjhq30k": "its meta_data.json",
}
