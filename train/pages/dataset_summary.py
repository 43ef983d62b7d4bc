"""What an encoded data set holds: counts from its shards' indices, and a few documents as people see them.

Counting opens no record, so it takes as long as reading the indices; only the documents that are shown are read, with
training's checks. What cannot be read is counted by reason and named, and the rest is shown. Counts are exact, kept as
value -> documents: the lengths of a billion documents would not fit a login node.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import numpy as np
import torch
from tqdm import tqdm

from data.documents import Document, ImageSegment, check_document, decode_document, seed_from
from data.layout import patch_grid
from data.manifest import FILE_NAME, LatentSums, Manifest
from data.pictures import from_unit
from data.remote import shown
from data.shard_index import ShardIndex
from data.shards import BadRecord, BadRecords, Record, read_at
from data.tokenizer import Tokenizer
from model.latent_space import LatentSpace, Pixels, to_raw
from train.inference.saved_model import load_matching_space

CHARACTERS = 120  # of a text that are shown
PICTURES = 4  # of a document that are decoded
GIVEN = "given: "  # before what is context


@dataclass
class Counts:
    """Exact counts over the documents of those shards whose index can be read."""

    shards: list[int] = field(default_factory=list)  # their numbers in the manifest
    lengths: Counter[int] = field(default_factory=Counter)  # tokens of a document -> documents
    text_tokens: Counter[int] = field(default_factory=Counter)  # text tokens of a document -> documents
    images: Counter[int] = field(default_factory=Counter)  # images of a document -> documents
    long: int = 0  # documents longer than a sequence
    long_with_images: int = 0  # those of them with images

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
class ShownDocument:
    """One document as people see it."""

    key: str
    shard: str
    num_tokens: int
    grids: list[tuple[int, int]]  # (h, w) of each image's latents
    text: str  # its beginning
    has_context: bool
    pictures: list[tuple[np.ndarray, str]]  # uint8 [H, W, 3] and caption of the first PICTURES; none without `space`


@dataclass(frozen=True)
class EncodedData:
    """An encoded data set, or one shard of it, with its tokenizer and latent space where they are given."""

    manifest: Manifest
    patch_size: int
    tokenizer: Tokenizer | None
    space: LatentSpace | None  # that decodes the images; pixels are always there

    @classmethod
    def open(cls, shards: str, patch_size: int, tokenizer: str | None, vae: str | None) -> "EncodedData":
        """Open the folder `shards`, or the one shard that it names.

        Raises FileNotFoundError or ValueError if it is not a data set, or not encoded with this tokenizer or vae.
        """
        manifest = _open_manifest(shards)
        for grid in sorted(manifest.grids()):
            patch_grid(grid, patch_size)
        words = Tokenizer(tokenizer) if tokenizer is not None else None
        if words is not None and words.hash != manifest.tokenizer_hash:
            raise ValueError(
                f"shards={shown(shards)} was encoded with tokenizer {manifest.tokenizer_hash}, but {tokenizer} is "
                f"{words.hash}; give the tokenizer it was encoded with, or none to see the captions in its json"
            )
        spec = manifest.latent_spec
        if vae is None:
            return cls(manifest, patch_size, words, Pixels() if spec is not None and spec.kind == "pixels" else None)
        if spec is None:
            raise ValueError(f"vae={vae}, but shards={shown(shards)} holds only text; leave vae out")
        return cls(manifest, patch_size, words, load_matching_space(vae, spec))

    def count(self, sequence_length: int, bad: BadRecords) -> Counts:
        """Count from the indices. Unreadable ones go into `bad`, and so do shards whose size is not the manifest's."""
        counts, store = Counts(), self.manifest.store
        for shard, entry in enumerate(tqdm(self.manifest.shards, desc="view: indices", unit="shard", delay=1)):
            where = self.manifest.shard_path(shard)
            try:
                counts.add(shard, self.manifest.load_index(shard), self.patch_size, sequence_length)
                size = store.size(entry.name) if not store.is_remote else entry.bytes  # it would cost a request a shard
                if size is None:
                    raise BadRecord("missing shard", where)
                if size != entry.bytes:
                    raise BadRecord("shard of another size", where, f"{size} bytes, the manifest says {entry.bytes}")
            except BadRecord as error:
                bad.add(error)
            except OSError as error:
                bad.add(_unreadable(where, error))
        return counts

    def read_documents(
        self, shards: list[int], n: int, seed: int, bad: BadRecords
    ) -> tuple[list[ShownDocument], LatentSums]:
        """Return `n` documents spread over `shards` and the sums of their latents; unreadable ones go into `bad`.

        The same seed gives the same documents, in the order of the data.
        """
        documents, sums = [], LatentSums.total(self.manifest.kind_and_channels[1])
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
                    sums.add(segment.array, segment.kind)
            num_tokens = int(index.document_tokens(self.patch_size)[number])
            documents.append(self._shown(shard, num_tokens, record, document))
        return documents, sums

    def _places(self, shards: list[int], n: int, seed: int) -> list[tuple[int, int]]:
        """Return (shard, record) of one document from each of `n` equal parts of the data, or all if it has fewer."""
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
        kinds = len(self.manifest.captions)
        check_document(document, self.manifest.vocab_size, *self.manifest.kind_and_channels, where, kinds)
        return record, document

    def _shown(self, shard: int, num_tokens: int, record: Record, document: Document) -> ShownDocument:
        texts = self._texts(record, document)
        images = [(i, one.array) for i, one in enumerate(document.segments) if isinstance(one, ImageSegment)]
        decoded = images[:PICTURES] if self.space is not None else []
        is_given = [segment.role == "context" for segment in document.segments]
        return ShownDocument(
            key=record["__key__"].decode(errors="replace"),
            shard=self.manifest.shards[shard].name,
            num_tokens=num_tokens,
            grids=[stored.shape[1:] for _, stored in images],
            text=joined(texts, is_given),
            has_context=document.has_context,
            pictures=[(self._pixels(stored), GIVEN * is_given[i] + caption_of(texts, i)) for i, stored in decoded],
        )

    def _texts(self, record: Record, document: Document) -> list[str | None]:
        """Return the text of each segment, None for an image."""
        num_texts = sum(not isinstance(segment, ImageSegment) for segment in document.segments)
        caption = next(iter(_captions_in_json(record)), None) if num_texts == 1 else None
        texts: list[str | None] = []
        for segment in document.segments:
            if isinstance(segment, ImageSegment):
                texts.append(None)
            elif document.captions:
                texts.append(self._captions(record, document))
            elif self.tokenizer is None:
                texts.append(clipped(caption) if caption else f"[{len(segment.token_ids):,} text tokens]")
            else:
                texts.append(clipped(self._decoded(segment.token_ids)))
        return texts

    def _captions(self, record: Record, document: Document) -> str:
        """Return the beginnings of all captions of a picture, each after its kind where the data has several."""
        kinds, numbers = list(self.manifest.captions), document.caption_kinds
        keys = [kinds[number] for number in sorted(set(numbers))] or ["caption"]
        in_json = [text for key in keys for text in _captions_in_json(record, key)]
        said = []
        for i, caption in enumerate(document.captions):
            text = f"[{len(caption.token_ids):,} text tokens]"
            if self.tokenizer is not None:
                text = self._decoded(caption.token_ids)
            elif len(in_json) == len(document.captions):
                text = in_json[i]
            text = clipped(text, max(20, CHARACTERS // len(document.captions)))
            said.append(f"{kinds[numbers[i]]}: {text}" if numbers else text)
        return " | ".join(said)

    def _decoded(self, token_ids: np.ndarray) -> str:
        """Return the text of token ids [n]; of a whole book only the beginning."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode(token_ids[:CHARACTERS])
        return text.rstrip("\ufffd") + "…" if len(token_ids) > CHARACTERS else text

    @torch.no_grad()
    def _pixels(self, stored: np.ndarray) -> np.ndarray:
        """Decode a stored image (of moments, the mean) to uint8 [H, W, 3]."""
        assert self.space is not None
        latents = to_raw(torch.tensor(stored[None, : self.space.channels]))
        return from_unit(self.space.decode(latents).numpy())[0]


def joined(texts: list[str | None], is_given: Sequence[bool]) -> str:
    """Return the beginning of a document's texts; unless it is one picture with its caption, marks stand for images.

    What is context is marked as given, without loss.
    """
    if len(texts) <= 2 and texts.count(None) <= 1 and not any(is_given):
        return " ".join(text for text in texts if text is not None)
    numbers = itertools.count(1)
    parts = [f"image {next(numbers)}" if text is None else text for text in texts]
    marked = [
        f"[{GIVEN * given}{part}]" if text is None or given else part
        for text, part, given in zip(texts, parts, is_given, strict=True)
    ]
    return clipped(" ".join(marked))


def caption_of(texts: list[str | None], image: int) -> str:
    """Return the text right before the segment `image` or, where there is none, right after it."""
    around = [*texts[max(image - 1, 0) : image], *texts[image + 1 : image + 2]]
    return next((text for text in around if text is not None), "")


def quantiles(tally: Counter[int], shares: list[float]) -> list[int]:
    """Return, for each share in [0, 1], the smallest value not exceeded by at least this share of the documents."""
    values = sorted(tally)
    upto = np.cumsum([tally[value] for value in values])
    return [values[i] for i in np.searchsorted(upto, np.array(shares) * upto[-1])]


def clipped(text: str, most: int = CHARACTERS) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= most else text[:most] + "…"


def _open_manifest(shards: str) -> Manifest:
    """Return the manifest of a folder, or for a shard's path its folder's with this shard only."""
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


def _unreadable(where: str, error: OSError) -> BadRecord:
    return BadRecord("unreadable shard", where, error.strerror or str(error))


def _captions_in_json(record: Record, key: str = "caption") -> list[str]:
    """Return the captions under a key of the record's json, none where there are none."""
    try:
        found = json.loads(record.get("json", b"")).get(key)
    except (ValueError, AttributeError, RecursionError):
        return []
    texts = [text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)]
    # JSON can spell half a surrogate pair, which no font draws.
    return [text.encode(errors="replace").decode() for text in texts]
