"""Questions about scenes are deterministic and have the answers that the scenes give; what is held out stays so."""

from collections import Counter

import numpy as np
import pytest

from data.scene_judge import judge
from data.scene_questions import KINDS, NUMBERS, QuestionsExample, normalised, questions_about, questions_example
from data.scenes import COLOURS, PHRASES, SHAPES, SIZES, Shape, make_splits

SPLITS = make_splits(0)


@pytest.fixture(scope="module")
def trained() -> list[QuestionsExample]:
    return [questions_example(SPLITS, index, 32, 0.5) for index in range(1200)]


@pytest.fixture(scope="module")
def held_out() -> list[QuestionsExample]:
    return [questions_example(SPLITS, index, 32, 0.5, held_out=True) for index in range(300)]


def asked(examples: list[QuestionsExample]) -> set[tuple[frozenset[Shape], str]]:
    return {(frozenset(e.shapes), wording) for e in examples for q, _ in e.asked for wording in q.wordings}


def test_questions_are_a_function_of_seed_and_index(trained: list[QuestionsExample]) -> None:
    again, other = (questions_example(make_splits(seed), 7, 32, 0.5) for seed in (0, 1))
    assert again.asked == trained[7].asked and np.array_equal(again.picture, trained[7].picture)
    assert not np.array_equal(other.picture, trained[7].picture)


def test_no_held_out_question_is_trained_about_its_scene_in_any_wording(
    trained: list[QuestionsExample], held_out: list[QuestionsExample]
) -> None:
    assert not asked(trained) & asked(held_out)
    assert all(set(e.shapes) <= set(SPLITS.trained) for e in trained + held_out)
    assert not any(SPLITS.holds_out_pair(e.shapes) for e in trained + held_out)
    kinds = Counter(question.kind for example in held_out for question, _ in example.asked)
    assert sum(kinds.values()) == len(held_out) and min(kinds[kind] for kind in KINDS) > 30
    assert {len(example.asked) for example in trained} == {1, 2, 3}


def test_the_pictures_show_the_scenes(trained: list[QuestionsExample]) -> None:
    assert all(judge(example.picture) == tuple(sorted(example.shapes)) for example in trained[:200])


def answer(question: str, scene: tuple[Shape, ...]) -> str:
    """Answer by the words that a question shares with each shape of the scene: a slow reader of its own."""
    words = question.rstrip("?").split()
    said = {
        "shape": [kind for kind in SHAPES if {kind, f"{kind}s"} & set(words)],
        "colour": [colour for colour in COLOURS if colour in words],
        "position": [place for place, at in PHRASES["at"][1].items() if at in question],
        "size": [size for size in SIZES if size in words],
    }
    meant = [shape for shape in scene if all(getattr(shape, name) in of for name, of in said.items() if of)]
    if question.startswith("how many"):
        return NUMBERS[len(meant)]
    if question.startswith("is there"):
        return "yes" if meant else "no"
    (shape,) = meant
    about = {"what colour": "colour", "what shape": "shape", "where is": "position", "how big": "size"}
    return getattr(shape, about[" ".join(words[:2])])


def test_every_question_has_one_answer_which_its_words_give(trained: list[QuestionsExample]) -> None:
    for example in trained[::4]:
        questions = questions_about(example.shapes)
        assert len({wording for q in questions for wording in q.wordings}) == sum(len(q.wordings) for q in questions)
        for question in questions:
            assert question.answer == answer(question.wordings[0], example.shapes), question


def test_the_most_frequent_answer_is_no_good_guess(trained: list[QuestionsExample]) -> None:
    answers = Counter((question.kind, question.answer) for example in trained for question, _ in example.asked)
    kinds = Counter(question.kind for example in trained for question, _ in example.asked)
    assert max(count / kinds[kind] for (kind, _), count in answers.items()) < 0.6
    assert {words for kind, words in answers if kind == "number"} == set(NUMBERS)


def test_case_spaces_and_a_full_stop_do_not_matter_in_an_answer_and_words_do() -> None:
    assert normalised("  Top\n LEFT. ") == "top left" == normalised("top left")
    assert normalised("top left corner") != normalised("top left") != normalised("top, left")
