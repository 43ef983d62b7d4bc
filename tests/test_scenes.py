"""The embedded data set is deterministic, its splits hold, its captions read back, its judge is strict and right."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from data.scene_judge import UNCLEAR, Verdict, compare, judge, score
from data.scene_texts import text_documents
from data.scenes import (
    COLOURS,
    PAIR_WORDINGS,
    POSITIONS,
    SHAPES,
    WORDINGS,
    Shape,
    caption,
    coverage,
    held_out_examples,
    make_splits,
    parse_caption,
    training_example,
)
from train.scenes import main

SPLITS = make_splits(0)
RED_CIRCLE = Shape(shape="circle", colour="red", position="top left", size="large")
BLUE_SQUARE = Shape(shape="square", colour="blue", position="bottom right", size="small")


@pytest.fixture(scope="module")
def examples():
    return [training_example(SPLITS, index, 32, 0.15) for index in range(2000)]


def rate(verdicts: list[Verdict]) -> float:
    return sum(verdict.all_right for verdict in verdicts) / len(verdicts)


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / 2 / sigma**2)
    padded = np.pad(picture.astype(float), ((4, 4), (4, 4), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (9, 9), axis=(0, 1))
    return windows @ kernel @ kernel / kernel.sum() ** 2


def test_an_example_is_a_function_of_seed_and_index():
    again = training_example(make_splits(0), 7, 32, 0.15)
    first = training_example(SPLITS, 7, 32, 0.15)
    assert np.array_equal(first.picture, again.picture) and first.caption == again.caption
    other = training_example(make_splits(1), 7, 32, 0.15)
    assert not np.array_equal(first.picture, other.picture)


def test_every_wording_reads_back_whatever_its_case_and_spacing():
    assert parse_caption("  A large  Red circle at the\ttop left .\n") == (RED_CIRCLE,)
    for shape in SPLITS.trained + SPLITS.held_out:
        for wording in range(len(WORDINGS)):
            assert parse_caption(caption((shape,), wording)) == (shape,)
    for wording in range(len(PAIR_WORDINGS)):
        assert parse_caption(caption((RED_CIRCLE, BLUE_SQUARE), wording)) == (RED_CIRCLE, BLUE_SQUARE)
    captions = {caption((RED_CIRCLE,), wording) for wording in range(len(WORDINGS))}
    assert len(captions) == len(WORDINGS) >= 8
    assert max(len(text.split()) for text in captions) <= 12


def test_no_other_text_reads_as_a_caption():
    words = ["a", "large", "big", "red", "circle", "at", "the", "top", "left", "in", "centre", "and", "is", ",", "."]
    rng = np.random.default_rng(0)
    for _ in range(500):
        text = " ".join(rng.choice(words, size=rng.integers(0, 12)))
        assert parse_caption(text) is None or caption(parse_caption(text), 6) == text
    for text in ("", "\x00\udcff", "a large red red circle at the top left", "a red circle", "(" * 1000):
        assert parse_caption(text) is None


def test_held_out_combinations_are_a_tenth_and_leave_every_value_in_training():
    for seed in range(20):
        splits = make_splits(seed)
        assert len(splits.held_out) == 12 and len(splits.trained) == 108
        for attribute, values in (("shape", SHAPES), ("colour", COLOURS), ("position", POSITIONS)):
            counts = Counter(getattr(shape, attribute) for shape in splits.held_out)
            assert all(counts[value] <= 2 * -(-6 // len(values)) for value in values)


def test_what_is_unseen_was_trained_in_no_size_as_the_judge_does_not_tell_sizes():
    judged = {(shape.shape, shape.colour, shape.position) for shape in SPLITS.held_out}
    assert len(judged) == 6
    assert not judged & {(shape.shape, shape.colour, shape.position) for shape in SPLITS.trained}


def test_no_held_out_caption_stands_in_anything_that_is_trained(examples):
    held_out = {example.caption for _, example in held_out_examples(SPLITS, 32, 120)}
    texts = " ".join(text_documents(SPLITS, 1000, 1)[0]).lower()
    for words in held_out:
        assert words not in texts
    for example in examples:
        assert not any(words in said for words in held_out for said in example.captions), example.captions


def test_training_never_shows_what_is_held_out(examples):
    for example in examples:
        assert set(example.shapes) <= set(SPLITS.trained)
    trained = {(frozenset(example.shapes), example.wording) for example in examples}
    trained_scenes = {scene for scene, _ in trained}
    held_out = list(held_out_examples(SPLITS, 32, 120))
    for split, example in held_out:
        assert (frozenset(example.shapes), example.wording) not in trained
        assert split == "seen" or frozenset(example.shapes) not in trained_scenes
    pairs = [(split, example.shapes, example.wording) for split, example in held_out]
    assert len(set(pairs)) == len(pairs)
    counts = Counter(split for split, _ in held_out)
    assert counts["seen"] >= 200 and counts["unseen"] >= 100 and counts["two_shapes"] >= 100


def test_each_picture_has_up_to_three_wordings_of_what_training_may_say(examples):
    """And the pictures and first captions of before: pinned."""
    digest = hashlib.sha256()
    for example in examples[:50]:
        digest.update(example.picture.tobytes() + example.caption.encode())
    held_out = list(held_out_examples(SPLITS, 32, 120))
    for _, example in held_out[::7]:
        digest.update(example.picture.tobytes() + example.caption.encode())
    assert digest.hexdigest()[:16] == "2ee1b4ce19d57a44"
    for example in [*examples, *(example for _, example in held_out)]:
        assert example.captions[0] == example.caption == caption(example.shapes, example.wording)
        assert len(set(example.captions)) == len(example.captions) <= 3
        assert all(parse_caption(text) == example.shapes for text in example.captions)
        number = len(WORDINGS if len(example.shapes) == 1 else PAIR_WORDINGS)
        allowed = {caption(example.shapes, w) for w in range(number) if SPLITS.trains(example.shapes, w)}
        assert set(example.captions[1:]) <= allowed
    assert all(len(example.captions) == 3 for example in examples if len(example.shapes) == 1)
    assert all(len(e.captions) == (3 if split == "seen" else 1) for split, e in held_out)


def test_two_shapes_never_overlap_and_differ_in_colour(examples):
    two = [example.shapes for example in examples if len(example.shapes) == 2]
    assert 0.10 < len(two) / len(examples) < 0.20
    for a, b in two:
        assert a.colour != b.colour and a.position != b.position and "centre" not in (a.position, b.position)


def test_the_judge_is_right_on_drawn_pictures(examples):
    assert rate([score(example.picture, example.shapes) for example in examples]) >= 0.99
    larger = [training_example(SPLITS, index, 64, 0.5) for index in range(100)]
    assert rate([score(example.picture, example.shapes) for example in larger]) >= 0.99


def test_the_judge_reads_the_size_too(examples):
    assert all(judge(example.picture) == tuple(sorted(example.shapes)) for example in examples[:300])


def test_a_little_blur_and_noise_do_not_change_the_verdict(examples):
    rng = np.random.default_rng(0)
    soft = [blurred(e.picture, sigma=1.0) + rng.normal(0, 0.05 * 255, e.picture.shape) for e in examples[:300]]
    soft = [np.clip(picture, 0, 255).astype(np.uint8) for picture in soft]
    assert rate([score(p, e.shapes) for p, e in zip(soft, examples, strict=False)]) >= 0.99


def test_the_judge_is_at_chance_on_noise(examples):
    rng = np.random.default_rng(0)
    white = [rng.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in range(300)]
    clouds = [blurred(picture, sigma=2.5) for picture in white]
    clouds = [np.clip((c - c.mean()) / c.std() * 60 + 128, 0, 255).astype(np.uint8) for c in clouds]
    chance = 1 / (len(SHAPES) * len(COLOURS) * len(POSITIONS))
    for pictures in (white, clouds):
        assert rate([score(p, e.shapes) for p, e in zip(pictures, examples, strict=False)]) <= chance


def test_the_judge_sees_nothing_on_an_empty_picture():
    for level in (0, 128, 255):
        assert judge(np.full((32, 32, 3), level, np.uint8)) == ()


def test_the_judge_does_not_round_to_the_nearest_answer():
    def picture(alpha: np.ndarray) -> np.ndarray:
        red = np.array([220, 30, 30])
        return (235 + alpha[..., None] * (red - 235)).astype(np.uint8)

    between = judge(picture(coverage("circle", 8, 16, 6.9, 32)))  # half-way from top left to bottom left
    assert [shape.position for shape in between] == [UNCLEAR]
    ring = judge(picture(coverage("circle", 16, 16, 7, 32) - coverage("circle", 16, 16, 4.5, 32)))
    assert [shape.shape for shape in ring] == [UNCLEAR]
    three = sum(coverage("circle", x, y, 4.9, 32) for x, y in ((8, 8), (24, 8), (24, 24)))
    assert len(judge(picture(three))) == 3


def test_shapes_are_compared_as_a_set_with_their_attributes_bound():
    assert compare((BLUE_SQUARE, RED_CIRCLE), (RED_CIRCLE, BLUE_SQUARE)).all_right
    swapped = (Shape("circle", "blue", "top left", "large"), Shape("square", "red", "bottom right", "small"))
    assert compare(swapped, (RED_CIRCLE, BLUE_SQUARE)) == Verdict(colour=False, shape=True, position=True)
    for found in (None, (), (RED_CIRCLE,)):
        assert compare(found, (RED_CIRCLE, BLUE_SQUARE)) == Verdict(False, False, False)


def test_texts_are_deterministic_and_hold_out_theirs():
    training, held_out = text_documents(SPLITS, 500, 50)
    assert (training, held_out) == text_documents(make_splits(0), 500, 50)
    assert not set(training) & set(held_out)
    assert all("{" not in text and parse_caption(text) is None for text in training + held_out)
    assert len(set(training)) > 450


SMALL = ["num_train=50", "shard_size=20", "num_heldout_two_shapes=10", "num_text=30", "num_text_heldout=5"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_program_writes_shards_that_webdataset_reads(tmp_path):
    main([f"output={tmp_path / 'a'}", *SMALL])
    shards = [str(path) for path in sorted((tmp_path / "a/train").iterdir())]
    assert [Path(shard).name for shard in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    records = list(wds.WebDataset(shards, shardshuffle=False).decode("rgb8"))
    assert len(records) == 50
    assert [record["__key__"] for record in records[18:22]] == ["000000018", "000000019", "000010000", "000010001"]
    for index, record in enumerate(records):
        example = training_example(SPLITS, index, 32, 0.15)
        assert np.array_equal(record["png"], example.picture)
        assert record["txt"] == record["json"]["caption"] == example.caption
        assert record["json"]["captions"] == list(example.captions)
        assert tuple(Shape(**shape) for shape in record["json"]["shapes"]) == example.shapes
    held_out = list(wds.WebDataset([str(tmp_path / "a/heldout/00000.tar")], shardshuffle=False).decode())
    assert Counter(record["json"]["split"] for record in held_out) == {"seen": 216, "unseen": 120, "two_shapes": 10}
    texts = (tmp_path / "a/text/00000.jsonl").read_text().splitlines()
    assert len(texts) == 30 and all(json.loads(line)["text"] for line in texts)


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    main([f"output={tmp_path / 'a'}", *SMALL, "processes=1"])
    main([f"output={tmp_path / 'b'}", *SMALL, "processes=3"])
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_second_call_reuses_and_other_settings_draw_anew(tmp_path, capsys):
    output = tmp_path / "a"
    (tmp_path / "a.partial" / "train").mkdir(parents=True)  # as an interrupted run leaves it
    main([f"output={output}", *SMALL])
    before = os.stat(output / "train/00000.tar").st_mtime_ns
    main([f"output={output}", *SMALL])
    assert "reusing" in capsys.readouterr().out
    assert os.stat(output / "train/00000.tar").st_mtime_ns == before
    main([f"output={output}", *SMALL, "num_train=30"])
    assert len(list((output / "train").iterdir())) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_folder_of_someone_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"not made by train\.scenes"):
        main([f"output={tmp_path}", *SMALL])
    assert (tmp_path / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "bad", ["resolution=30", "num_train=-1", "shard_size=10001", "two_shapes_share=1.5", "seed=-1"]
)
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"{bad}.*expected"):
        main([bad])
