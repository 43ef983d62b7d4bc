"""The report is one file that asks for nothing, shows every failure, escapes what it quotes, and says what it lacks."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.pictures import contact_sheet, encode_png
from data.scene_judge import Verdict, score
from data.scenes import Shape, caption, draw
from model.vae import VaeConfig, build_vae
from tests.pages import Page
from train.checkpoints.run_folder import RunFolder
from train.config import load_config, to_yaml
from train.distributed.ranks import alone
from train.evaluation.scenes import SceneItem, shares, write_examples
from train.pages.page import read_picture, spread
from train.pages.report_inputs import ReportConfig
from train.pretrain_config import PretrainConfig
from train.report import main

HOSTILE = '<script>alert("1")</script><img src=http://evil.example/x onerror=alert(1)>&amp;\'"'
SECTIONS = ["health", "timeline", "scores", "prompts", "curves", "noise", "speed", "previews", "examples", "drawings"]
SECTIONS += ["captions", "codec", "heldout", "seconds", "settings", "absent", "making"]


def scene(split: str, i: int) -> SceneItem:
    corners = ("top left", "top right", "bottom left", "bottom right")
    shape = Shape(shape="circle", colour=("red", "blue")[i % 2], position=corners[i % 4], size="large")
    shapes = (shape,) if split != "two_shapes" else (shape, Shape("square", "green", corners[(i + 1) % 4], "small"))
    return SceneItem(split, caption(shapes, i % 4), draw(shapes, np.random.default_rng(i), 32), shapes)


def make_run(folder: Path, rows: int = 30) -> None:
    with RunFolder(folder, alone()) as run:
        for i in range(1, rows + 1):
            row = {"step": 10 * i, "tokens_seen": 5000 * i, "images_seen": 100 * i, "grad_norm": 2.0}
            row |= {"text_loss": 3 / i, "image_loss": 1 / i, "learning_rate": 1e-3 / i}
            row |= {"tokens_per_s": 900.5, "images_per_s": 20.0, "skipped_updates": 0, "time": 1e9 + 30 * i}
            row |= {"step_s": 3.0, "interval_steps": 10, "data_stall_share": 0.01, "checkpoint_stall_share": 0.0}
            row |= {"evaluation_share": 0.0, "x0_error/-2..0": 0.5 / i, "x0_error/0..2": 0.2 / i}
            run.append_metrics(row)
    settings = [f"run_dir={folder}", "optim.steps=400", "optim.ema_half_lives=[69]", "data.tokenizer=t"]
    config = load_config(PretrainConfig, settings)
    (folder / "config.yaml").write_text(to_yaml(config))


def make_evaluation(folder: Path, told: str | None = None) -> list[tuple[SceneItem, Verdict, Verdict]]:
    """Evaluate 24 scenes: drawings 0, 5, 10... and the last six show another scene, captions 0, 7... fail likewise."""
    items = [scene(split, i) for split in ("seen", "unseen", "two_shapes") for i in range(8)]
    items[22] = replace(items[22], caption=told or items[22].caption)
    pictures = [items[i - 1].picture if i % 5 == 0 or i >= 18 else item.picture for i, item in enumerate(items)]
    drawn = [(picture, score(picture, item.shapes)) for picture, item in zip(pictures, items, strict=True)]
    captions = [(told or "a fish" if i % 7 == 0 or i >= 18 else item.caption) for i, item in enumerate(items)]
    right = [i < 18 and text == item.caption for i, (text, item) in enumerate(zip(captions, items, strict=True))]
    described = [(text, Verdict(*[is_right] * 3)) for text, is_right in zip(captions, right, strict=True)]
    folder.mkdir()
    lines = write_examples(folder, items, drawn, described)
    for i, line in enumerate(lines):
        line |= {"score": i / 10, "score_name": told or "likeness"}
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"sampler": "ddim", "steps": 50, "guidance": 3.5, "clip_x0": None}
    scores = {"step": 300, "seed": 11, "settings": settings, "weights": "ema-69"}
    scores["guide"] = {"checkpoint": "run/checkpoints/step-00000100", "step": 100, "weights": "ema-7"}
    scores["heldout"] = {HOSTILE: {"text_loss": 1.25, "image_loss": 0.0, "captioning_loss": 0.75, "x0_error": 2.5}}
    by_bin = {"-6..-4": (4.0, 9), "-4..-2": (None, 0), "-2..0": (1.5, 8), "4..6": (0.125, 7)}
    found = {of_bin: {"error": error, "images": images} for of_bin, (error, images) in by_bin.items()}
    scores["heldout"][HOSTILE]["x0_error_by_log_snr"] = found
    scores["heldout"]["earlier"] = {"text_loss": 1.5, "image_loss": 0.5}
    answers = {"text_to_image": drawn, "image_to_text": described}
    found = {task: shares(items, [verdict for _, verdict in of_task]) for task, of_task in answers.items()}
    scores["scores"] = {
        f"scenes/{task}/{goal}": vars(share) for task, of_task in found.items() for goal, share in of_task.items()
    }
    (folder / "evaluation.json").write_text(json.dumps(scores))
    return [(item, *pair) for item, *pair in zip(items, [v for _, v in drawn], [v for _, v in described], strict=True)]


def report(folder: Path, *arguments: str) -> Page:
    output = folder / "report.html"
    assert main([f"run={folder / 'run'}", f"output={output}", *arguments]) is None
    return Page(output.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path, list]:
    """A finished run with hostile captions and names, and its report."""
    root = tmp_path_factory.mktemp("report")
    make_run(root / "run")
    (root / "run/previews").mkdir()
    for step in (100, 200, 300, 400):
        sheet = contact_sheet([scene("seen", step).picture] * 3, [HOSTILE] * 3)
        sheet.save(root / f"run/previews/step-{step:08d}.png")
    judged = make_evaluation(root / "evaluation", told=HOSTILE)
    (root / "samples").mkdir()
    lines = []
    for i, prompt in enumerate([scene("seen", 0).caption, scene("seen", 0).caption, HOSTILE]):
        (root / f"samples/{i:04d}.png").write_bytes(encode_png(scene("seen", i).picture))
        lines.append({"prompt": prompt, "images": [], "output": [{"image": f"{i:04d}.png"}], "seed": 5, "step": 300})
    described = {"prompt": None, "images": [str(root / "samples/0000.png")], "output": [{"text": HOSTILE}]}
    lines.append({**described, "seed": 5, "step": 300})
    (root / "samples/results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "stages").mkdir()
    for name, seconds in (("scenes", 2.0), ("pretrain", 40.5)):
        (root / f"stages/{name}.json").write_text(json.dumps({"fingerprint": "f", "seconds": seconds}))
        time.sleep(0.02)  # stages are listed in the order in which they finished
    vae = VaeConfig(block_channels=(8, 8), layers_per_block=1, norm_groups=4, mid_attention=False)
    build_vae(vae).save_pretrained(root / "vae")
    named = [f"{name}={root / name}" for name in ("evaluation", "samples", "vae", "stages")]
    return report(root, *named, "num_right=2", "num_previews=3", f"title={json.dumps(HOSTILE)}"), root, judged


def test_a_whole_report_has_every_section_and_is_well_formed(whole) -> None:
    page, root, _ = whole
    assert [attrs["id"] for tag, attrs in page.elements if tag == "section"] == SECTIONS
    assert re.findall(r"<li><b>([^<]*)", page.section("absent").html) == ["Differences of config"]
    assert page.unbalanced == [] and page.open == []
    assert "300 of 400" in page.text and (root / "report.html").stat().st_size < 3e6
    assert sorted(path.name for path in root.glob("report*")) == ["report.html"]  # nothing left beside it


def test_the_page_asks_the_network_for_nothing_and_runs_nothing(whole) -> None:
    page = whole[0]
    for tag, attrs in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "xlink:href", "action", "data"):
                assert value.startswith(("data:image/webp;base64,", "#")), (tag, name, value[:80])
            assert "url(" not in (value or "").replace("url(#", ""), (tag, name, value)
    style = re.search(r"<style>(.*?)</style>", page.html, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "http" not in style
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_captions_titles_and_names_are_shown_and_never_interpreted(whole) -> None:
    """A prompt, captions, a sample's prompt, page title and name of a held-out source are all hostile here."""
    page = whole[0]
    assert "evil.example" not in "".join(str(attrs.get("src")) for _, attrs in page.elements)
    assert all("onerror" not in attrs for _, attrs in page.elements)
    for part in (page, *(page.section(name) for name in ("prompts", "captions", "examples", "heldout", "making"))):
        assert "</script>" in part.text and not part.unbalanced


@pytest.mark.parametrize("section, which", [("drawings", 1), ("captions", 2)])
def test_every_failure_is_shown_and_told_without_colour(whole, section: str, which: int) -> None:
    page, _, judged = whole
    part = page.section(section)
    failures = [entry for entry in judged if not entry[which].all_right]
    right = [entry for entry in judged if entry[which].all_right]
    assert len(failures) > 6 and len(right) > 6
    assert part.classes()["card failed"] == len(failures)
    assert part.classes()["card"] == 2 * 3  # num_right of each split
    for item, *_ in failures:
        assert item.caption in part.text
    wrong = sum(not value for entry in failures for value in vars(entry[which]).values())
    assert part.text.count("✗") == wrong > 0
    for split, title in (("seen", "Trained"), ("unseen", "Unseen"), ("two_shapes", "Two shapes")):
        of_split = [entry[which].all_right for entry in judged if entry[0].split == split]
        assert re.search(rf"{title}[\w ]*: {sum(of_split)} of {len(of_split)} right", part.text)


def test_a_failed_drawing_says_what_the_judge_sees(whole) -> None:
    page, _, judged = whole
    item = judged[4][0]  # the fifth one (index 5) shows this scene
    assert not judged[5][1].all_right
    assert f"judge sees {item.shapes[0].colour} circle, {item.shapes[0].position}" in page.section("drawings").text


def test_scores_are_the_evaluations_with_number_range_and_settings(whole) -> None:
    page, root, judged = whole
    text = page.section("scores").text
    scores = json.loads((root / "evaluation/evaluation.json").read_text())
    for task in ("text_to_image", "image_to_text"):
        for goal in ("all", "all_unseen", "all_two_shapes"):
            score = scores["scores"][f"scenes/{task}/{goal}"]
            assert f"{100 * score['value']:.1f}\u00a0%" in text
            assert f"{100 * score['low']:.0f}–{100 * score['high']:.0f}\u00a0%" in text
    right = sum(drawn.all_right for item, drawn, _ in judged if item.split == "seen")
    assert f"{right} of 8, " in text
    settings = {"training step": 300, "sampler": "ddim", "steps": 50, "guidance": 3.5, "seed": 11}
    settings["guide"] = "ema-7 of step 100"
    for name, value in settings.items():
        assert f"{name}{value}" in text
    assert "weightsema-69" in text and "clip x0" not in text  # off is not shown


def test_small_pictures_are_embedded_exactly(whole) -> None:
    page, root, judged = whole
    shown = page.section("drawings").pictures()
    first = next(i for i, (_, drawn, _) in enumerate(judged) if not drawn.all_right)
    assert np.array_equal(shown[0], read_picture(root / "evaluation", f"pictures/{first:04d}-drawn.png"))


def test_samples_are_grouped_by_prompt_and_judged_where_the_judge_understands(whole) -> None:
    part = whole[0].section("prompts")
    assert part.classes()["prompt"] == 2 and len(part.pictures()) == 4
    assert "1 of 2 right" in part.text and part.text.count("of 1 right") == 0


def test_reconstructions_are_shown_under_their_originals_and_judged(whole) -> None:
    page, _, judged = whole
    part = page.section("codec")
    pictures = part.pictures()
    assert len(pictures) == 2 * ReportConfig().num_reconstructions
    assert np.array_equal(pictures[0], judged[0][0].picture) and not np.array_equal(pictures[1], pictures[0])
    assert "0 of 8 reconstructions right" in part.text  # this VAE was never trained


def test_previews_stages_and_losses_are_those_on_disk(whole) -> None:
    page = whole[0]
    assert re.findall(r"step (\d+)", page.section("previews").text) == ["100", "200", "400"]
    assert "scenes2.0pretrain40.5total42.5" in page.section("seconds").text
    # exp(1.25); an image loss of 0 means there were no images
    part = page.section("heldout")
    assert "1.25003.49—0.75002.5000" in part.text and "1.50004.480.5000——" in part.text
    labels = [attrs["aria-label"] for tag, attrs in part.elements if tag == "figure"]
    assert labels == ["Error of x0: 0.125 at log SNR 5"]


def test_the_best_and_the_worst_examples_are_shown_by_their_scores(whole) -> None:
    part = whole[0].section("examples")
    shown = [float(value) for value in re.findall(r"score ([0-9.]+)", part.text)]
    assert shown == [2.3, 2.2, 2.1, 2.0, 1.9, 1.8, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


def test_a_run_in_progress_is_reported_and_each_lack_explained(tmp_path: Path, capsys) -> None:
    make_run(tmp_path / "run", rows=1)
    page = report(tmp_path, f"samples={tmp_path / 'nothing'}")
    present = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
    assert present == ["health", "settings", "absent", "making"]
    assert "10 of 400" in page.text
    lacks = page.section("absent").text
    assert "results.jsonl is not there yet, or empty; train.sample writes it" in lacks
    assert "evaluation=FOLDER" in lacks and "Fewer than two rows" in lacks
    # All sections, the differences of runs among them, are there or named.
    assert capsys.readouterr().out.count("left out") == len(SECTIONS) + 1 - len(present)


def test_a_vae_that_is_gone_and_a_lost_picture_cost_only_themselves(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    make_evaluation(tmp_path / "evaluation")
    (tmp_path / "evaluation/pictures/0000-drawn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    page = report(tmp_path, f"evaluation={tmp_path / 'evaluation'}", f"vae={tmp_path}/gone/vae")
    assert "no such folder" in page.section("absent").text
    assert page.section("drawings").text.count("picture missing or unreadable") == 1


def test_a_torn_row_is_left_out_and_mentioned(tmp_path: Path, capsys) -> None:
    make_run(tmp_path / "run")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 310, "text_l')
    page = report(tmp_path)
    assert "1 unreadable line(s) left out" in page.section("making").text
    assert "1 unreadable line(s) left out" in capsys.readouterr().out
    assert "300 of 400" in page.text


def test_what_is_no_run_or_damaged_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run=.*absent: no such folder; give the run_dir"):
        main([f"run={tmp_path / 'absent'}"])
    with pytest.raises(ValueError, match=r"not a run folder of train.pretrain"):
        main([f"run={tmp_path}"])
    with pytest.raises(ValueError, match=r"run=.*a.*expected each folder once"):
        main(["run=a", "run=a/"])
    with pytest.raises(ValueError, match=r"num_right=-1: expected at least 0"):
        main(["num_right=-1"])
    make_run(tmp_path / "run")
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation.json: damaged .* run train.evaluate again"):
        main([f"run={tmp_path / 'run'}", f"evaluation={tmp_path}", f"output={tmp_path / 'r.html'}"])
    (tmp_path / "evaluation.json").write_text('{"scores": [1]}')
    with pytest.raises(ValueError, match=r"evaluation.json: its scores are not those of train.evaluate"):
        main([f"run={tmp_path / 'run'}", f"evaluation={tmp_path}", f"output={tmp_path / 'r.html'}"])
    assert not (tmp_path / "r.html").exists()


def test_pictures_outside_their_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8)))
    assert read_picture(tmp_path, "secret.png") is not None
    assert read_picture(tmp_path / "in", "../secret.png") is None
    assert read_picture(tmp_path / "in", str(tmp_path / "secret.png")) is None


def test_spread_keeps_the_first_and_the_last() -> None:
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread([1, 2], 4) == [1, 2] and spread([1, 2, 3], 1) == [1] and spread([1], 0) == []
