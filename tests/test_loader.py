"""The global batch is the same for any ranks, workers and micro-batches; the end and errors reach the trainer."""

import itertools
import multiprocessing
import subprocess
from dataclasses import replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.arrangement import OrderConfig
from data.dataset import DataConfig, open_data
from data.documents import seed_from
from data.lane_state import LaneState
from data.loader import Loader, StepBatch, epochs
from data.packing import PADDING_DOCUMENT, PackedBatch
from data.source import SourceConfig
from data.tokenizer import Tokenizer
from tests.disks import can_mount, own_mounts
from tests.sources import data_config, interleaved, make_source, pairs, texts

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchdata")  # of the number of workers on few cores
PATCH = 2
FIELDS = ("input_ids", "labels", "document_ids", "image_ids", "position_ids", "visible_until", "grid_positions")


def make_loader(config: DataConfig, rank: int = 0, world_size: int = 1, micro: int = 2, **options: Any) -> Loader:
    """A loader that opened its data itself, as each rank does."""
    data = open_data(config, 3, PATCH)
    return Loader(data, config, rank=rank, world_size=world_size, micro_batch_size=micro, **options)


def next_batch(loader: Loader) -> StepBatch:
    batch = loader.next(timeout_seconds=60)
    assert batch is not None
    return batch


def rows_of(batch: PackedBatch) -> list[tuple]:
    """Each row's bytes, and those of its pictures and their draws, taken apart through the batch's index arrays."""
    length = batch.input_ids.shape[1]
    pictures: list[list[tuple]] = [[] for _ in batch.input_ids]
    place = 0
    for (h, w), images in batch.images.items():
        patches = (h // PATCH) * (w // PATCH)
        for slot in range(len(images.u)):
            row, first = divmod(int(batch.image_token_index[place]), length)
            place += patches
            if slot < images.num_valid:
                tensors = (images.stored, images.noise, images.posterior_noise, images.u)
                tensors += (images.before_caption, images.is_target)
                given = (b"" if tensor is None else tensor[slot].numpy().tobytes() for tensor in tensors)
                pictures[row].append((first, *given))
    return [
        (*(getattr(batch, name)[i].numpy().tobytes() for name in FIELDS), sorted(pictures[i]))
        for i in range(len(batch.input_ids))
    ]


def global_batch(shares: list[tuple[range, StepBatch]]) -> dict[int, tuple]:
    """Put the ranks' shares of a step together, by lane."""
    together = {}
    for lanes, share in shares:
        rows = [row for batch in share.micro_batches for row in rows_of(batch)]
        together |= dict(zip(lanes, rows, strict=False))
        padding = [batch.document_ids for batch in share.micro_batches]
        assert (torch.cat(padding)[len(lanes) :] == PADDING_DOCUMENT).all()
    return dict(sorted(together.items()))


def run(
    config: DataConfig,
    steps: int,
    world_size: int = 1,
    micro: int = 2,
    first_step: int = 1,
    states: dict[int, LaneState] | None = None,
) -> tuple[list[dict[int, tuple]], list[dict[int, LaneState]]]:
    """Return the global batch of each step, and the states of all lanes after it."""
    options = {"first_step": first_step, "states": states}
    loaders = [make_loader(config, rank, world_size, micro, **options) for rank in range(world_size)]
    batches, after = [], []
    for step in range(first_step, first_step + steps):
        shares = [next_batch(loader) for loader in loaders]
        assert {share.step for share in shares} == {step}
        assert len({len(share.micro_batches) for share in shares}) == 1
        assert len({len(batch.input_ids) for share in shares for batch in share.micro_batches}) == 1
        batches.append(global_batch([(loader.lanes, share) for loader, share in zip(loaders, shares, strict=True)]))
        after.append({lane: state for share in shares for lane, state in share.lane_states.items()})
    for loader in loaders:
        loader.close()
    return batches, after


@pytest.fixture(scope="module")
def mixed(
    pairs_folder: Path, texts_folder: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> DataConfig:
    """Pictures, texts and interleaved documents; one of them weighs more from step 4 on."""
    folder = tmp_path_factory.mktemp("mixed") / "interleaved"
    make_source(folder, tokenizer, interleaved(20, lengths=(0, 12)), shard_sizes=[9, 11])
    sources = {"pairs": pairs_folder, "texts": texts_folder}
    later = SourceConfig(path=str(folder), weight=0.5, weight_from={"4": 2.0})
    return data_config(tokenizer, {**sources, "interleaved": later})


@pytest.mark.parametrize(
    ("world_size", "lanes"),
    [
        *((1, 8), (1, 11), (3, 8), (3, 11), (8, 11)),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 8), (2, 11), (4, 8), (4, 11), (8, 8))),
    ],
)
def test_the_global_batch_is_the_same_for_any_ranks_workers_and_micro_batches(
    mixed: DataConfig, lanes: int, world_size: int, undivided: dict[int, Any]
) -> None:
    """P3, bytes and all: tokens, pictures, u, noise and posterior draws of five steps, and the states after each."""
    config = replace(mixed, lanes=lanes)
    if lanes not in undivided:
        undivided[lanes] = run(config, 5, micro=lanes)
    expected = undivided[lanes]
    assert len(expected[0][0]) == lanes and any(row[-1] for row in expected[0][0].values())
    for workers, micro in ((0, 1), (1, 3), (3, 2))[: 1 if lanes == 8 else 3]:
        found = run(replace(config, num_workers=workers, read_ahead=2 * workers), 5, world_size, micro)
        assert found == expected, (world_size, workers, micro)


def test_what_is_given_copied_and_left_out_is_the_same_for_any_ranks_and_after_a_resume(
    mixed: DataConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """P3, P4: context, its dropout and clean copies; every image of a row is there, and copies have their draws."""
    edits = [(image, words, image) for words, image in pairs(24, lengths=(2, 6), seed=4)]
    make_source(tmp_path / "edits", tokenizer, edits, shard_sizes=[11, 13], roles=["context", "context", "target"])
    order = OrderConfig(caption_first=0.3, text_dropout=0.2, image_dropout=0.2, context_dropout=0.2)
    sources = {**mixed.sources, "edits": SourceConfig(path=str(tmp_path / "edits"), weight=2.0)}
    config = replace(mixed, sources=sources, order=order, clean_copies=True, lanes=8)
    expected, states = run(config, 4, micro=8)
    for workers, micro, world_size in ((0, 2, 3), (2, 3, 2)):
        assert run(replace(config, num_workers=workers), 4, world_size, micro) == (expected, states)
    assert run(config, 2, world_size=3, first_step=3, states=states[1]) == (expected[2:], states[2:])
    assert run(replace(config, clean_copies=False), 4, micro=8) != (expected, states)


@pytest.fixture(scope="module")
def undivided() -> dict[int, Any]:
    """By number of lanes: what one rank without workers makes."""
    return {}


def test_a_run_continues_with_the_next_batch_on_other_ranks_and_workers(mixed: DataConfig) -> None:
    """P4: what was prefetched and not used comes again; draws follow the step, not the process."""
    config = replace(mixed, lanes=9, prefetch_steps=3)
    expected, states = run(config, 9)
    changes = [(1, 1, 0, 2), (4, 3, 1, 4), (7, 4, 0, 1), (3, 2, 3, 3), (5, 8, 0, 1), (2, 8, 1, 2)]
    for done, world_size, workers, micro in changes:
        other = replace(config, num_workers=workers, prefetch_steps=1)
        found, after = run(other, 9 - done, world_size, micro, done + 1, states[done - 1])
        assert found == expected[done:] and after == states[done:], (done, world_size, workers)


def test_noise_is_drawn_from_seed_step_and_lane(mixed: DataConfig) -> None:
    """By the rule, on the CPU generator: u, then for each picture noise and posterior noise."""
    batches, _ = run(mixed, 3)
    for step, rows in enumerate(batches, start=1):
        for lane, row in rows.items():
            generator = torch.Generator().manual_seed(seed_from("images", 3, step, lane))
            u = torch.rand(len(row[-1]), generator=generator)
            for i, (_, moments, noise, posterior_noise, drawn_u, *_) in enumerate(row[-1]):
                cells = len(moments) // 2 // 2  # f16, mean and log variance
                both = torch.randn(2, cells, generator=generator)
                assert np.array_equal(np.frombuffer(noise, np.float32), both[0].numpy())
                assert np.array_equal(np.frombuffer(posterior_noise, np.float32), both[1].numpy())
                assert np.frombuffer(drawn_u, np.float32) == u[i].numpy()
    assert len({row[-1][0][2] for rows in batches for row in rows.values() if row[-1]}) > 8  # no noise twice


@pytest.mark.parametrize(
    ("lanes", "world_size", "micro", "expected"), [(6, 4, 1, 2), (6, 4, 8, 1), (7, 2, 2, 2), (5, 5, 2, 1)]
)
def test_all_ranks_run_as_many_micro_steps(
    mixed: DataConfig, lanes: int, world_size: int, micro: int, expected: int
) -> None:
    loaders = [make_loader(replace(mixed, lanes=lanes), rank, world_size, micro) for rank in range(world_size)]
    assert [loader.micro_steps for loader in loaders] == [expected] * world_size
    for loader in loaders:
        batch = next_batch(loader)
        assert len(batch.micro_batches) == expected and not batch.ended
        assert batch.num_images == sum(b.num_images for b in batch.micro_batches)
        assert batch.num_text_targets == sum(int((b.labels != -100).sum()) for b in batch.micro_batches) > 0
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_finite_data_set_ends_on_each_rank(pairs_folder: Path, tokenizer: Tokenizer, workers: int) -> None:
    """Lanes end one by one; a rank whose lanes have all ended hands out empty batches that say so."""
    source = SourceConfig(path=str(pairs_folder), repeat=False)
    config = data_config(tokenizer, {"a": source}, num_workers=workers)
    loader = make_loader(config)
    images, batches = 0, []
    while not batches or not batches[-1].ended:
        batches.append(next_batch(loader))
        images += batches[-1].num_images
    assert images == 60
    for batch in (batches[-1], next_batch(loader)):
        assert batch.ended and batch.num_images == batch.num_text_targets == 0
        assert all((b.document_ids == PADDING_DOCUMENT).all() for b in batch.micro_batches)
    loader.close()


def test_a_batch_that_is_not_there_in_time_is_none(mixed: DataConfig) -> None:
    """So that a rank that waits can vote. Afterwards no batch is missing."""
    loader = make_loader(mixed)
    found = [loader.next(timeout_seconds=0) for _ in range(3)]
    assert None in found or all(found)
    steps = [batch.step for batch in found if batch is not None]
    while len(steps) < 30:
        batch = loader.next(timeout_seconds=0.0001)
        steps += [batch.step] if batch is not None else []
    assert steps == list(range(1, 31))
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_reader_surfaces_and_stays(tmp_path: Path, tokenizer: Tokenizer, workers: int) -> None:
    """Raised by `next`, with the shard's name, at this and every later call; nothing hangs."""
    make_source(tmp_path / "a", tokenizer, texts(40))
    config = data_config(tokenizer, {"a": tmp_path / "a"}, num_workers=workers)
    data = open_data(config, 3, PATCH)
    (tmp_path / "a" / "00000.tar").unlink()
    before = set(multiprocessing.active_children())
    loader = Loader(data, config, rank=0, world_size=1, micro_batch_size=2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"skipped 1000 documents in a row.*00000.tar#.*No such file"):
            next_batch(loader)
    loader.close()
    assert not loader._thread.is_alive(), "it ended by itself, not at the timeout"
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.slow  # torch looks after its workers every five seconds
def test_a_killed_worker_is_an_error(mixed: DataConfig) -> None:
    before = set(multiprocessing.active_children())
    loader = make_loader(replace(mixed, num_workers=2, prefetch_steps=1))
    next_batch(loader)
    worker = (set(multiprocessing.active_children()) - before).pop()
    worker.kill()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        for _ in range(10):
            next_batch(loader)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_leaves_no_process_or_thread(mixed: DataConfig, workers: int) -> None:
    before = set(multiprocessing.active_children())
    loader = make_loader(replace(mixed, num_workers=workers))
    next_batch(loader)
    assert len(set(multiprocessing.active_children()) - before) == workers
    loader.close()
    assert not loader._thread.is_alive() and set(multiprocessing.active_children()) <= before


def test_a_batch_says_how_many_documents_were_skipped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Over the rank's lanes, since the run began."""
    make_source(tmp_path / "a", tokenizer, texts(40), shard_sizes=[38, 2])
    config = data_config(tokenizer, {"a": SourceConfig(path=str(tmp_path / "a"), repeat=False)})
    data = open_data(config, 3, PATCH)
    (tmp_path / "a" / "00001.tar").unlink()
    loader = Loader(data, config, rank=0, world_size=1, micro_batch_size=2)
    while not (batch := next_batch(loader)).ended:
        pass
    assert batch.num_skipped == 2
    loader.close()
    resumed = Loader(data, config, rank=0, world_size=1, micro_batch_size=2, first_step=9, states=batch.lane_states)
    assert next_batch(resumed).num_skipped == 2
    resumed.close()


def test_epochs_are_each_lanes_own(mixed: DataConfig) -> None:
    _, states = run(mixed, 40)
    progress = [epochs(state) for state in states]
    assert progress[0].shape == (4, 3) and progress[0].max() == 0 and progress[-1].min() >= 1
    assert all((b >= a).all() for a, b in itertools.pairwise(progress))


def test_p1_weights_are_solved_so_that_image_and_text_tokens_are_one_to_one(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """The paper's mix, captions and dropout counted; among sources of one kind the given weights hold."""
    folders = {
        "large": make_source(tmp_path / "large", tokenizer, pairs(60, grids=[(8, 8)], lengths=(3, 12))),
        "small": make_source(tmp_path / "small", tokenizer, pairs(40, grids=[(4, 4), (4, 8)], lengths=(1, 4), seed=1)),
        "long": make_source(tmp_path / "long", tokenizer, texts(60, lengths=(20, 60))),
        "short": make_source(tmp_path / "short", tokenizer, texts(90, lengths=(1, 9), seed=2)),
    }
    weights = {"large": 3.0, "small": 1.0, "long": 0.2, "short": 0.1}
    sources = {name: SourceConfig(path=str(folder), weight=weights[name]) for name, folder in folders.items()}
    config = data_config(tokenizer, sources, image_share=0.5)
    solved = {source.number: source.config.weight for source in open_data(config, 3, PATCH).sources}
    assert solved[0] == pytest.approx(3 * solved[1]) and solved[2] == pytest.approx(2 * solved[3])
    loader, images, tokens = make_loader(config), 0, 0
    for _ in range(150):
        batch = next_batch(loader)
        tokens += batch.num_tokens
        images += sum(int((micro.image_ids >= 0).sum()) for micro in batch.micro_batches)
    loader.close()
    assert images / tokens == pytest.approx(0.5, abs=0.01)

    for changes, words in [
        ({"image_share": 0.95}, r"data.image_share=0.95: .*hold 0\.\d+ image tokens a token"),
        ({"sources": {name: sources[name] for name in ("large", "small")}}, "0 sources hold text alone"),
    ]:
        with pytest.raises(ValueError, match=words):
            open_data(replace(config, **changes), 3, PATCH)


def _read_with_little_shared_memory(config: DataConfig, kib: int, said: SimpleQueue) -> None:
    own_mounts()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", "/dev/shm"], check=True)
    loader = make_loader(config)
    try:
        for _ in range(100):
            next_batch(loader)
    except OSError as error:
        said.put(str(error))
    loader.close()


@pytest.mark.skipif(not can_mount(), reason="needs mounts of its own")
def test_too_little_shared_memory_for_workers_is_named_with_its_size_and_the_remedy(mixed: DataConfig) -> None:
    config, kib = replace(mixed, num_workers=4), 64
    context = multiprocessing.get_context("forkserver")  # whose mounts are not this process's
    said = context.SimpleQueue()
    process = context.Process(target=_read_with_little_shared_memory, args=(config, kib, said))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and not said.empty()
    words = said.get()
    assert words.startswith(f"/dev/shm is too small for data.num_workers=4: {kib / 1024:.3g} MiB"), words
    assert "--shm-size" in words and "data.num_workers=0" in words
