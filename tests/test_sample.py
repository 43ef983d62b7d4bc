"""The sampling program: pictures, captions and a sheet, or one clear message."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.ranks import ProgramRanks
from data.pictures import decode_picture, encode_png
from model.sampler_config import SamplerConfig, text_alone
from tests.ranks import assert_ranks_refuse
from tests.runs import PROMPTS, DrawingRun, expect
from tests.test_pipeline import load
from train import sample
from train.checkpoints import checkpoint


def _argv(drawn: DrawingRun, output: Path) -> list[str]:
    quick = ["sampler=ddim", "steps=2", "max_new_tokens=4", "device=cpu"]
    return [f"checkpoint={drawn.run_dir}", f"output={output}", *quick]


def _results(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def _run(argv: list[str], log: Path, ranks: int | None = None) -> None:
    with ProgramRanks(sample.main, argv, ranks, log) as run:
        expect(run, 0)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    path = tmp_path / "given.png"
    path.write_bytes(encode_png(np.full((48, 40, 3), 200, np.uint8)))
    return path


def test_prompts_become_pictures_and_pictures_captions(drawn: DrawingRun, given: Path, tmp_path: Path) -> None:
    """`n` of each prompt, from the line, the list and the file; every result has a line that names how it was made."""
    (tmp_path / "prompts.txt").write_text("a circle\n\n  a square \n", "utf-8-sig")  # begins with a byte order mark
    output = tmp_path / "output"
    argv = [*_argv(drawn, output), "n=2", "seed=4", f"images=[{given}]", f"prompts_file={tmp_path / 'prompts.txt'}"]
    argv += [f"prompt={PROMPTS[0]}", f"prompts={json.dumps(PROMPTS[1:])}"]
    _run(argv, tmp_path / "log")
    results = _results(output)
    prompts = [prompt for prompt in (*PROMPTS, "a circle", "a square") for _ in range(2)]
    assert [result["prompt"] for result in results] == [*prompts, None, None]
    assert [result["index"] for result in results] == list(range(10))
    assert all(result["seed"] == 4 and result["step"] == 6 for result in results)
    assert all(result["settings"]["sampler"] == "ddim" and result["settings"]["steps"] == 2 for result in results)
    for result in results[-2:]:
        assert result["images"] == [str(given)] and [part.keys() for part in result["output"]] == [{"text"}]
        assert (output / f"{result['index']:04d}.txt").read_text() == result["output"][0]["text"]
    names = [[part["image"] for part in result["output"]] for result in results[:-2]]
    assert names == [[f"{i:04d}-0.png"] for i in range(8)]
    pictures = [np.asarray(Image.open(output / name)) for (name,) in names]
    assert all(picture.shape == (32, 32, 3) for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1]), "two of one prompt differ"
    assert Image.open(output / "sheet.png").size[0] > 5 * 32
    assert not list(output.glob("*tmp*"))


def test_text_and_pictures_go_in_and_come_out_interleaved(drawn: DrawingRun, given: Path, tmp_path: Path) -> None:
    """A hot untrained model ends in anything: some samples hold text and a picture, in the order of the files."""
    argv = [*_argv(drawn, tmp_path / "output"), "interleaved=true", "n=12", "temperature=8", "max_new_tokens=60"]
    argv += [f"images=[{given}]", "max_images=2", "prompt=a circle, <image> and"]
    _run(argv, tmp_path / "log")
    kinds = set()
    for result in _results(tmp_path / "output"):
        assert result["images"] == [str(given)]
        kinds.add("".join("t" if "text" in part else "i" for part in result["output"]))
        for name in [part["image"] for part in result["output"] if "image" in part]:
            assert Image.open(tmp_path / "output" / name).size == (32, 32)
    assert any("ti" in kind for kind in kinds) and all(kind.count("i") <= 2 for kind in kinds), kinds


def test_an_edit_gives_its_pictures_before_each_prompt_and_shows_them_beside_the_result(
    drawn: DrawingRun, given: Path, tmp_path: Path
) -> None:
    """Pictures of any size; the result is the pipeline's, after the pictures, and not what the prompt alone gives."""
    (tmp_path / "wide.png").write_bytes(encode_png(np.full((20, 90, 3), (250, 0, 0), np.uint8)))
    files, prompts = [str(given), str(tmp_path / "wide.png")], ["make it blue", "turn it"]
    argv = [f"edit={json.dumps(files)}", f"prompts={json.dumps(prompts)}", "n=2", "seed=3"]
    _run([*_argv(drawn, tmp_path / "output"), *argv], tmp_path / "log")
    results = _results(tmp_path / "output")
    assert [(line["prompt"], line["edit"], line["images"]) for line in results] == [
        (prompt, files, []) for prompt in prompts for _ in range(2)
    ]
    pipeline, sampler = load(drawn.run_dir), SamplerConfig(sampler="ddim", steps=2)
    pictures = [decode_picture(Path(name).read_bytes(), [(32, 32)], name) for name in files]
    expected = pipeline.edit([(pictures, prompt) for prompt in prompts for _ in range(2)], sampler, seed=3)
    unasked = pipeline.draw([prompts[0]], sampler, seed=3)[0]
    for line, picture in zip(results, expected, strict=True):
        found = np.asarray(Image.open(tmp_path / "output" / line["output"][0]["image"]))
        assert np.array_equal(found, picture) and not np.array_equal(found, unasked)
    sheet = Image.open(tmp_path / "output" / "sheet.png")
    assert sheet.width // 134 == 3, "two given, one drawn"


def test_a_question_about_each_picture_is_answered_in_the_chat_form(
    drawn: DrawingRun, given: Path, tmp_path: Path
) -> None:
    """The pipeline's answers, beside what a caption of the same picture would be; without pictures one answer."""
    argv = [f"ask={PROMPTS[0]}", f"images=[{given},{given}]", "seed=3", "temperature=2"]
    _run([*_argv(drawn, tmp_path / "output"), *argv], tmp_path / "log")
    pipeline = load(drawn.run_dir)
    sampler = SamplerConfig(max_new_tokens=4, temperature=2)
    picture = decode_picture(given.read_bytes(), [(32, 32)], "given")
    results = _results(tmp_path / "output")
    assert [(line["ask"], line["images"], line["prompt"]) for line in results] == [(PROMPTS[0], [str(given)], None)] * 2
    found = [line["output"][0]["text"].strip() if line["output"] else "" for line in results]
    assert found == pipeline.answer([([picture], PROMPTS[0])] * 2, sampler, seed=3) and any(found)
    # The plain form: the question and a line break; a caption follows the picture alone.
    asked = list(pipeline.complete([[picture, f"{PROMPTS[0]}\n"]] * 2, text_alone(sampler), 3))
    assert found == ["".join(parts).strip() for parts in asked] != pipeline.describe([picture] * 2, sampler, 3)
    assert (tmp_path / "output" / "sheet.png").exists()
    _run([*_argv(drawn, tmp_path / "alone"), f"ask={PROMPTS[0]}"], tmp_path / "log-alone")
    assert [(line["ask"], line["images"]) for line in _results(tmp_path / "alone")] == [(PROMPTS[0], [])]


def test_texts_are_taken_as_they_stand_and_an_earlier_calls_samples_go(drawn: DrawingRun, tmp_path: Path) -> None:
    output, prompts = tmp_path / "output", ['it\'s: a # circle, [red] "one"', ""]
    _run([*_argv(drawn, output), f"prompt={prompts[0]}", "n=3"], tmp_path / "log")
    _run([*_argv(drawn, output), f"prompt={prompts[0]}", 'prompts=[""]', "dtype=bfloat16"], tmp_path / "log-2")
    results = _results(output)
    assert [result["prompt"] for result in results] == prompts
    assert results[0]["settings"]["dtype"] == "bfloat16"
    names = {"0000-0.png", "0001-0.png", "results.jsonl", "sheet.png"}
    assert {path.name for path in output.iterdir()} == names


def test_two_ranks_share_the_samples_and_make_the_same(drawn: DrawingRun, given: Path, tmp_path: Path) -> None:
    earlier = checkpoint.saved(drawn.run_dir / "checkpoints")[0]
    for ranks, name in ((None, "one"), (2, "two")):
        argv = [*_argv(drawn, tmp_path / name), "n=3", "prompt=a circle", f"images=[{given}]", "batch_size=2"]
        argv += ["sampler=dpm++", "guidance=2", "guidance_interval=[100,900]", "size=[16,48]"]
        argv += [f"guide={earlier}", "guide_weights=model", "guidance_rescale=0.7"]
        _run(argv, tmp_path / f"log-{name}", ranks)
    one, two = (_results(tmp_path / name) for name in ("one", "two"))
    assert one == two and len(one) == 6
    guide = {"checkpoint": str(earlier), "step": 3, "weights": "model"}
    assert all(result["guide"] == guide and result["settings"]["guidance_rescale"] == 0.7 for result in one)
    for i in range(3):
        first, second = (np.asarray(Image.open(tmp_path / name / f"{i:04d}-0.png"), int) for name in ("one", "two"))
        assert first.shape == (16, 48, 3) and np.abs(first - second).max() <= 1  # P12, up to rounding


def test_a_request_that_asks_for_nothing_or_too_much_is_refused_before_a_model_is_loaded() -> None:
    """P10."""
    refused = {
        "nothing to do": [],
        "n=0": ["prompt=x", "n=0"],
        "nothing says what to make of it": ["edit=a.png"],
        "expected one more": ["prompt=a <image>", "images=a.png", "ask=what?"],
        "asks for 2 images": ["prompt=a <image> and <image>", "images=[a.png]"],
        "prompts_file=/tmp": ["prompts_file=/tmp"],
        "guidance_interval": ["prompt=x", "guidance_interval=[9,3]"],
    }
    for words, argv in refused.items():
        with pytest.raises(ValueError, match=words):
            sample.main(["checkpoint=/nowhere", *argv])


def test_what_asks_for_nothing_is_refused_before_a_model_is_loaded() -> None:
    """P10."""
    for change, words in (
        (["prompt= "], """prompt=' ': expected words, or "" for any picture; correct prompt"""),
        (['prompts=["a", "  "]', "ask=x"], "prompt='  ': expected words"),
        (['prompts=[""]', "edit=a.png"], "prompt='': expected words, what to make of the pictures; say it in prompt"),
        (["prompt=<image>", "images=a.png", "edit=b.png"], "prompt=' ': expected words, what to make of"),
        (["ask= ", "images=a.png"], "ask=' ': expected words, what to answer; say it in ask"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            sample.main(["checkpoint=/nowhere", *change])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["prompt=x", "edit=BROKEN"], "broken.png"),
        (["prompt=x", "checkpoint=/nowhere"], "expected a checkpoint, a run folder"),
        (["prompt=x", "vae=/nowhere"], "no such folder"),
        (["images=[/nowhere.png]"], "nowhere.png"),
        (["images=[BROKEN]"], "broken.png"),
        (["prompt=x", "size=[32,12]"], "multiples of"),
        (["prompt=x", "steps=2000"], "at most 1000 steps"),
        (["prompt=x", "output=/proc/x"], "choose a writable folder"),
        (["prompt=x", "output=FOREIGN"], "holds 0001.md, which train.sample did not write"),
        (["prompt=x", "weights=best"], "weights"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_message(
    drawn: DrawingRun, tmp_path: Path, change: list[str], words: str
) -> None:
    """P10."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("0001.txt", "0001.md"):
        (foreign / name).write_text("mine")
    argv = [argument.replace("BROKEN", str(tmp_path / "broken.png")) for argument in change]
    argv = [argument.replace("FOREIGN", str(foreign)) for argument in argv]
    with ProgramRanks(sample.main, [*_argv(drawn, tmp_path / "output"), *argv], None, tmp_path / "log") as run:
        assert run.wait() == [2], run.output
    lines = [line for line in run.output.splitlines() if "train.sample: " in line]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in run.output, run.output
    assert (foreign / "0001.txt").read_text() == "mine"


def test_a_rank_that_refuses_what_only_it_lacks_is_the_last_word_of_the_others(
    drawn: DrawingRun, given: Path, tmp_path: Path
) -> None:
    """After the ranks have met, where the others wait for it in a collective."""
    argv = [*_argv(drawn, tmp_path / "output"), f"images=[{given}]"]
    other = [*argv, f"images=[{tmp_path / 'nowhere.png'}]"]
    commands = [(sample.main, argv), (sample.main, other)]
    assert_ranks_refuse(commands, tmp_path / "log", "nowhere.png cannot be read")
