"""Edits and questions as train.scenes writes them: encoding reads them with their roles, and evaluation scores them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from bench.ranks import ProgramRanks
from data.pictures import decode_picture
from data.raw import read_raw
from data.scene_edits import KINDS, edit_example
from data.scene_questions import KINDS as QUESTION_KINDS
from data.scenes import make_splits
from data.shards import BadRecords
from model.sampler_config import SamplerConfig
from tests.ranks import run_ranks
from tests.runs import DrawingRun, expect
from tests.test_pipeline import load
from train import evaluate, report, scenes
from train.distributed.ranks import Ranks, alone
from train.evaluation.answers import AnswersConfig
from train.evaluation.edits import evaluate_edits, read_edits
from train.evaluation.part import Inputs, Part, bar_of
from train.evaluation.scene_questions import evaluate_questions, read_scene_questions

FOLDERS = {
    "edits": 40,
    "edits_heldout": 19,
    "questions": 20,
    "questions_heldout": 31,
}


@pytest.fixture(scope="module")
def drawn_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("instructions") / "scenes"
    numbers = [f"{scenes.INSTRUCTED[folder]}={number}" for folder, number in FOLDERS.items()]
    none = ["num_train=0", "num_text=0", "num_text_heldout=0", "num_heldout_two_shapes=0", "two_shapes_share=0.5"]
    scenes.main([f"output={output}", *numbers, *none, "shard_size=25", "processes=1"])
    return output


def pixels(data: bytes) -> np.ndarray:
    return decode_picture(data, [(32, 32)], "")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_as_many_as_asked_for_are_written_in_shards(drawn_scenes: Path) -> None:
    assert {folder: len(rows(drawn_scenes / folder)) for folder in FOLDERS} == FOLDERS
    assert sorted(path.name for path in (drawn_scenes / "edits").glob("*.jsonl")) == ["00000.jsonl", "00001.jsonl"]
    example, row = edit_example(make_splits(0), 30, 32, 0.5), rows(drawn_scenes / "edits")[30]
    for when, name in (("before", row["input_images"][0]), ("after", row["output_image"])):
        assert np.array_equal(pixels((drawn_scenes / "edits" / name).read_bytes()), getattr(example, when))
    assert row["instruction"] == example.instruction


def test_encoding_reads_an_edit_as_context_and_target_and_questions_as_a_conversation(drawn_scenes: Path) -> None:
    found = {}
    for name in ("edits", "questions"):
        path, bad = drawn_scenes / name / "00000.jsonl", BadRecords(max_fraction=0.0)
        found[name] = list(read_raw(path, str(path), bad))
        bad.check(final=True)
        of_file = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(found[name]) == len(of_file)
        for document, row in zip(found[name], of_file, strict=True):
            if name == "edits":
                before, instruction, after = document.segments
                assert document.roles == ("context", "context", "target") and instruction == row["instruction"]
                assert isinstance(after, bytes) and pixels(after).shape == (32, 32, 3)
                assert before == (path.parent / row["input_images"][0]).read_bytes()
            else:
                said = [part for message in document.messages for part in message.parts if isinstance(part, str)]
                assert said == [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
                assert [m.speaker for m in document.messages] == ["user", "assistant"] * (len(said) // 2)


@dataclass
class Knowing:
    """What a perfect model would make of each item, or one that answers with another item's."""

    folder: Path
    shift: int = 0
    latent_spec = type("Spec", (), {"resolution": 32})

    def edit(self, edits: list, sampler: object, seed: int, done: object, numbers: range) -> list[np.ndarray]:
        items = read_edits(str(self.folder / "edits_heldout"), 100)
        for ((given,), instruction), number in zip(edits, numbers, strict=True):
            assert np.array_equal(given, pixels(items[number].before))
            assert instruction == items[number].instruction
        return [pixels(items[(number + self.shift) % len(items)].after) for number in numbers]

    def reconstruct(self, pictures: list[np.ndarray], seed: int, numbers: range) -> list[np.ndarray]:
        return pictures

    def answer(self, questions: list, sampler: object, seed: int, done: object, numbers: range) -> list[str]:
        items = read_scene_questions(str(self.folder / "questions_heldout"), 100)
        for ((given,), question), number in zip(questions, numbers, strict=True):
            assert np.array_equal(given, pixels(items[number].picture)) and question == items[number].question
        return [f" {items[(number + self.shift) % len(items)].answer.upper()}." for number in numbers]


def _evaluated(ranks: Ranks, folder: Path, output: Path) -> list[list[Part]]:
    found = []
    for shift in (0, 1):
        inputs = Inputs(Knowing(folder, shift), SamplerConfig(), 0, output, ranks, bar_of(ranks), {})
        edits = evaluate_edits("edits", read_edits(str(folder / "edits_heldout"), 100), inputs)
        asked = read_scene_questions(str(folder / "questions_heldout"), 100)
        found.append([edits, evaluate_questions("asked", asked, inputs)])
    if ranks.world_size > 1:
        others = read_edits(str(folder / ("edits" if ranks.rank else "edits_heldout")), 100)
        with pytest.raises(ValueError, match=r"edits \(contents\)"):
            evaluate_edits("edits", others, inputs)
    return found


def test_truth_scores_one_and_other_items_answers_do_not_on_any_number_of_ranks(
    drawn_scenes: Path, tmp_path: Path
) -> None:
    of_one = _evaluated(alone(), drawn_scenes, tmp_path)
    for found in run_ranks(_evaluated, 2, drawn_scenes, tmp_path):
        for theirs, ours in zip(found, of_one, strict=True):
            assert [(part.scores, part.data) for part in theirs] == [(part.scores, part.data) for part in ours]
    right, wrong = of_one
    for parts, kinds, names in ((right[0], KINDS, {"all", "unchanged"}), (right[1], QUESTION_KINDS, {"all"})):
        of = next(iter(parts.scores)).split("/")[0]
        assert set(parts.scores) == {f"{of}/{name}" for name in names | set(kinds)}
        assert {score.value for score in parts.scores.values()} == {1.0}
        assert parts.scores[f"{of}/all"].items == FOLDERS[f"{of}_heldout"] == len(parts.examples)
    assert wrong[0].scores["edits/all"].value < 0.2 and wrong[0].scores["edits/unchanged"].value < 0.5
    assert wrong[1].scores["questions/all"].value < 0.5
    for example in [*right[0].examples, *right[1].examples]:
        pictures = [example[name] for name in ("before", "drawn", "true") if name in example]
        assert pictures and all((tmp_path / name).is_file() for name in pictures)


def test_at_most_so_many_of_each_kind_are_read(drawn_scenes: Path) -> None:
    items = read_scene_questions(str(drawn_scenes / "questions_heldout"), 2)
    assert sorted(item.kind for item in items) == sorted([*QUESTION_KINDS, *QUESTION_KINDS])


def test_rows_of_another_form_and_missing_pictures_are_refused_by_name(drawn_scenes: Path, tmp_path: Path) -> None:
    questions = drawn_scenes / "questions"
    with pytest.raises(ValueError, match=rf"edits={questions}: .*00000\.jsonl:1 is no row.*num_edits"):
        evaluate.main(["checkpoint=runs/none", f"edits={questions}"])
    with pytest.raises(FileNotFoundError, match="none"):
        evaluate.main(["checkpoint=runs/none", "questions=none"])
    (tmp_path / "a.jsonl").write_text((drawn_scenes / "edits" / "00000.jsonl").read_text())
    with pytest.raises(ValueError, match=r"a\.jsonl:1: missing picture .*0-before\.png") as refused:
        read_edits(str(tmp_path), 1)
    assert "max_bad_fraction" not in str(refused.value) and str(refused.value).startswith(f"edits={tmp_path}: ")
    (tmp_path / "a.jsonl").write_text('{"story": "a"}')
    with pytest.raises(ValueError, match=r"no 'text' in its JSON, which has \['story'\]") as refused:
        read_scene_questions(str(tmp_path), 1)
    assert "text_key" not in str(refused.value)
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        read_edits(str(tmp_path), 1)


def test_what_does_not_fit_into_a_sequence_is_named_with_the_option_that_admits_it(
    drawn_scenes: Path, drawn: DrawingRun
) -> None:
    """P10: train.evaluate asks before it scores anything."""
    short, pipeline = SamplerConfig(max_length=5), load(drawn.run_dir)
    asked = evaluate.Asked(
        read_edits(str(drawn_scenes / "edits_heldout"), 1),
        read_scene_questions(str(drawn_scenes / "questions_heldout"), 1),
        [{"question_id": 7, "image": "a.png", "text": "what?"}],
    )
    for name, one in (("edits", "edits"), ("questions", "questions"), ("answers", "answers.questions")):
        alone_asked = replace(evaluate.Asked([], [], []), **{name: getattr(asked, name)})
        with pytest.raises(ValueError, match=rf"{one}: . of . are too long, .* takes \d+.*at most 5.*max_length=\d+"):
            alone_asked.require_room(AnswersConfig(), short, pipeline)
        alone_asked.require_room(AnswersConfig(), SamplerConfig(max_length=200), pipeline)


def test_a_model_is_scored_through_the_program(drawn_scenes: Path, drawn: DrawingRun, tmp_path: Path) -> None:
    """Untrained, it is wrong; every score has its interval, the report shows each edit beside its picture before."""
    folders = [f"edits={drawn_scenes / 'edits_heldout'}", f"questions={drawn_scenes / 'questions_heldout'}"]
    argv = [f"checkpoint={drawn.run_dir}", f"output={tmp_path / 'out'}", "device=cpu", "steps=1", "max_new_tokens=4"]
    with ProgramRanks(evaluate.main, [*argv, *folders, "max_prompts=1"], 2, tmp_path / "log") as run:
        expect(run, 0)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["scores"]["edits/all"]["items"] == len(KINDS) and found["scores"]["edits/all"]["value"] == 0
    assert found["scores"]["questions/all"]["items"] == len(QUESTION_KINDS)
    assert {found["data"][name]["items"] for name in ("edits", "questions")} == {6}
    assert len((tmp_path / "out" / "examples.jsonl").read_text().splitlines()) == 12
    report.main([f"run={drawn.run_dir}", f"evaluation={tmp_path / 'out'}", f"output={tmp_path / 'page.html'}"])
    page = (tmp_path / "page.html").read_text()
    assert page.count('alt="before"') == len(KINDS) and "edits: colour: 0 of 1 right" in page
    assert "questions: yes_no: 0 of 1 right" in page
