"""The encoder: raw documents in, records of token ids and images out, in the order of the input.

Threads decode and resize pictures (Pillow releases the GIL) ahead of the VAE, which runs ahead of the writer. Batches
hold pictures of one size, never cross an input file, and depend only on that file and the settings, so every worker
writes the same bytes, with any number of threads.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from data.chat import Chat, EndlessTemplate, Message
from data.documents import ImageKind, Role, decode_document, encode_record
from data.manifest import FORMAT_VERSION, LatentSpec, LatentSums
from data.pictures import bucket_sizes, decode_picture
from data.raw_document import KeysConfig, RawDocument
from data.remote import FileVersion
from data.shards import MAX_RECORD_BYTES, BadRecord, BadRecords, Record
from data.storage import Location
from data.strict_json import dumps
from data.tokenizer import Tokenizer
from model.autoencoders import load_latent_space
from model.latent_space import LatentSpace
from train.distributed.launcher import place
from train.distributed.process import set_allocator
from train.encoding.word_counts import WordCounts

AHEAD = 8  # batches of pictures decoded ahead of the VAE, and batches of documents that may wait for a rare size


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(KeysConfig):
    tokenizer: Location = "runs/tokenizer.model"  # a SentencePiece model, a tokenizer.json, or a folder with one
    # Folder or hub id of one of diffusers' AutoencoderKL, AutoencoderKLFlux2, AutoencoderDC, AutoencoderRAE,
    # AutoencoderTiny; pixels: pictures are kept as bytes, without loss. Not needed for text.
    vae: Location | None = None
    resolution: int = 256  # pixels of a square picture's side, a multiple of the VAE's stride
    # centre: the square in the middle (the paper's). buckets: the nearest of several aspects from 1:2 to 2:1 with at
    # most as many pixels as the square.
    crop: Literal["centre", "buckets"] = "centre"
    bucket_multiple: int = 32  # pixels: divides both sides of every bucket; a multiple of VAE stride x patch size
    batch_size: int = 32  # pictures a VAE batch; affects the latents' last bits
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the VAE; auto: bfloat16 on CUDA, else float32
    decode_threads: int = 0  # threads that decode and resize pictures; 0: one a core of this process's share
    # Source of the mean and deviation by which training whitens latents. vae: the scaling that the VAE's config states,
    # or diffusers' default; measured: these pictures' latents; auto: vae if the config states a scaling other than 1
    # and for pixels (mean 0 and deviation 1), else measured.
    latent_stats: Literal["auto", "measured", "vae"] = "auto"
    # Encoded folder, run, checkpoint or export whose latent statistics to use instead: for held-out data, and for
    # further training of a model.
    stats_from: Location | None = None
    device: str = "auto"  # auto, cpu, cuda or cuda:N

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution < 1 or self.batch_size < 1 or self.bucket_multiple < 1:
            raise ValueError(
                f"resolution={self.resolution}, batch_size={self.batch_size}, bucket_multiple={self.bucket_multiple}: "
                "expected at least 1"
            )
        if self.decode_threads < 0:
            raise ValueError(f"decode_threads={self.decode_threads}: expected 0 or more")
        if self.stats_from is not None and self.latent_stats != "auto":
            raise ValueError(
                f"latent_stats={self.latent_stats} and stats_from={self.stats_from} both say where the statistics come "
                "from: leave one out"
            )


@dataclass
class _Picture:
    pixels: np.ndarray  # uint8 [H, W, 3]
    stored: np.ndarray | None = None  # what its record keeps, once encoded: see model/latent_space.py

    @property
    def encoded(self) -> np.ndarray:
        assert self.stored is not None
        return self.stored


@dataclass
class _Draft:
    """A document being encoded: its texts, and its pictures as far as they got."""

    document: RawDocument
    segments: list[str | _Picture]

    @property
    def pictures(self) -> list[_Picture]:
        return [segment for segment in self.segments if isinstance(segment, _Picture)]

    @property
    def is_encoded(self) -> bool:
        return all(picture.stored is not None for picture in self.pictures)


class Encoder:
    """Encodes one input file after another."""

    def __init__(self, config: EncoderConfig, has_pictures: bool, stats: LatentSpec | None = None):
        """Load the tokenizer and, for pictures, the VAE. `stats`: the latent spec of `config.stats_from`."""
        self.config = config
        self.tokenizer = Tokenizer(config.tokenizer)
        self.chat = Chat(self.tokenizer)
        self.space: LatentSpace | None = None  # None: text alone
        self.dtype, self.device = torch.float32, torch.device("cpu")
        if has_pictures:
            self._load_space()
        self.kind: ImageKind = self.space.kind if self.space is not None else "moments"
        self.channels = self.space.channels if self.space is not None else 0
        if config.crop == "buckets":
            self.sizes = bucket_sizes(config.resolution, config.bucket_multiple)
        else:
            self.sizes = ((config.resolution, config.resolution),)
        self.given_spec, self.stats_source = self._given_spec(stats)
        # Of the current file.
        self.latent_sums, self.words = LatentSums.total(self.channels), WordCounts()
        self.num_threads = config.decode_threads or max(1, len(os.sched_getaffinity(0)) // place().local_world_size)
        self._threads = ThreadPoolExecutor(self.num_threads, "decode")

    def close(self) -> None:
        """Drop pictures that wait to be decoded, so that the process can end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _load_space(self) -> None:
        config = self.config
        if config.vae is None:
            raise ValueError("inputs hold pictures: give vae=FOLDER or a hub id, or vae=pixels")
        device = _device(config.device)
        space = self.space = load_latent_space(config.vae)
        if space.kind != "pixels":  # else no model runs
            self.device = device
            if config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda"):
                self.dtype = torch.bfloat16
        space.to(self.device, self.dtype)
        resolution, stride = config.resolution, space.stride
        multiple = config.bucket_multiple if config.crop == "buckets" else stride
        if resolution % stride or resolution % multiple:
            raise ValueError(
                f"resolution={resolution}: expected a multiple of the VAE's stride {stride}"
                + (f" and of bucket_multiple={multiple}" if multiple != stride else "")
            )
        if multiple % stride:
            raise ValueError(f"bucket_multiple={multiple}: expected a multiple of the VAE's stride {stride}")
        if space.picture_side not in (None, resolution) or (space.picture_side and config.crop == "buckets"):
            raise ValueError(
                f"resolution={resolution} crop={config.crop}: the autoencoder {config.vae} takes squares of "
                f"{space.picture_side} pixels alone; set resolution={space.picture_side} crop=centre"
            )

    def _given_spec(self, theirs: LatentSpec | None) -> tuple[LatentSpec | None, str]:
        """Return the latent spec unless its statistics will be measured, and the source of the statistics in words."""
        if (folder := self.config.stats_from) is not None:
            if theirs is None or self.space is None:
                raise ValueError(f"stats_from={folder}: it and the inputs must hold pictures; leave it out for text")
            if theirs.vae_hash != self.space.hash:
                found = f"vae_hash {theirs.vae_hash} (here {self.space.hash})"
                raise ValueError(f"stats_from={folder} has other latents: {found}; encode both with the same VAE")
            return self._spec(theirs.mean, theirs.std), f"from {folder}"
        if self.space is None or self.config.latent_stats == "measured":
            return None, "measured"
        if self.config.latent_stats == "auto" and not self.space.states_scaling:
            return None, "measured (the VAE states no scaling)"
        stats, source = self.space.stated_stats(), "the VAE's own scaling"
        if self.space.kind == "pixels":
            source = "as stated for pixels in [-1, 1]"
        elif not self.space.states_scaling:
            source = "diffusers' default, as the VAE's config states no scaling"
        return self._spec(tuple(stats.mean.tolist()), tuple(stats.std.tolist())), source

    def _spec(self, mean: tuple[float, ...], std: tuple[float, ...]) -> LatentSpec:
        """Return the spec of our latents, whitened by these statistics."""
        assert self.space is not None
        return LatentSpec(
            vae_hash=self.space.hash,
            channels=self.space.channels,
            stride=self.space.stride,
            resolution=self.config.resolution,
            mean=mean,
            std=std,
            kind=self.space.kind,
        )

    def latent_spec(self, sums: LatentSums) -> LatentSpec | None:
        """Return the spec of a data set from the sums of all its shards; None for text."""
        if self.space is None or self.given_spec is not None or not sums.cells:
            return self.given_spec
        return self._spec(tuple(sums.mean.tolist()), tuple(sums.std.tolist()))

    @property
    def made_with(self) -> dict[str, Any]:
        """The settings that decide a shard's bytes; latent statistics and weights of captions affect the manifest."""
        keys = list(self.config.caption_keys)
        if len(keys) > 1 and self.space is None:
            keys = []  # texts have no captions
        return {
            "format": FORMAT_VERSION,
            "tokenizer": self.tokenizer.hash,
            "vae": self.space.hash if self.space is not None else None,
            "resolution": self.config.resolution,
            "bucket_multiple": self.config.bucket_multiple if self.config.crop == "buckets" else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            # Only those that were set, so that shards from before these settings existed stay valid.
            **({"text_key": self.config.text_key} if self.config.text_key != KeysConfig.text_key else {}),
            **({"caption_key": keys[0]} if len(keys) == 1 else {"caption_keys": keys} if keys else {}),
        }

    def origin(self, version: FileVersion) -> dict[str, Any]:
        """Return what decides a shard's bytes: the settings, and its input file."""
        # Tars are padded: size alone would miss a replaced input.
        return {**self.made_with, "input_bytes": version.bytes, "input_changed": version.changed}

    @torch.no_grad()
    def records(self, documents: Iterable[RawDocument], bad: BadRecords) -> Iterator[Record]:
        """Yield the encoded records of one input file's documents, in order; what is bad is counted and named."""
        self.latent_sums, self.words = LatentSums.total(self.channels), WordCounts()
        waiting: deque[_Draft] = deque()  # for the VAE, in the order of the input
        batches: dict[tuple[int, int], list[_Picture]] = {}  # by size, not full yet
        running: deque[tuple[list[_Picture], torch.Tensor]] = deque()  # on the device

        def launch(batch: list[_Picture]) -> None:
            assert self.space is not None
            pixels = torch.from_numpy(np.stack([picture.pixels for picture in batch]))
            if self.device.type == "cuda":
                pixels = pixels.pin_memory().to(self.device, non_blocking=True)
            pixels = pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1)  # the VAE's range
            running.append((batch[:], self.space.encode(pixels)))
            batch.clear()
            while len(running) > 1:  # one batch is computed while the previous one is written
                collect()

        def collect() -> None:
            batch, encoded = running.popleft()
            for picture, stored in zip(batch, encoded.cpu().numpy(), strict=True):
                picture.stored = stored

        def finished(most_waiting: int) -> Iterator[Record]:
            while waiting and (waiting[0].is_encoded or len(waiting) > most_waiting):
                for batch in batches.values():
                    if batch and not waiting[0].is_encoded and not running:
                        launch(batch)
                while running and not waiting[0].is_encoded:
                    collect()
                if not waiting[0].is_encoded:
                    continue
                try:
                    yield self._record(waiting.popleft())
                except BadRecord as error:
                    bad.add(error)

        for draft in self._decoded(documents, bad):
            waiting.append(draft)
            for picture in draft.pictures:
                if self.kind == "pixels":
                    picture.stored = picture.pixels.transpose(2, 0, 1)
                    continue
                batch = batches.setdefault(picture.pixels.shape[:2], [])
                batch.append(picture)
                if len(batch) == self.config.batch_size:
                    launch(batch)
            yield from finished(AHEAD * self.config.batch_size)  # so that a rare size does not hold up the file
        yield from finished(0)

    def _decoded(self, documents: Iterable[RawDocument], bad: BadRecords) -> Iterator[_Draft]:
        """Yield the documents with their pictures decoded, in order, with threads some batches ahead."""
        ahead: deque[tuple[RawDocument, list[str | Future]]] = deque()
        futures = 0

        def oldest() -> Iterator[_Draft]:
            nonlocal futures
            document, segments = ahead.popleft()
            futures -= sum(isinstance(segment, Future) for segment in segments)
            try:
                yield _Draft(document, [s if isinstance(s, str) else _Picture(s.result()) for s in segments])
            except BadRecord as error:
                bad.add(error)

        for document in documents:
            if self.space is None and document.pictures:
                bad.add(BadRecord("picture without an autoencoder", document.where, "give vae=FOLDER, or vae=pixels"))
                continue
            decode = partial(decode_picture, sizes=self.sizes, where=document.where)
            pictures = {id(picture): picture for picture in document.pictures}  # each once
            decoding = {key: self._threads.submit(decode, picture) for key, picture in pictures.items()}
            segments = [s if isinstance(s, str) else decoding[id(s)] for s in document.segments]
            ahead.append((document, segments))
            futures += sum(isinstance(segment, Future) for segment in segments)
            most = AHEAD * self.config.batch_size
            while futures > most or len(ahead) > 2 * most or (not futures and ahead):
                yield from oldest()
        while ahead:
            yield from oldest()

    def _record(self, draft: _Draft) -> Record:
        where = draft.document.where
        captions = [self._tokens(caption) for caption in draft.document.captions]
        if draft.document.messages:
            segments, roles = self._conversation(draft)
        else:
            left, roles = draft.pictures if captions else draft.segments, draft.document.roles
            segments = [self._tokens(s) if isinstance(s, str) else s.encoded for s in left]
        info, kinds = dumps(draft.document.info).encode(), draft.document.caption_kinds
        record = encode_record(draft.document.key, segments, info, captions, self.kind, kinds, roles)
        if len(record["__key__"]) > 4096 or sum(map(len, record.values())) > MAX_RECORD_BYTES // 2:  # as paths may be
            raise BadRecord("oversized record", where)
        decode_document(record, where)  # records that indexing would refuse count as bad here
        for picture in draft.pictures:
            self.latent_sums.add(picture.encoded, self.kind)
        self.words.count_captions(draft.document, self.config.caption_keys)
        return record

    def _conversation(self, draft: _Draft) -> tuple[list[np.ndarray], tuple[Role, ...]]:
        """Return a conversation's segments and their roles; raise BadRecord if the chat template refuses it."""
        parts = iter(draft.segments)
        messages = [Message(m.speaker, tuple(next(parts) for _ in m.parts)) for m in draft.document.messages]
        try:
            laid_out = self.chat.lay_out(messages)
        except ValueError as error:
            reason = "endless chat template" if isinstance(error, EndlessTemplate) else "refused conversation"
            raise BadRecord(reason, draft.document.where, str(error)) from None
        ids = [part for _, part in laid_out if isinstance(part, np.ndarray)]
        self.words.count(self.tokenizer, ids, [part for part in draft.segments if isinstance(part, str)])
        self.words.chat = self.tokenizer.chat_hash
        return [p if isinstance(p, np.ndarray) else p.encoded for _, p in laid_out], tuple(role for role, _ in laid_out)

    def _tokens(self, text: str) -> np.ndarray:
        token_ids = self.tokenizer.encode(text)
        self.words.count(self.tokenizer, [token_ids], [text])
        return token_ids


def _device(name: str) -> torch.device:
    """Return the device of this process; raise ValueError for a missing one."""
    set_allocator()
    if name == "auto":
        name = f"cuda:{place().local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch finds no CUDA device; use device=auto or device=cpu")
    return device
