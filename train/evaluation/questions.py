"""Multiple-choice questions from JSON lines: one form of ours, and those in which the Llama-2 suite was released.

    {"context": "The sky is", "choices": ["blue", "green"], "answer": 0}

Prompts are those of lm-evaluation-harness without examples (few-shot examples go into `context`), and a space stands
between a context and a choice, as there. Rows of HellaSwag, PIQA, SIQA, WinoGrande, ARC and BoolQ are known by their
keys, as released and as the Hugging Face hub has them.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.evaluation.texts import OTHER_FORM, read_lines, text_of

DELIMITER = " "  # between a context and a choice


@dataclass(frozen=True)
class Question:
    """A context for each choice (all the same but in WinoGrande), the choices, and which of them is right."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int


def read_multiple_choice(path: Path) -> list[Question]:
    """Read a file of JSON lines; answers may be in `<name>-labels.lst` beside it, as PIQA's and SIQA's are.

    Raises FileNotFoundError, or ValueError naming the line for a row of no known form or without its answer.
    """
    lines, beside = list(read_lines(path)), path.with_name(f"{path.stem}-labels.lst")
    labels = [label.strip() for _, label in read_lines(beside)] if beside.is_file() else None
    if labels is not None and len(labels) != len(lines):
        raise ValueError(f"{beside}: {len(labels)} labels; expected one a line of {path.name}; remove one of the two")
    if not lines:
        raise ValueError(f"{path}: no questions; expected JSON lines such as {__doc__.splitlines()[2].strip()}")
    answers = [None] * len(lines) if labels is None else labels
    return [_question(line, label, f"{path}:{n}") for (n, line), label in zip(lines, answers, strict=True)]


def _question(line: str, label: str | None, where: str) -> Question:
    try:
        row = json.loads(line)
        if label is not None:
            row["label"] = label
        keys = {key for key, value in row.items() if value not in (None, "")}
        form = next((form for needed, form in FORMS if needed <= keys), None)
        question = form(row) if form is not None else None
        for text in () if question is None else (*question.contexts, *question.choices):
            text_of(text)
    except OTHER_FORM as error:
        raise ValueError(f"{where}: not readable as a question ({type(error).__name__}: {error})") from None
    if question is None:
        wanted = "; ".join(", ".join(sorted(needed)) for needed, _ in FORMS)
        raise ValueError(f"{where}: keys {sorted(keys)}: expected those of one of these forms: {wanted}")
    if len(question.choices) < 2 or not 0 <= question.answer < len(question.choices) or not all(question.choices):
        found = f"{len(question.choices)} choices and answer {question.answer}"
        raise ValueError(f"{where}: {found}; expected two or more, none empty, and the number of one, from 0")
    return question


def _asked(context: str, choices: list[str], answer: int) -> Question:
    return Question((context,) * len(choices), tuple(choices), answer)


def _ours(row: dict[str, Any]) -> Question:
    if not isinstance(row["context"], str) or not all(isinstance(choice, str) for choice in row["choices"]):
        raise TypeError("context: expected a text; choices: a list of texts")
    return _asked(row["context"], row["choices"], int(row["answer"]))


def _hellaswag(row: dict[str, Any]) -> Question:
    context = _without_marks(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return _asked(context, [_without_marks(ending) for ending in row["endings"]], int(row["label"]))


def _without_marks(text: str) -> str:
    """Return a text without WikiHow's marks in brackets."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _piqa(row: dict[str, Any]) -> Question:
    return _asked(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def _siqa(row: dict[str, Any]) -> Question:
    choices = [row[f"answer{letter}"] for letter in "ABC"]
    return _asked(f"Q: {row['context']} {row['question']}\nA:", choices, int(row["label"]) - 1)


def _winogrande(row: dict[str, Any]) -> Question:
    """Ask how likely the rest of the sentence is after each option, as Trinh and Le (2018) do."""
    before, _, after = row["sentence"].partition("_")
    contexts = tuple(before + row[option] for option in ("option1", "option2"))
    return Question(contexts, (after.strip(),) * 2, int(row["answer"]) - 1)


def _arc(row: dict[str, Any]) -> Question:
    question = row["question"]
    if isinstance(question, dict):  # as released
        question, choices = question["stem"], question["choices"]
        labels, texts = [choice["label"] for choice in choices], [choice["text"] for choice in choices]
    else:
        labels, texts = row["choices"]["label"], row["choices"]["text"]
    return _asked(f"Question: {question}\nAnswer:", texts, labels.index(row["answerKey"]))


def _boolq(row: dict[str, Any]) -> Question:
    answer = row["answer"] if "answer" in row else row["label"]
    return _asked(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], int(answer))


FORMS: tuple[tuple[set[str], Callable[[dict[str, Any]], Question]], ...] = (
    ({"context", "choices", "answer"}, _ours),
    ({"activity_label", "ctx_a", "endings", "label"}, _hellaswag),
    ({"goal", "sol1", "sol2", "label"}, _piqa),
    ({"context", "question", "answerA", "answerB", "answerC", "label"}, _siqa),
    ({"sentence", "option1", "option2", "answer"}, _winogrande),
    ({"question", "answerKey"}, _arc),
    ({"passage", "question", "answer"}, _boolq),
    ({"passage", "question", "label"}, _boolq),
)
