"""What an encoded data set holds: counts from its shards' indices, and a few documents as people see them.

Counting opens no record, so that a large data set takes as long as its indices do; only the documents that are shown
are read, with training's checks. What cannot be read is counted by reason and named, and the rest is shown.
Counts are exact, kept as value -> documents: arrays with the lengths of a billion documents fit no login node.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch
from tqdm import tqdm

from data.documents import Document, ImageSegment, check_document, decode_document, seed_from
from data.manifest import FILE_NAME, LatentSpec, LatentSums, Manifest, ShardEntry
from data.packing import patch_grid
from data.pictures import from_unit
from data.remote import shown
from data.shards import BadRecord, BadRecords, Record, ShardIndex, read_at
from data.tokenizer import Tokenizer
from model.vae import LatentStats, decode
from train.inference.saved_model import load_matching_vae

BINS = 40  # of a histogram, about
CHARACTERS = 600  # of a text that are shown
PICTURES = 4  # of a document that are shown
LATENT_RANGE = 3.0  # deviations to either side of the mean that false colours span


@dataclass
class Counts:
    """Exact counts over the documents of those shards whose index can be read."""

    shards: list[int] = field(default_factory=list)  # their numbers in the manifest
    lengths: Counter = field(default_factory=Counter)  # tokens of a document -> documents
    text_tokens: Counter = field(default_factory=Counter)  # text tokens of a document -> documents
    images: Counter = field(default_factory=Counter)  # images of a document -> documents
    long: int = 0  # documents longer than a sequence
    long_with_images: int = 0  # those of them that are not text alone

    @property
    def documents(self) -> int:
        return self.lengths.total()

    def add(self, shard: int, index: ShardIndex, patch_size: int, sequence_length: int) -> None:
        """Count the documents of one shard."""
        lengths, images = index.document_tokens(patch_size), np.diff(index.grid_starts)
        for tally, values in ((self.lengths, lengths), (self.text_tokens, index.text_tokens), (self.images, images)):
            found, documents = np.unique(values, return_counts=True)
            tally.update(dict(zip(found.tolist(), documents.tolist(), strict=True)))
        long = lengths > sequence_length
        self.long += int(long.sum())
        self.long_with_images += int((long & (images > 0)).sum())
        self.shards.append(shard)


@dataclass(frozen=True)
class Picture:
    grid: tuple[int, int]  # (h, w) of its latents
    pixels: np.ndarray | None  # uint8 [H, W, 3]; None past the first PICTURES of a document


@dataclass(frozen=True)
class ShownDocument:
    """One document as people see it: its texts and pictures in order."""

    key: str
    shard: str
    num_tokens: int
    parts: tuple[str | Picture, ...]

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def text(self) -> str:
        """All of its text; of more than a picture with its caption, marks say where the pictures are."""
        if len(self.parts) <= 2 and len(self.pictures) <= 1:
            return " ".join(part for part in self.parts if isinstance(part, str))
        numbers = iter(range(1, len(self.parts) + 1))
        return clipped(" ".join(p if isinstance(p, str) else f"[picture {next(numbers)}]" for p in self.parts))

    def captioned(self) -> list[tuple[Picture, str]]:
        """Return each picture with the text right before it or, where there is none, right after it."""
        found = []
        for i, part in enumerate(self.parts):
            if isinstance(part, Picture):
                around = [*self.parts[max(i - 1, 0) : i], *self.parts[i + 1 : i + 2]]
                found.append((part, next((text for text in around if isinstance(text, str)), "")))
        return found


@dataclass(frozen=True)
class EncodedData:
    """An encoded data set, or one shard of it, with what makes text and pictures of it where that is given."""

    manifest: Manifest
    patch_size: int
    tokenizer: Tokenizer | None
    vae: torch.nn.Module | None

    @classmethod
    def open(cls, shards: str, patch_size: int, tokenizer: str | None, vae: str | None) -> "EncodedData":
        """Open the folder `shards`, or the one shard that it names.

        Raises FileNotFoundError or ValueError for what is no data set, and for a tokenizer or VAE that is not its own.
        """
        manifest = _open_manifest(shards)
        for grid in sorted(manifest.grids()):
            patch_grid(grid, patch_size)
        words = Tokenizer(tokenizer) if tokenizer is not None else None
        if words is not None and words.hash != manifest.tokenizer_hash:
            raise ValueError(
                f"shards={shown(shards)} was encoded with tokenizer {manifest.tokenizer_hash}, but {tokenizer} is "
                f"{words.hash}; name the tokenizer it was encoded with, or none to see what captions its json holds"
            )
        if vae is not None and manifest.latent_spec is None:
            raise ValueError(f"vae={vae}, but shards={shown(shards)} holds text alone; leave vae out")
        codec = load_matching_vae(vae, manifest.latent_spec).eval() if vae is not None else None
        return cls(manifest, patch_size, words, codec)

    def count(self, sequence_length: int, bad: BadRecords) -> Counts:
        """Count by the indices. Into `bad` go those that cannot be read, and shards of another size than recorded."""
        counts, store = Counts(), self.manifest.store
        for shard, entry in enumerate(tqdm(self.manifest.shards, desc="view: indices", unit="shard", delay=1)):
            where = self.manifest.shard_path(shard)
            try:
                counts.add(shard, self.manifest.load_index(shard), self.patch_size, sequence_length)
                if not store.is_remote:  # where asking costs a request a shard
                    _check_size(entry, store.size(entry.name), where)
            except BadRecord as error:
                bad.add(error)
            except OSError as error:
                bad.add(_unreadable(where, error))
        return counts

    @torch.no_grad()
    def look(self, shards: list[int], n: int, seed: int, bad: BadRecords) -> tuple[list[ShownDocument], LatentSums]:
        """Return `n` documents spread over `shards`, without those that cannot be read: they go into `bad`.

        Also returns the sums of their latents. The same seed gives the same documents, in the order of the data.
        """
        documents, sums = [], LatentSums.none(self._channels)
        load_index = lru_cache(1)(self.manifest.load_index)  # places come shard by shard
        for shard, number in tqdm(self._places(shards, n, seed), desc="view: documents", unit="document", delay=1):
            bad.seen += 1
            try:
                index = load_index(shard)
                record, document = self._read(shard, index, number)
            except BadRecord as error:
                bad.add(error)
                continue
            for segment in document.segments:
                if isinstance(segment, ImageSegment):
                    sums.add(segment.moments)
            name, length = self.manifest.shards[shard].name, index.document_tokens(self.patch_size)[number]
            parts = tuple(self._parts(record, document))
            documents.append(ShownDocument(record["__key__"].decode(errors="replace"), name, int(length), parts))
        return documents, sums

    @property
    def _channels(self) -> int:
        return self.manifest.latent_spec.channels if self.manifest.latent_spec is not None else 0

    def _places(self, shards: list[int], n: int, seed: int) -> list[tuple[int, int]]:
        """Return (shard, record) of a document from each of `n` equal parts of the data, fewer if there are fewer."""
        ends = np.cumsum([self.manifest.shards[shard].records for shard in shards])
        bounds = np.arange(min(n, ends[-1]) + 1) * ends[-1] // min(n, ends[-1])
        chosen = np.random.default_rng(seed_from("view", seed)).integers(bounds[:-1], bounds[1:])
        positions = np.searchsorted(ends, chosen, side="right")
        firsts = np.concatenate([[0], ends])[positions]
        return [(shards[i], int(number)) for i, number in zip(positions.tolist(), chosen - firsts, strict=True)]

    def _read(self, shard: int, index: ShardIndex, number: int) -> tuple[Record, Document]:
        """Return one record and its document; raise BadRecord where training would skip it."""
        where = f"{self.manifest.shard_path(shard)}#{number}"
        read = partial(self.manifest.store.read, self.manifest.shards[shard].name)
        try:
            record = read_at(read, index.spans[number], where)
        except OSError as error:
            raise _unreadable(where, error) from None
        document = decode_document(record, where)
        check_document(document, self.manifest.vocab_size, self._channels, where)
        return record, document

    def _parts(self, record: Record, document: Document) -> list[str | Picture]:
        parts: list[str | Picture] = []
        num_texts = sum(not isinstance(segment, ImageSegment) for segment in document.segments)
        num_pictures = 0
        for segment in document.segments:
            if isinstance(segment, ImageSegment):
                num_pictures += 1
                pixels = self._pixels(segment.moments) if num_pictures <= PICTURES else None
                parts.append(Picture(segment.moments.shape[1:], pixels))
            elif self.tokenizer is not None:
                parts.append(self._beginning(segment.token_ids))
            else:
                caption = _caption_in_json(record) if num_texts == 1 else None
                parts.append(clipped(caption) if caption else f"[{len(segment.token_ids):,} text tokens]")
        return parts

    def _beginning(self, token_ids: np.ndarray) -> str:
        """Decode the beginning of a text, that of a whole book without decoding it."""
        text = self.tokenizer.decode(token_ids[:CHARACTERS])
        return clipped(text if len(token_ids) <= CHARACTERS else text.rstrip("\ufffd") + "…")

    def _pixels(self, moments: np.ndarray) -> np.ndarray:
        """Decode the posterior's mean; without a VAE show it in false colours."""
        mean = torch.from_numpy(moments[: len(moments) // 2].astype(np.float32))
        if self.vae is None:
            return false_colours(mean, self.manifest.latent_spec)
        return from_unit(decode(self.vae, mean[None]).numpy())[0]


def false_colours(mean: torch.Tensor, spec: LatentSpec) -> np.ndarray:
    """Show the first three channels of raw latents f32 [C, h, w] as red, green and blue, a cell as large as its pixels.

    Whitened by `spec`; mid grey is 0, black and white are LATENT_RANGE deviations off. A missing channel is 0.
    """
    whitened = LatentStats(torch.tensor(spec.mean), torch.tensor(spec.std)).whiten(mean[None])[:, :3]
    channels = torch.zeros((1, 3, *mean.shape[1:]))
    channels[:, : whitened.shape[1]] = whitened
    return from_unit(channels.numpy() / LATENT_RANGE)[0].repeat(spec.stride, axis=0).repeat(spec.stride, axis=1)


def quantiles(tally: Counter, shares: list[float]) -> list[int]:
    """Return, for each share in [0, 1], the smallest value that so large a share of the documents does not exceed."""
    values = sorted(tally)
    upto = np.cumsum([tally[value] for value in values])
    return [values[i] for i in np.searchsorted(upto, np.array(shares) * upto[-1])]


def bins(tally: Counter) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return a histogram's edges int64 [n + 1] and documents int64 [n], and whether it asks for a log axis.

    A bin holds the whole numbers from its edge up to the next edge, left out. Widths are whole and never shrink: on a
    log axis too, where rounded edges would make a comb of small numbers.
    """
    low, high = min(tally), max(tally)
    is_log = low > 0 and high > 20 * low
    width, ratio = -(-(high - low + 1) // BINS), ((high + 1) / max(low, 1)) ** (1 / BINS)
    edges = [low]
    while edges[-1] <= high:
        edges.append(math.ceil(edges[-1] * ratio) if is_log else edges[-1] + width)
    documents = np.zeros(len(edges) - 1, dtype=np.int64)
    values = np.array(list(tally))
    np.add.at(documents, np.searchsorted(edges, values, side="right") - 1, list(tally.values()))
    return np.array(edges), documents, is_log


def clipped(text: str) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= CHARACTERS else text[:CHARACTERS] + "…"


def _open_manifest(shards: str) -> Manifest:
    """Return the manifest of a folder; of a shard's path that of its folder, with this shard alone."""
    folder, name = os.path.split(shards)
    if os.path.isdir(shards) or not (name.endswith(".tar") or os.path.isfile(shards)):
        return Manifest.load(shards)
    manifest = Manifest.load(folder or ".")
    chosen = tuple(entry for entry in manifest.shards if entry.name == name)
    if not chosen:
        names = [entry.name for entry in manifest.shards]
        listed = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]} ({len(names)} shards)"
        raise ValueError(
            f"shards={shown(shards)}: {manifest.store.path(FILE_NAME)} lists no such shard; name one of {listed}"
        )
    if not chosen[0].records:
        raise ValueError(f"shards={shown(shards)} holds no records; name another shard")
    return replace(manifest, shards=chosen)


def _check_size(entry: ShardEntry, size: int | None, where: str) -> None:
    if size is None:
        raise BadRecord("missing shard", where)
    if size != entry.bytes:
        raise BadRecord("shard of another size", where, f"{size} bytes, the manifest says {entry.bytes}")


def _unreadable(where: str, error: OSError) -> BadRecord:
    return BadRecord("unreadable shard", where, error.strerror or str(error))


def _caption_in_json(record: Record) -> str | None:
    """Return the caption that the encoder left for people, None where there is none."""
    try:
        caption = json.loads(record.get("json", b"")).get("caption")
        caption = caption[0] if isinstance(caption, list) and caption else caption  # of several
    except (ValueError, AttributeError, RecursionError):
        return None
    # JSON can spell half a surrogate pair, which no page can hold.
    return caption.encode(errors="replace").decode() if isinstance(caption, str) else None
