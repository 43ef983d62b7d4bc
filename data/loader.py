"""Lanes -> PackedBatch: workers, prefetch, pinned memory, the state that rides along, the random draws of each lane.

Workers own lanes and yield rows; a thread of the main process draws their noise (cheaper than sending it), collates
them into micro-batches and keeps a step or two ready, so that a rank that waits for data can go on answering its
peers. The state is ours, by lane, and does not depend on the number of workers; torchdata's loader runs the workers
and its own state is not used.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from omegaconf import MISSING
from torch.utils.data import IterableDataset, get_worker_info

from data.documents import OrderConfig, seed_from
from data.lanes import Lane, LaneSettings, Source, SourceConfig, lanes_of_rank
from data.manifest import LatentSpec, Manifest
from data.packing import ImageDraws, PackedBatch, PackedSequence, collate, pack, patch_grid
from data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # encoded data sets by name, mixed by weight
    # Share of image tokens (patches) among all, in (0, 1): the weights of sources with and without images are scaled
    # to meet it, captions counting as text (the paper: 0.5). null: weights as given.
    image_share: float | None = None
    tokenizer: str = MISSING  # SentencePiece model that made the shards' token ids
    lanes: int = 512  # L, sequences a global batch; the number of ranks may not exceed it
    sequence_length: int = 4096  # S, tokens a sequence
    shuffle_block: int = 1024  # documents a lane shuffles among
    look_ahead: int = 16  # documents a lane keeps pending to fill sequences from
    order: OrderConfig = field(default_factory=OrderConfig)
    num_workers: int = 0  # loader processes a rank; 0 reads in the rank's own prefetch thread
    prefetch_steps: int = 2  # steps a rank keeps ready, >= 1
    max_bad_documents: int = 100  # skipped documents over all lanes after which the run stops

    def __post_init__(self) -> None:
        for name in ("lanes", "sequence_length", "shuffle_block", "look_ahead", "prefetch_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: expected at least 1")
        for name in ("num_workers", "max_bad_documents"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)}: expected 0 or more")
        if self.image_share is not None and not 0 < self.image_share < 1:
            raise ValueError(f"data.image_share={self.image_share}: expected a share in (0, 1), or null")


@dataclass(frozen=True)
class DataSet:
    """What a config's `data` section names, opened and checked."""

    sources: list[Source]
    settings: LaneSettings
    tokenizer: Tokenizer
    latent_spec: LatentSpec | None  # None when every source is text only
    grids: list[tuple[int, int]]  # latent grids that occur, sorted

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a resume must find unchanged."""
        return {
            "tokenizer": self.tokenizer.hash,
            "sources": ",".join(f"{s.manifest.content_hash}*{s.config.weight}*{s.config.repeat}" for s in self.sources),
            **{name: str(value) for name, value in vars(self.settings).items()},
        }


def open_data(config: DataConfig, seed: int, patch_size: int) -> DataSet:
    """Open every source; raise ValueError or FileNotFoundError for data that this run cannot train on."""
    if not config.sources:
        raise ValueError("data.sources is empty; name at least one, e.g. data.sources.images.path=FOLDER")
    tokenizer = Tokenizer(config.tokenizer)
    settings = LaneSettings(
        seed=seed,
        lanes=config.lanes,
        sequence_length=config.sequence_length,
        patch_size=patch_size,
        shuffle_block=config.shuffle_block,
        look_ahead=config.look_ahead,
        order=config.order,
        special=tokenizer.special,
    )
    manifests = {name: Manifest.load(Path(source.path)) for name, source in config.sources.items()}
    weights = source_weights(config, manifests, patch_size)
    sources, spec, grids = [], None, set()
    for number, (name, source) in enumerate(config.sources.items()):
        manifest = manifests[name]
        manifest.check_files()
        if manifest.tokenizer_hash != tokenizer.hash:
            raise ValueError(
                f"data.sources.{name} was encoded with tokenizer {manifest.tokenizer_hash}, but {config.tokenizer} is "
                f"{tokenizer.hash}; name the tokenizer it was encoded with, or encode it again"
            )
        if spec is not None and manifest.latent_spec not in (None, spec):
            raise ValueError(
                f"data.sources.{name} holds latents of VAE {manifest.latent_spec.vae_hash}, other sources those of "
                f"{spec.vae_hash} (or other statistics); encode all sources with one VAE and `stats_from` one of them"
            )
        if manifest.records < config.lanes:
            raise ValueError(
                f"data.sources.{name} has {manifest.records} documents, fewer than data.lanes={config.lanes}; "
                "use fewer lanes or more data"
            )
        spec = spec or manifest.latent_spec
        grids |= manifest.grids()
        sources.append(Source(number, replace(source, weight=weights[name]), manifest, settings))
    for grid in grids:
        rows, columns = patch_grid(grid, patch_size)
        if rows * columns + 4 > config.sequence_length:
            raise ValueError(
                f"an image of latent grid {grid[0]}x{grid[1]} is {rows * columns + 4} tokens with BOS, BOI, EOI, EOS, "
                f"more than data.sequence_length={config.sequence_length}; use longer sequences or larger patches"
            )
    return DataSet(sources, settings, tokenizer, spec, sorted(grids))


def source_weights(config: DataConfig, manifests: dict[str, Manifest], patch_size: int) -> dict[str, float]:
    """Return each source's share of all tokens, up to a common factor: as given, or scaled to meet `image_share`.

    Raises ValueError where no scaling can meet it.
    """
    weights = {name: source.weight for name, source in config.sources.items()}
    if config.image_share is None:
        return weights
    kept = 1 - config.order.caption_dropout
    image_shares = {name: manifest.image_token_share(patch_size, kept) for name, manifest in manifests.items()}
    with_images = {name: weight for name, weight in weights.items() if image_shares[name] > 0}
    total = sum(with_images.values())
    most = sum(weight * image_shares[name] for name, weight in with_images.items()) / total if total else 0.0
    if most <= config.image_share or len(with_images) == len(weights):
        raise ValueError(
            f"data.image_share={config.image_share}: the sources with images hold {most:.3f} image tokens a token, and "
            f"{len(weights) - len(with_images)} sources hold text alone; expected less than the former and at least "
            "one of the latter; add such a source, or set data.image_share=null"
        )
    share = config.image_share / most  # of all tokens, in documents with images
    text_total = sum(weights.values()) - total
    return {
        name: share * weight / total if name in with_images else (1 - share) * weight / text_total
        for name, weight in weights.items()
    }


@dataclass
class StepBatch:
    """One rank's share of a step, and the state of its lanes after it."""

    step: int  # counts from 1: the batch that makes the model's step-th update
    micro_batches: list[PackedBatch]
    lane_states: dict[int, dict]
    num_skipped: int  # documents skipped so far by this rank's lanes
    ended: bool  # no lane of this rank had anything left

    @property
    def num_text_targets(self) -> int:
        return sum(batch.num_text_targets for batch in self.micro_batches)

    @property
    def num_images(self) -> int:
        return sum(batch.num_images for batch in self.micro_batches)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(batch.input_ids.numel() - batch.num_padding for batch in self.micro_batches)


def draw_images(seed: int, step: int, lane: int, row: PackedSequence) -> ImageDraws:
    """Draw u, noise and posterior noise of a row's images on the CPU from (seed, step, lane)."""
    generator = torch.Generator().manual_seed(seed_from("images", seed, step, lane))
    u = torch.rand(len(row.images), generator=generator)
    noise, posterior_noise = [], []
    for image in row.images:
        channels, h, w = image.moments.shape
        both = torch.randn((2, channels // 2, h, w), generator=generator)
        noise.append(both[0])
        posterior_noise.append(both[1])
    return ImageDraws(u, noise, posterior_noise)


@dataclass
class LaneRow:
    lane: int
    row: PackedSequence | None  # None: the lane has ended
    state: dict  # after this row


class LaneRows(IterableDataset):
    """Yield, step by step, the rows of the lanes this process or worker owns."""

    def __init__(self, data: DataSet, lanes: range, states: dict[int, dict]):
        self.data, self.lanes, self.states = data, lanes, states

    def __iter__(self) -> Iterator[list[LaneRow]]:
        worker = get_worker_info()
        numbers = self.lanes[worker.id :: worker.num_workers] if worker else self.lanes
        data = self.data
        lanes = [Lane(number, data.sources, data.settings, self.states.get(number)) for number in numbers]
        while True:
            yield [LaneRow(lane.number, lane.next_row(), lane.state()) for lane in lanes]


class Loader:
    """Hand one rank its StepBatch of each step, from `first_step` on, continuing from `states` (by lane)."""

    def __init__(
        self,
        data: DataSet,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        first_step: int = 1,
        states: dict[int, dict] | None = None,
        pin_memory: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,  # runs first in each loader process
    ):
        self.data, self.config, self.pin_memory = data, config, pin_memory
        self._worker_init_fn = worker_init_fn
        self.lanes = lanes_of_rank(rank, world_size, config.lanes)
        most = -(-config.lanes // world_size)  # rows of the fullest rank: all ranks run as many micro-steps
        self.micro_batch_size = min(micro_batch_size, most)
        self.micro_steps = -(-most // self.micro_batch_size)
        self._rows = LaneRows(data, self.lanes, states or {})
        self._first_step = first_step
        self._ready: queue.Queue = queue.Queue(maxsize=config.prefetch_steps)
        self._workers: list[BaseProcess] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self._thread.start()

    def next(self, timeout_seconds: float) -> StepBatch | None:
        """Return the next step's batch, None if it is not there in time; raise what the reader raised."""
        try:
            item = self._ready.get(timeout=timeout_seconds)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            self._ready.put(item)  # the reader is gone: every later call says so too
            raise item
        return item

    def close(self) -> None:
        """Stop reading, and kill workers that do not: one that hangs in a read would keep this process from ending."""
        self._closed.set()
        self._thread.join(timeout=5)
        for worker in self._workers:
            worker.kill()

    def _fill(self) -> None:
        try:
            for step, rows in enumerate(self._steps(), start=self._first_step):
                self._hand_over(self._collate(step, sorted(rows, key=lambda row: row.lane)))
                if self._closed.is_set():
                    return
        except BaseException as error:  # whatever it is, `next` raises it in the trainer's thread
            self._hand_over(error)

    def _hand_over(self, item: StepBatch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def _steps(self) -> Iterator[list[LaneRow]]:
        """Yield the rows of all owned lanes, a step at a time, whatever the number of workers."""
        workers = min(self.config.num_workers, len(self.lanes))
        if not workers:
            yield from self._rows
            return
        from torchdata.stateful_dataloader import StatefulDataLoader

        # Each worker yields one item a step (all its lanes), and items come in the workers' order. Forked, because
        # open sources (caches, files) do not pickle.
        items = iter(
            StatefulDataLoader(
                self._rows,
                batch_size=None,
                num_workers=workers,
                multiprocessing_context="fork",
                worker_init_fn=self._worker_init_fn,
                prefetch_factor=self.config.prefetch_steps,
                snapshot_every_n_steps=1 << 40,
            )
        )
        self._workers = items._workers
        try:
            while True:
                yield [row for _ in range(workers) for row in next(items)]
        finally:
            items._shutdown_workers()  # left to the garbage collector, it may find the workers' queues gone and wait

    def _collate(self, step: int, rows: list[LaneRow]) -> StepBatch:
        settings = self.data.settings
        empty = pack([], settings.sequence_length, settings.special.pad)
        no_draws = ImageDraws(torch.zeros(0), [], [])
        filled = [
            (row.row, draw_images(settings.seed, step, row.lane, row.row)) if row.row is not None else (empty, no_draws)
            for row in rows
        ]
        filled += [(empty, no_draws)] * (self.micro_steps * self.micro_batch_size - len(filled))
        size = self.micro_batch_size
        batches = [
            collate(*zip(*filled[i : i + size], strict=True), settings.patch_size) for i in range(0, len(filled), size)
        ]
        return StepBatch(
            step=step,
            micro_batches=[batch.pin_memory() for batch in batches] if self.pin_memory else batches,
            lane_states={row.lane: row.state for row in rows},
            num_skipped=sum(sum(row.state["skipped"].values()) for row in rows),
            ended=all(row.row is None for row in rows),
        )


def epochs(lane_states: dict[int, dict]) -> np.ndarray:
    """Return the epoch of each (lane, source), int64 [L, sources]: lanes advance on their own."""
    return np.array([[cursor[0] for cursor in state["cursors"]] for state in lane_states.values()])
