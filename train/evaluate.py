"""Evaluate a trained model: held-out losses, multiple choice, captions, distances of drawn pictures, scenes,
edits of them and questions about them, and pictures and answers for the scorers of published benchmarks
(docs/evaluation.md).

Writes evaluation.json (every score with its 95 % interval, and what they depend on), examples.jsonl and its pictures.
Held-out folders with training records are refused. Under torchrun the ranks divide the work; their number changes no
score but for the order of float additions.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data.durable import write_durably
from data.manifest import Manifest
from data.storage import Location
from data.strict_json import dumps
from model.sampler_config import SamplerConfig
from train.checkpoints.folder_lock import FolderLock
from train.checkpoints.trained_records import TrainedRecords
from train.config import load_config, run_program
from train.distributed.agreement import facts_of, program_facts
from train.distributed.ranks import Ranks, init_ranks
from train.distributed.signals import StopSignal
from train.evaluation import answers, edits, scene_questions
from train.evaluation.answers import AnswersConfig, write_answers
from train.evaluation.benchmark_layouts import Benchmark, read_layout
from train.evaluation.benchmarks import draw_benchmark
from train.evaluation.captioned import read_captioned
from train.evaluation.captioning import CaptioningConfig, evaluate_captioning
from train.evaluation.edits import EditItem, evaluate_edits
from train.evaluation.generation import GenerationConfig, evaluate_generation
from train.evaluation.multiple_choice import evaluate_choices
from train.evaluation.paper_table import paper_table
from train.evaluation.part import Inputs, Part, bar_of
from train.evaluation.questions import read_multiple_choice
from train.evaluation.scene_questions import QuestionItem, evaluate_questions
from train.evaluation.scenes import evaluate_scenes
from train.evaluation.scores import Score, lines_of
from train.heldout import KINDS, Heldout, HeldoutConfig
from train.inference.pipeline import Pipeline, PipelineConfig
from train.inference.saved_model import SavedModel
from train.output_folder import make_writable


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(PipelineConfig):
    output: Location = "runs/evaluation"  # folder to write; the scores of an earlier call there are replaced
    scenes: Location | None = None  # raw held-out scenes (train.scenes) to draw and to describe; null: none
    edits: Location | None = None  # raw held-out edits (train.scenes) to carry out; null: none
    questions: Location | None = None  # raw held-out questions about scenes (train.scenes) to answer; null: none
    max_prompts: int = 200  # scenes of each split, edits and questions of each kind, >= 1
    # Encoded folders by name, not trained on: text_loss and image_loss (drawing) with captions first, captioning_loss
    # with captions last, x0_error (drawing, comparable between predictions and schedules; docs/training.md).
    heldout: dict[str, Location] = field(default_factory=dict)
    # Files of multiple-choice questions by name, JSON lines: ours, or the Llama-2 suite's as released.
    choices: dict[str, Location] = field(default_factory=dict)
    captioning: CaptioningConfig = field(default_factory=CaptioningConfig)  # pictures to describe, scored with CIDEr
    answers: AnswersConfig = field(default_factory=AnswersConfig)  # questions about pictures, for others' scorers
    benchmark: Benchmark | None = None  # draw its prompts into output/BENCHMARK for its own scorer; null: none
    benchmark_prompts: list[Location] = field(default_factory=list)  # its own prompt files (docs/evaluation.md)
    generation: GenerationConfig = field(default_factory=GenerationConfig)  # pictures against those of their captions
    table: bool = False  # print the paper's row beside the scores

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_prompts < 1:
            raise ValueError(f"max_prompts={self.max_prompts}: expected at least 1")
        if bad := [name for name in self.choices if "/" in name or len(name.encode()) > 100]:
            raise ValueError(f"choices.{bad[0]}: expected a short name without '/', as choices-NAME.jsonl is a file")
        if (self.benchmark is None) != (not self.benchmark_prompts):
            raise ValueError(
                f"benchmark={self.benchmark}, benchmark_prompts={self.benchmark_prompts}: expected both, or neither"
            )


CONFIG = EvaluateConfig
GROUP = True  # its ranks form a process group
SLOWEST_S = 86400.0  # that ranks wait for the slowest to draw its share; a lost one is noticed at once
# May differ between ranks; the contents are compared instead.
OWN = (
    *("checkpoint", "output", "device", "vae", "tokenizer", "guide", "base"),
    *("scenes", "edits", "questions", "heldout.*"),
    *("generation.pictures", "generation.annotations", "generation.models.*", "generation.clip"),
    *("choices.*", "captioning.pictures", "captioning.annotations", "benchmark_prompts"),
    *("answers.questions", "answers.pictures"),
)
# What a drawn picture depends on besides its caption and number.
DRAWN_BY = (
    *("weights", "weights_hash", "base", "guide", "dtype", "device", "seed"),
    *("settings", "resolution", "batch_size"),
)
LOCK = ".evaluation.lock"  # of the output: it may lie in a run folder, which has a lock of its own
PACKAGES = ("torch", "numpy", "pillow", "transformers", "diffusers")


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    _refuse_nothing(config)
    asked = _read_asked(config)
    manifests = {name: Manifest.load(path) for name, path in config.heldout.items()}
    contents = {f"heldout.{name} (contents)": manifest.content_hash for name, manifest in manifests.items()}
    facts = {**facts_of(config, OWN), **contents}
    ranks = init_ranks(timeout_s=1800, checkpoint_timeout_s=SLOWEST_S, device=config.device, facts=facts)
    start = time.monotonic()
    pipeline = Pipeline.load(config, ranks)
    asked.require_room(config.answers, config, pipeline)
    output = Path(config.output)
    locks: list[FolderLock] = []  # rank 0's, to be held to the end
    ranks.on_first(lambda: locks.append(FolderLock(make_writable(output), LOCK)))
    results = _describe(config, pipeline, ranks)
    scores: dict[str, Score] = {}
    examples: list[dict[str, Any]] = []
    if config.heldout:
        results["heldout"], results["data"]["heldout"] = _heldout_losses(config, manifests, pipeline, ranks)
        scores |= _heldout_scores(results["heldout"])
    for name, measure in _parts(config, asked, pipeline, results, output, ranks).items():
        part = measure()
        scores |= part.scores
        examples += part.examples
        results["data"][name] = part.data
    results["scores"] = {name: vars(score) for name, score in scores.items()}
    results["seconds"] = time.monotonic() - start
    if ranks.is_first:
        write_durably(output / "examples.jsonl", "".join(dumps(line) + "\n" for line in examples).encode())
        write_durably(output / "evaluation.json", dumps(results, indent=1).encode())
        what = f"evaluate: step {results['step']}, {results['weights']}: {output / 'evaluation.json'}"
        print("\n".join([*lines_of(scores), what]))
        if config.table:
            print(paper_table(pipeline.model, results))
    ranks.close()
    for lock in locks:
        lock.close()
    return 0


def _refuse_nothing(config: EvaluateConfig) -> None:
    """Raise ValueError for an evaluation that would score nothing."""
    scenes = (config.scenes, config.edits, config.questions)
    tasks = (config.heldout, *scenes, config.choices, config.captioning.pictures, config.generation.pictures)
    if not any((*tasks, config.answers.questions, config.benchmark)):
        raise ValueError(
            "nothing to score: give heldout.NAME=FOLDER, scenes=FOLDER, edits=FOLDER, questions=FOLDER, "
            "choices.NAME=FILE, captioning.pictures=FOLDER, generation.pictures=FOLDER, answers.questions=FILE or "
            "benchmark=NAME"
        )


@dataclass(frozen=True)
class Asked:
    """What is read once, before the work, and checked as soon as there is a model."""

    edits: list[EditItem]
    questions: list[QuestionItem]
    answers: list[dict[str, Any]]

    def require_room(self, config: AnswersConfig, sampler: SamplerConfig, pipeline: Pipeline) -> None:
        """Raise ValueError for what does not fit into the model's sequence (P10)."""
        edits.require_room(self.edits, pipeline.room(sampler))
        scene_questions.require_room(self.questions, pipeline, sampler)
        answers.require_room(self.answers, config, pipeline, sampler)


def _read_asked(config: EvaluateConfig) -> Asked:
    """Raise what reading the files of each part raises, now and not after hours in the others (P10)."""
    most = config.max_prompts
    of_edits = [] if config.edits is None else edits.read_edits(config.edits, most)
    of_scenes = [] if config.questions is None else scene_questions.read_scene_questions(config.questions, most)
    for path in config.choices.values():
        read_multiple_choice(Path(path))
    if config.benchmark is not None:
        read_layout(config.benchmark, config.benchmark_prompts)
    of_others = [] if config.answers.questions is None else answers.read_llava_questions(config.answers)
    for captioned in (config.captioning, config.generation):
        if captioned.annotations is not None:
            next(read_captioned(captioned), None)
    return Asked(of_edits, of_scenes, of_others)


def _parts(
    config: EvaluateConfig, asked: Asked, pipeline: Pipeline, described: dict[str, Any], output: Path, ranks: Ranks
) -> dict[str, Callable[[], Part]]:
    """Return what is asked for besides held-out losses, by its name in `data`, in the order of the work."""
    sampler, drawn_by = config.suited_to(pipeline.config.diffusion), {key: described[key] for key in DRAWN_BY}
    inputs = Inputs(pipeline, sampler, config.seed, output, ranks, bar_of(ranks), drawn_by)
    parts: dict[str, Callable[[], Part]] = {}
    if choices := config.choices:
        parts["choices"] = lambda: evaluate_choices(choices, inputs)
    if (captioning := config.captioning).pictures is not None:
        parts["captioning"] = lambda: evaluate_captioning(captioning, inputs)
    if config.answers.questions is not None:
        parts["answers"] = partial(write_answers, config.answers, asked.answers, inputs)
    if (benchmark := config.benchmark) is not None:
        parts["benchmark"] = lambda: draw_benchmark(benchmark, config.benchmark_prompts, inputs)
    if (scenes := config.scenes) is not None:
        parts["scenes"] = lambda: evaluate_scenes(scenes, config.max_prompts, inputs)
    if (folder := config.edits) is not None:
        parts["edits"] = partial(evaluate_edits, folder, asked.edits, inputs)
    if (folder := config.questions) is not None:
        parts["questions"] = partial(evaluate_questions, folder, asked.questions, inputs)
    if (generation := config.generation).pictures is not None:
        parts["generation"] = lambda: evaluate_generation(generation, inputs)
    return parts


def _describe(config: EvaluateConfig, pipeline: Pipeline, ranks: Ranks) -> dict[str, Any]:
    """Return what the scores depend on, but for the data that they are measured on. Collective."""
    saved = pipeline.saved
    assert saved is not None
    trained = saved.meta["fingerprint"]  # exports of an earlier version have only the tokenizer's
    training = {
        name: {"path": source.path, "fingerprint": trained.get(f"source {number}", "unknown").split()[0]}
        for number, (name, source) in enumerate(saved.config.data.sources.items())
    }
    height_width = None if pipeline.latents is None else [side * pipeline.space.stride for side in pipeline.grid]
    sampler = config.suited_to(pipeline.config.diffusion)
    return {
        "checkpoint": str(saved.folder.resolve()),
        "step": saved.step,
        "weights": pipeline.weights,
        "weights_hash": ranks.on_first(saved.weights_hash),
        "base": saved.meta.get("base"),  # where the frozen ones come from
        "guide": pipeline.describe_guide(),
        "dtype": config.dtype,
        "device": ranks.device.type,
        "seed": config.seed,
        "settings": {field.name: getattr(sampler, field.name) for field in fields(SamplerConfig)},
        "resolution": height_width,  # of drawn pictures
        "batch_size": config.batch_size,
        "world_size": ranks.world_size,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, **_code()},
        "data": {"training": training},
    }


def _code() -> dict[str, str]:
    return {name: value for name, value in program_facts().items() if name.startswith("code")}


def _heldout_losses(
    config: EvaluateConfig, manifests: dict[str, Manifest], pipeline: Pipeline, ranks: Ranks
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the losses of each held-out source (train/heldout.py), and what they were measured on. Collective."""
    saved = pipeline.saved
    assert saved is not None
    _refuse_trained(saved, config.heldout, ranks)
    measured_on = HeldoutConfig(heldout=config.heldout)
    heldout = Heldout(measured_on, pipeline.config, saved.latent_spec, ranks, intervals=True)
    losses = heldout.losses(pipeline.model, pipeline.stats, StopSignal())  # not installed: Ctrl-C ends the program
    assert isinstance(losses, dict)
    data = {
        name: {
            "path": path,
            "fingerprint": manifests[name].content_hash,
            **({"captions": manifests[name].captions} if manifests[name].captions else {}),  # weights
        }
        for name, path in config.heldout.items()
    }
    return losses, data


def _heldout_scores(losses: dict[str, Any]) -> dict[str, Score]:
    """Return held-out losses as scores; their intervals leave `losses`."""
    scores = {}
    for name, found in losses.items():
        intervals = found.pop("intervals")
        for kind in ("perplexity", *KINDS):
            if found[kind] is not None:
                low, high = intervals.get(kind, (None, None))
                scores[f"heldout/{name}/{kind}"] = Score(found[kind], low, high, found["documents"])
    return scores


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


if __name__ == "__main__":
    run_program(main)
