"""Files that others wrote are read or refused by name, whatever values stand in them; no name leaves its folder."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_multiple_choice import FORMS
from train.evaluation.answers import AnswersConfig, read_llava_questions
from train.evaluation.benchmark_layouts import read_layout
from train.evaluation.captioned import CaptionedConfig, read_captioned
from train.evaluation.questions import read_multiple_choice

HOSTILE = [
    *(None, True, -1, 1.5, 10**400, float("nan"), float("inf"), "", " ", "\ud800", "a\0b", "..", "../x", "/x"),
    *("x" * 300, "é\u2028é", "<b>", [], [None], {}, {"a": 1}, ["a", "b"], {"a": {"prompt": "p"}}),
]
COCO = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}
KARPATHY = {"images": [{"split": "test", "filename": "1.png", "cocoid": 1, "sentences": [{"raw": "a"}]}]}
NESTED = "[" * 5000


def changed(value: Any) -> Iterator[Any]:
    """Yield a JSON value with each of its parts, in turn replaced by each hostile value, or left out."""
    yield from copy.deepcopy(HOSTILE)
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        for part in changed(value[key]):
            other = copy.deepcopy(value)
            other[key] = part
            yield other
        other = copy.deepcopy(value)
        del other[key]
        yield other
    if isinstance(value, dict) and value:
        first, *_ = value
        for name in (name for name in HOSTILE if isinstance(name, str)):
            yield {name: value[first], **{key: value[key] for key in list(value)[1:]}}


def attack(path: Path, rows: Any, read: Callable[[], object]) -> None:
    """Write each change of `rows`; reading may refuse by name or go well."""
    texts = [json.dumps(rows, ensure_ascii=False), *map(json.dumps, changed(rows)), NESTED, "", "\0", "{", "\ufeff{}"]
    for text in texts:
        path.write_text(text, encoding="utf-8")
        try:
            read()
        except OSError as error:  # a picture that is not there
            assert "are not there" in str(error) or error.filename, text[:300]
        except ValueError as error:
            assert path.stem in str(error) or ".split=" in str(error), (text[:300], error)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=path.stem):
        read()


@pytest.mark.parametrize("name", FORMS)
def test_multiple_choice(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    attack(path, FORMS[name][0], lambda: read_multiple_choice(path))


def test_questions_about_pictures(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    config = AnswersConfig(questions=str(path), pictures=str(tmp_path))

    def read() -> None:
        for row in read_llava_questions(config):
            row["text"].encode()

    attack(path, {"question_id": 1, "image": "asked.jsonl", "text": "what"}, read)


@pytest.mark.parametrize("content", [COCO, KARPATHY], ids=["coco", "karpathy"])
def test_captioned_pictures(content: dict, tmp_path: Path) -> None:
    (tmp_path / "1.png").touch()
    path = tmp_path / "annotations.json"
    config = CaptionedConfig(pictures=str(tmp_path), annotations=str(path))

    def read() -> None:
        for item in read_captioned(config):
            assert item.references and all(text.strip() and text.encode() for text in item.references)

    attack(path, content, read)
    twice = {key: value * 2 for key, value in content.items()}
    path.write_text(json.dumps(twice))
    with pytest.raises(ValueError, match="two pictures have one id"):
        list(read_captioned(config))


BENCHMARKS: dict[str, Any] = {
    "geneval": {"tag": "colors", "prompt": "a"},
    "hpsv2": ["a", "b"],
    "wise": [{"Prompt": "a", "prompt_id": 401}],
    "mjhq30k": {"ab0": {"category": "art", "prompt": "a"}},
}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_benchmarks_prompts(benchmark: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts"

    def read() -> None:
        for file in read_layout(benchmark, [str(path)]).files:
            assert (tmp_path / file.name).resolve().is_relative_to(tmp_path.resolve()) and file.prompt.encode()

    attack(path, BENCHMARKS[benchmark], read)


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    """Prompts of T2I-CompBench are lines too, and names of files."""
    path = tmp_path / "val.txt"
    path.write_text("a\u2028b\x0cc\tseen\n", encoding="utf-8")
    assert {file.prompt for file in read_layout("t2i_compbench", [str(path)]).files} == {"a\u2028b\x0cc"}
    for bad in ("x" * 300, "a\0b", "a/b"):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"val\.txt"):
            read_layout("t2i_compbench", [str(path)])
