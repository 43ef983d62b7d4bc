"""Ranked likelihoods equal a plain loop over transformers' model; the released forms become the harness's prompts."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from model.sampler_config import SamplerConfig
from tests.ranks import run_ranks
from tests.runs import DrawingRun
from tests.test_pipeline import load
from train.distributed.ranks import Ranks, alone
from train.evaluation import multiple_choice
from train.evaluation.multiple_choice import accuracies, evaluate_choices, log_likelihoods, piece_of
from train.evaluation.part import Inputs, bar_of
from train.evaluation.questions import Question, read_multiple_choice
from train.export import main as export
from train.inference.pipeline import Pipeline, PipelineConfig

WORDS = ["a", "large", "red", "circle", "beside", "3", "small", "blue", "squares"]
REQUESTS = [
    (" ".join(WORDS[i % 7 : i % 7 + 2 + i % 5]), f" {' '.join(WORDS[j : j + 1 + i % 4])}")
    for i in range(12)
    for j in (0, 3, 5)
]
REQUESTS += [("", " a red circle"), ("a large  ", "red"), (" ".join(WORDS * 12), " blue squares"), ("a r", "ed circle")]


def plain_loop(folder: Path, requests: list[tuple[str, str]], most: int) -> list[tuple[float, int]]:
    """Return each continuation's log likelihood, one request at a time, as lm-evaluation-harness computes it."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for context, continuation in requests:
        if spaces := len(context) - len(context.rstrip()):
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before, whole = (tokenizer(text).input_ids for text in (context, context + continuation))
        after = whole[len(before) :]
        given = torch.tensor([(before + after)[-(most + 1) :][:-1]])
        log_probs = model(given).logits[0].log_softmax(-1)[-len(after) :]
        found.append((log_probs.gather(1, torch.tensor(after)[:, None]).sum().item(), len(after)))
    return found


@torch.no_grad()
def test_packed_likelihoods_are_those_of_a_plain_loop_in_transformers(
    drawn: DrawingRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P12; contexts that are too long lose their beginning, and spaces and pieces at the boundary fall as there."""
    export([f"checkpoint={drawn.run_dir}", f"output={tmp_path / 'hf'}", "format=hf"])
    pipeline = load(drawn.run_dir)
    length = pipeline.config.data.sequence_length
    expected = plain_loop(tmp_path / "hf", REQUESTS, length)
    pieces = [piece_of(pipeline.tokenizer, *request, length) for request in REQUESTS]
    assert max(map(len, pieces)) == length and len({len(piece) for piece in pieces}) > 6
    for tokens in (1, 4 * length):  # a row a batch, four rows
        monkeypatch.setattr(multiple_choice, "TOKENS", tokens)
        found = log_likelihoods(pipeline, REQUESTS)
        assert [count for _, count in found] == [count for _, count in expected]
        assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5, abs=1e-5)
    single = [log_likelihoods(pipeline, [request])[0] for request in REQUESTS]
    assert [total for total, _ in single] == pytest.approx([total for total, _ in found], rel=1e-5, abs=1e-5)


def test_a_choice_without_tokens_or_with_too_many_is_refused_by_name(drawn: DrawingRun) -> None:
    for choice, words in (("", "0 tokens"), (" blue squares" * 60, "expected 1 to 64")):
        with pytest.raises(ValueError, match=words):
            piece_of(drawn.tokenizer, "a red", choice, 64)


def test_the_three_accuracies_divide_by_nothing_characters_and_tokens() -> None:
    question = Question(("x",) * 3, ("ab", "abcdefgh", "abcdef"), 1)
    likelihoods = [(-4.0, 1), (-6.0, 4), (-5.0, 5)]  # per character -2, -0.75, -0.83; per token -4, -1.5, -1
    found = {
        answer: {kind: score.value for kind, score in accuracies([_with(question, answer)], [likelihoods]).items()}
        for answer in range(3)
    }
    kinds = ("accuracy", "accuracy_per_character", "accuracy_per_token")
    assert [found[answer] for answer in range(3)] == [{kind: float(kind == right) for kind in kinds} for right in kinds]
    (score, *_) = accuracies([question] * 3 + [_with(question, 0)], [likelihoods] * 4).values()
    assert (score.value, score.items) == (0.25, 4) and score.low < 0.25 < score.high


def _with(question: Question, answer: int) -> Question:
    return Question(question.contexts, question.choices, answer)


FORMS = {
    "ours": ({"context": "The sky is", "choices": ["blue", "green"], "answer": 0}, "The sky is", ["blue", "green"], 0),
    "hellaswag": (
        {"activity_label": "Roof shingle removal", "ctx_a": "A man is on a roof.", "ctx_b": "he", "label": 3}
        | {"ctx": "unused", "endings": ["is [step] up.", "turns [title] sits.", "naps.", "starts  pulling."]},
        "Roof shingle removal: A man is on a roof. He",
        ["is up.", "turns. sits.", "naps.", "starts pulling."],
        3,
    ),
    "piqa": ({"goal": "Boil", "sol1": "x", "sol2": "y", "label": 1}, "Question: Boil\nAnswer:", ["x", "y"], 1),
    "siqa": (
        {"context": "Al fell.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "2"},
        "Q: Al fell. Why?\nA:",
        ["x", "y", "z"],
        1,
    ),
    "arc": (
        {"question": {"stem": "What?", "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]}}
        | {"id": "1", "answerKey": "B"},
        "Question: What?\nAnswer:",
        ["x", "y"],
        1,
    ),
    "arc of the hub": (
        {"question": "What?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "1"},
        "Question: What?\nAnswer:",
        ["x", "y", "z"],
        0,
    ),
    "boolq": (
        {"question": "is it", "title": "t", "answer": True, "passage": "P."},
        "P.\nQuestion: is it?\nAnswer:",
        ["no", "yes"],
        1,
    ),
    "boolq of the hub": (
        {"question": "is it", "label": 0, "passage": "P."},
        "P.\nQuestion: is it?\nAnswer:",
        ["no", "yes"],
        0,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_released_row_becomes_the_harnesss_prompt(name: str, tmp_path: Path) -> None:
    row, context, choices, answer = FORMS[name]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n\n{json.dumps(row)}\n")
    expected = Question((context,) * len(choices), tuple(choices), answer)
    assert read_multiple_choice(tmp_path / "rows.jsonl") == [expected] * 2


def test_winogrande_asks_for_the_rest_of_the_sentence_after_each_option(tmp_path: Path) -> None:
    row = {"sentence": "The cup fell off as _ was small.", "option1": "it", "option2": "the box", "answer": "2"}
    (tmp_path / "dev.jsonl").write_text(json.dumps(row))
    contexts = ("The cup fell off as it", "The cup fell off as the box")
    assert read_multiple_choice(tmp_path / "dev.jsonl") == [Question(contexts, ("was small.",) * 2, 1)]


def test_labels_lie_beside_the_rows_and_what_has_none_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps({"goal": f"g{i}", "sol1": "x", "sol2": "y"}) + "\n" for i in range(2)))
    with pytest.raises(
        ValueError, match=r"valid\.jsonl:1: keys .* expected those of one of these forms: .*goal, label"
    ):
        read_multiple_choice(path)
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    assert [question.answer for question in read_multiple_choice(path)] == [1, 0]
    rows = [json.dumps({"goal": "a\u2028b\x85", "sol1": "x", "sol2": "y"}, ensure_ascii=False)] * 2  # no ends of lines
    path.write_text("\n\n".join(rows), encoding="utf-8")
    assert [question.contexts[0] for question in read_multiple_choice(path)] == ["Question: a\u2028b\x85\nAnswer:"] * 2
    (tmp_path / "valid-labels.lst").write_text("1\n")
    with pytest.raises(ValueError, match="1 labels; expected one a line"):
        read_multiple_choice(path)
    for row, words in [
        ('{"context": "a", "choices": ["x", "y"], "answer": 2}', "2 choices and answer 2; expected two or more"),
        ('{"context": "a", "choices": ["x"], "answer": 0}', "1 choices"),
        ('{"context": "a", "choices": "xy", "answer": "b"}', "not readable as a question"),
        ("{", "not readable as a question"),
        ("[]", "not readable as a question"),
        ("", "no questions; expected JSON lines such as"),
    ]:
        (tmp_path / "bad.jsonl").write_text(row)
        with pytest.raises(ValueError, match=words):
            read_multiple_choice(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"bad\.jsonl: not UTF-8"):
        read_multiple_choice(tmp_path / "bad.jsonl")


def write_questions(path: Path) -> Path:
    rows = [
        {"context": context, "choices": [" ".join(WORDS[j : j + 2]) for j in range(3)], "answer": i % 3}
        for i, (context, _) in enumerate(REQUESTS[:10])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_part_gives_scores_by_name_and_a_line_for_each_question(drawn: DrawingRun, tmp_path: Path) -> None:
    path = write_questions(tmp_path / "made.jsonl")
    inputs = Inputs(load(drawn.run_dir), SamplerConfig(), 0, tmp_path, alone(), bar_of(alone()), {})
    part = evaluate_choices({"made": str(path), "again": str(path)}, inputs)
    assert part.scores["choices/made/accuracy"].items == 10
    assert part.scores["choices/made/accuracy"] == part.scores["choices/again/accuracy"]
    assert part.data["made"]["items"] == 10 and part.data["made"]["fingerprint"] == part.data["again"]["fingerprint"]
    lines = [json.loads(line) for line in (tmp_path / "choices-made.jsonl").read_text().splitlines()]
    right = sum(line["answer"] == max(range(3), key=lambda i: line["log_likelihoods"][i]) for line in lines)
    assert part.scores["choices/made/accuracy"].value == right / 10
    assert all(math.isfinite(value) and value < 0 for line in lines for value in line["log_likelihoods"])


def _on_ranks(ranks: Ranks, run_dir: Path, path: Path, output: Path) -> dict:
    pipeline = Pipeline.load(PipelineConfig(checkpoint=str(run_dir)), ranks)
    inputs = Inputs(pipeline, SamplerConfig(), 0, output, ranks, bar_of(ranks), {})
    return evaluate_choices({"made": str(path)}, inputs).scores


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_scores(drawn: DrawingRun, tmp_path: Path) -> None:
    path = write_questions(tmp_path / "made.jsonl")
    by_world_size = [run_ranks(_on_ranks, n, drawn.run_dir, path, tmp_path) for n in (1, 3)]
    assert all(found == by_world_size[0][0] for of_ranks in by_world_size for found in of_ranks)
