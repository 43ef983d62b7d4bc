"""Draw the embedded data set: a raw image-text WebDataset of captioned shapes, and text-only documents.

Writes under `output`: train/ and heldout/ (tars of KEY.png, KEY.txt, KEY.json, the img2dataset layout; the .json has
up to three wordings of the caption under "captions"), text/ and text_heldout/ (.jsonl of {"text": ...}), if asked for
edits/, edits_heldout/, questions/ and questions_heldout/ (.jsonl of rows as OmniGen2 and LLaVA have them, and their
pictures), and scenes.json last, which marks the folder complete. The same settings give the same bytes on any machine.
A second call reuses a complete folder; other settings replace it.
"""

import signal
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.conversations import IMAGE
from data.pictures import encode_png
from data.scene_edits import EditExample, edit_example
from data.scene_questions import QuestionsExample, questions_example
from data.scene_texts import text_documents
from data.scenes import Example, held_out_examples, make_splits, training_example
from data.shards import Record, write_shard
from data.storage import Location
from data.strict_json import dumps
from train.config import load_config, run_program
from train.output_folder import OutputFolder

DOCUMENTS_PER_FILE = 2000
INSTRUCTED = {  # folder -> the setting that says how many
    "edits": "num_edits",
    "edits_heldout": "num_heldout_edits",
    "questions": "num_questions",
    "questions_heldout": "num_heldout_questions",
}
FORMAT = 3  # of the folder and the drawing: changing it remakes finished folders


@dataclass(frozen=True, kw_only=True)
class ScenesConfig:
    output: Location = "runs/demo/scenes"  # folder to write; must be absent, empty or written by this program
    seed: int = 0  # of pictures, captions and splits; 0 or more
    resolution: int = 32  # pixels a side; a multiple of 8, at least 16
    num_train: int = 20000  # training pictures; 0 or more
    shard_size: int = 2000  # pictures, edits or pictures with questions a shard; 1..10000
    two_shapes_share: float = 0.15  # share of training pictures, edits and pictures with questions of two shapes; 0..1
    num_heldout_two_shapes: int = 120  # held-out pictures with two shapes; 0..200
    num_text: int = 4000  # text-only training documents; 0 or more
    num_text_heldout: int = 400  # text-only held-out documents; 0 or more
    num_edits: int = 0  # pictures with an instruction and the picture that it asks for; 0 or more
    num_heldout_edits: int = 0  # edits that training never shows; 0 or more
    num_questions: int = 0  # pictures with one to three questions and their answers; 0 or more
    num_heldout_questions: int = 0  # pictures with one question that training never asks about such a scene; 0 or more
    processes: int = 2  # processes that draw, without effect on what is drawn; 1 or more

    def __post_init__(self) -> None:
        limits = {"seed": (0, 2**63 - 1), "shard_size": (1, 10000), "processes": (1, 1024)}
        limits |= {"two_shapes_share": (0, 1), "num_heldout_two_shapes": (0, 200)}
        limits |= dict.fromkeys(("num_train", "num_text", "num_text_heldout", *INSTRUCTED.values()), (0, 10**8))
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)}: expected {low}..{high}")
        if self.resolution % 8 or self.resolution < 16:
            raise ValueError(f"resolution={self.resolution}: expected a multiple of 8, at least 16 (32 is the default)")


CONFIG = ScenesConfig


def main(argv: list[str]) -> None:
    config = load_config(CONFIG, argv)
    settings = {
        name: value
        for name, value in asdict(config).items()
        if name not in ("output", "processes")
        and (value or name not in INSTRUCTED.values())  # as folders without them say
    }
    output = OutputFolder(config.output, "train.scenes", "scenes.json", {"format": FORMAT, **settings})
    if output.is_complete():
        print(f"train.scenes: {output.path} is complete for these settings; reusing it")
        return
    partial = output.open_partial("train", "heldout", "text", "text_heldout")

    splits = make_splits(config.seed)
    folders = {"train": config.num_train} | {folder: getattr(config, name) for folder, name in INSTRUCTED.items()}
    _draw(partial, folders, config)
    held_out = list(held_out_examples(splits, config.resolution, config.num_heldout_two_shapes))
    write_held_out(partial / "heldout" / "00000.tar", splits.seed, held_out)
    training_texts, held_out_texts = text_documents(splits, config.num_text, config.num_text_heldout)
    _write_texts(partial / "text", training_texts)
    _write_texts(partial / "text_heldout", held_out_texts)

    counts = {"train": config.num_train, "text": len(training_texts), "text_heldout": len(held_out_texts)}
    counts |= {name: number for name, number in folders.items() if number}
    counts |= {f"heldout_{split}": number for split, number in Counter(split for split, _ in held_out).items()}
    combinations = {"trained": splits.trained, "held_out": splits.held_out}
    names = {name: [shape.combination for shape in shapes] for name, shapes in combinations.items()}
    output.commit({"counts": counts, "combinations": names})
    print(f"train.scenes: wrote {output.path}: " + ", ".join(f"{number} {name}" for name, number in counts.items()))


def _draw(output: Path, folders: dict[str, int], config: ScenesConfig) -> None:
    """Draw this many training pictures, edits and pictures with questions into folders of those names."""
    interval = 1 if sys.stdout.isatty() else 5  # seconds
    total = sum(folders.values())
    bar = tqdm(total=total, unit="picture", desc="train.scenes", mininterval=interval, file=sys.stdout)
    # Ctrl-C reaches the whole group; the parent decides.
    pool = ProcessPoolExecutor(config.processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with bar, pool:
        drawn = [
            pool.submit(_draw_shard, output / name, config, shard, range(first, min(first + config.shard_size, number)))
            for name, number in folders.items()
            for shard, first in enumerate(range(0, number, config.shard_size))
        ]
        try:
            for done in as_completed(drawn):
                bar.update(done.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _draw_shard(folder: Path, config: ScenesConfig, shard: int, indices: range) -> int:
    """Write one shard of the folder's kind; return its number of examples."""
    splits, kind = make_splits(config.seed), folder.name.removesuffix("_heldout")
    arguments = config.resolution, config.two_shapes_share
    if kind == "train":
        examples = ((i, training_example(splits, i, *arguments)) for i in indices)
        records = (
            _record(f"{shard:05d}{i - indices[0]:04d}", example, seed=splits.seed, index=i) for i, example in examples
        )
        write_shard(folder / f"{shard:05d}.tar", records)
        return len(indices)
    pictures, held_out = folder / f"{shard:05d}", folder.name.endswith("_heldout")
    pictures.mkdir(parents=True)
    rows: Iterator[dict] = (
        edit_row(pictures, i, edit_example(splits, i, *arguments, held_out))
        if kind == "edits"
        else questions_row(pictures, i, questions_example(splits, i, *arguments, held_out))
        for i in indices
    )
    pictures.with_suffix(".jsonl").write_text("".join(dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(indices)


def edit_row(pictures: Path, index: int, example: EditExample) -> dict[str, Any]:
    """Write an edit's two pictures into a folder; return its row as OmniGen2 has it, for a file beside the folder."""
    names = [_write_picture(pictures, f"{index}-{when}", getattr(example, when)) for when in ("before", "after")]
    row = {"input_images": names[:1], "instruction": example.instruction, "output_image": names[1]}
    return row | asdict(example.edit)


def questions_row(pictures: Path, index: int, example: QuestionsExample) -> dict[str, Any]:
    """Write a picture into a folder; return its row of questions as LLaVA has it, for a file beside the folder."""
    turns = [
        {"from": speaker, "value": value}
        for question, wording in example.asked
        for speaker, value in (("human", wording), ("gpt", question.answer))
    ]
    turns[0]["value"] = f"{IMAGE}\n" + turns[0]["value"]
    row = {"id": f"{index}", "image": _write_picture(pictures, f"{index}", example.picture), "conversations": turns}
    kinds = [question.kind for question, _ in example.asked]
    return row | {"kinds": kinds, "shapes": [asdict(shape) for shape in example.shapes]}


def _write_picture(folder: Path, name: str, picture: np.ndarray) -> str:
    """Write a picture; return its path from the folder's own folder."""
    (folder / f"{name}.png").write_bytes(encode_png(picture))
    return f"{folder.name}/{name}.png"


def write_held_out(path: Path, seed: int, examples: list[tuple[str, Example]]) -> None:
    """Write held-out (split, example) pairs as one shard."""
    records = (
        _record(f"{0:05d}{index:04d}", example, seed=seed, index=index, split=split)
        for index, (split, example) in enumerate(examples)
    )
    write_shard(path, records)


def _record(key: str, example: Example, **extra: int | str) -> Record:
    """Lay an example out as img2dataset does: KEY.png, KEY.txt, KEY.json."""
    about = {
        "key": key,
        "caption": example.caption,
        "captions": example.captions,
        "width": example.picture.shape[1],
        "height": example.picture.shape[0],
        "shapes": [asdict(shape) for shape in example.shapes],
        "combination": " + ".join(shape.combination for shape in example.shapes),
        "wording": example.wording,
        "two_shapes": len(example.shapes) == 2,
    }
    return {
        "__key__": key.encode(),
        "png": encode_png(example.picture),
        "txt": example.caption.encode(),
        "json": dumps(about | extra).encode(),
    }


def _write_texts(folder: Path, documents: list[str]) -> None:
    for number, first in enumerate(range(0, len(documents), DOCUMENTS_PER_FILE)):
        lines = (dumps({"text": text}) + "\n" for text in documents[first : first + DOCUMENTS_PER_FILE])
        (folder / f"{number:05d}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    run_program(main)
