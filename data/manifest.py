"""The manifest of an encoded data set: which shards, how much they hold, and which tokenizer and vae made them.

`manifest.json` is rebuilt from the shards' sidecars, never edited. A run trusts it at start-up, so that a mismatch of
tokenizer, latent space or grid is refused before the first step and not discovered in the samples.
"""

import errno
import hashlib
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data.captions import CaptionTokens, check_weights, not_drawn
from data.documents import KINDS, PIXEL_CHANNELS, ImageKind
from data.durable import atomic_write
from data.remote import shown
from data.shard_cache import CacheConfig
from data.shard_index import ShardIndex, index_name, index_path
from data.shards import BadRecord
from data.storage import Store
from data.strict_json import dumps

FORMAT_VERSION = 2
MAX_NAME_BYTES = 200  # of a shard, which leaves room for the names of its index, sidecar and temporary files
FILE_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """What the images in the shards are: two data sets may be mixed only if these are equal."""

    vae_hash: str
    channels: int
    stride: int  # pixels a latent cell
    resolution: int  # pixels of the encoded pictures' shorter side
    mean: tuple[float, ...]  # per channel, measured on raw latents or stated by their space; used to whiten
    std: tuple[float, ...]
    kind: ImageKind = "moments"  # what a record keeps of an image

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"latent kind {self.kind!r}: expected one of {', '.join(KINDS)}")
        numbers = (self.channels, self.stride, self.resolution)
        if any(type(number) is not int or number < 1 for number in numbers) or not isinstance(self.vae_hash, str):
            raise ValueError(f"latent channels, stride, resolution {numbers}: expected whole numbers, 1 or more")
        are_numbers = all(isinstance(number, (int, float)) for number in (*self.mean, *self.std))
        if not (are_numbers and len(self.mean) == len(self.std) == self.channels):
            raise ValueError(f"latent mean {self.mean}, std {self.std}: expected {self.channels} channels of numbers")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and min(self.std) > 0):
            raise ValueError(f"latent mean {self.mean}, std {self.std}: expected finite numbers and std > 0")

        if self.kind == "pixels" and (self.channels, self.stride) != (PIXEL_CHANNELS, 1):
            found = f"channels {self.channels}, stride {self.stride}"
            raise ValueError(f"latent kind pixels with {found}: expected {PIXEL_CHANNELS} and 1")

    @property
    def images(self) -> str:
        """Say in messages what the images are."""
        of = {"moments": "latents of VAE", "latents": "latents of the deterministic autoencoder"}.get(self.kind)
        return f"{of} {self.vae_hash}" if of else "pixels"

    def fields(self) -> dict:
        """Return the spec for JSON; moments are the kind of all old data and not named."""
        return {name: value for name, value in vars(self).items() if (name, value) != ("kind", "moments")}

    @classmethod
    def parse(cls, fields: dict) -> "LatentSpec":
        """Return the spec of these fields, as read from JSON."""
        return cls(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})

    @property
    def statistics(self) -> dict[str, str]:
        """Return the whitening statistics by name, to six digits: weights fit only latents whitened by the same."""
        return {f"latent {name}": str([float(f"{x:.6g}") for x in getattr(self, name)]) for name in ("mean", "std")}


@dataclass
class LatentSums:
    """Mean and deviation per channel of raw latents (drawn from posteriors, if stored so), as sums over cells."""

    sums: np.ndarray  # float64 [2, C], of the first and the second moment
    cells: int = 0

    @classmethod
    def total(cls, channels: int, parts: Iterable["LatentSums"] = ()) -> "LatentSums":
        total = cls(np.zeros((2, channels)))
        for part in parts:
            total.sums += part.sums
            total.cells += part.cells
        return total

    def add(self, stored: np.ndarray, kind: ImageKind) -> None:
        """Add one image as a record keeps it: moments [2C, h, w], latents [C, h, w] or pixels [3, H, W]."""
        values = stored.astype(np.float64)
        if kind == "moments":
            mean, logvar = np.split(values, 2)
            second = mean**2 + np.exp(logvar)
        else:
            mean = values / 127.5 - 1 if kind == "pixels" else values
            second = mean**2
        self.sums += np.stack([mean.sum((1, 2)), second.sum((1, 2))])
        self.cells += mean[0].size

    def whitened_by(self, spec: LatentSpec) -> float:
        """Return these latents' deviation over all channels once whitened by `spec`; it should be 1."""
        return float(np.sqrt(np.mean((self.std / np.array(spec.std)) ** 2)))

    @property
    def mean(self) -> np.ndarray:
        return self.sums[0] / self.cells

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.sums[1] / self.cells - self.mean**2, 0))


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    name: str
    bytes: int
    index_crc32: int
    records: int
    largest_record: int  # bytes
    text_tokens: int
    grids: dict[str, int]  # "8x8" -> images of that latent grid
    caption_tokens: dict[str, list[int]] = field(default_factory=dict)  # `CaptionTokens.rounded`

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or len(self.name.encode(errors="replace")) > MAX_NAME_BYTES:
            raise ValueError(f"shard name {self.name[:300]!r}: expected a file in the manifest's folder")
        several = {
            f"captions {kinds}[{i}]": n for kinds, sums in self.caption_tokens.items() for i, n in enumerate(sums)
        }
        of_dicts = ("name", "grids", "caption_tokens")
        counts = {name: n for name, n in vars(self).items() if name not in of_dicts} | self.grids | several
        for name, value in counts.items():
            if type(value) is not int or not 0 <= value < 1 << 48:  # 2^48 bytes are 280 TB
                raise ValueError(f"{self.name}: {name}={value!r}: expected a whole number, 0 or more, below 2^48")
        for kinds, sums in self.caption_tokens.items():
            if not re.fullmatch(r"\d{1,9}(\+\d{1,9})*", kinds) or len(sums) != kinds.count("+") + 2:
                raise ValueError(
                    f"{self.name}: captions {kinds!r} {sums}: expected sums of kinds, such as 0+1 [9, 4, 8]"
                )
        for grid in self.grids:
            if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", grid):
                raise ValueError(f"{self.name}: latent grid {grid!r}: expected HEIGHTxWIDTH, such as 8x8")

    def tokens(self, patch_size: int) -> int:
        """Total document length in tokens, as ShardIndex.document_tokens counts it."""
        return 2 * self.records + self.text_tokens + self.patches(patch_size) + 2 * sum(self.grids.values())

    def patches(self, patch_size: int) -> int:
        """Total number of image tokens, BOI and EOI left out."""
        sizes = zip(self.sizes, self.grids.values(), strict=True)
        return sum((h // patch_size) * (w // patch_size) * count for (h, w), count in sizes)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Return the latent grids' (height, width)."""
        return [(int(h), int(w)) for h, w in (grid.split("x") for grid in self.grids)]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    store: Store = field(compare=False)  # the folder that holds manifest, shards and indices
    tokenizer_hash: str
    vocab_size: int
    latent_spec: LatentSpec | None  # None: text only
    shards: tuple[ShardEntry, ...]
    captions: dict[str, float] = field(default_factory=dict)  # kinds of captions and their weights at encoding, if any
    chat_hash: str | None = None  # of the chat template, or PLAIN_FORM, of its conversations; None: it has none

    def __post_init__(self) -> None:
        check_weights("captions", self.captions)
        numbers = {int(n) for shard in self.shards for kinds in shard.caption_tokens for n in kinds.split("+")}
        if (kind := max(numbers, default=0)) >= max(1, len(self.captions)):
            raise ValueError(f"captions of kind {kind}: expected one of {list(self.captions)}")

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def content_hash(self) -> str:
        """Identify the data: the same shards in the same order, made by the same tokenizer and vae.

        Weights of captions are no part of it, nor are sums that follow from a shard's contents.
        """
        contents = self._contents()
        if self.captions:
            contents["captions"] = list(self.captions)
        for entry in contents["shards"]:
            entry.pop("caption_tokens", None)
        return hashlib.sha256(dumps(contents, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def kind_and_channels(self) -> tuple[ImageKind, int]:
        """Return the kind of the images and their channels; 0 channels if there are none."""
        spec = self.latent_spec
        return (spec.kind, spec.channels) if spec is not None else ("moments", 0)

    def grids(self) -> set[tuple[int, int]]:
        return {size for shard in self.shards for size in shard.sizes}

    def image_token_share(
        self, patch_size: int, captions_kept: float = 1.0, weights: Sequence[float] | None = None
    ) -> float:
        """Return the share of patches among all tokens when the share `captions_kept` of captions is kept.

        Of several captions the one drawn by `weights` (null: those at encoding) counts with its mean length. That is
        exact to the rounding of a shard's sums, but for captions that are drawn again because they do not fit. Data
        indexed before these sums existed counts the longest. Texts of interleaved documents count as captions, although
        none is dropped.
        """
        weights = tuple(self.captions.values()) if weights is None else weights
        longest = sum(shard.text_tokens for shard in self.shards)
        text_tokens = longest - math.fsum(not_drawn(shard.caption_tokens, weights) for shard in self.shards)
        tokens = sum(shard.tokens(patch_size) for shard in self.shards) - longest + text_tokens
        tokens -= (1 - captions_kept) * text_tokens
        return sum(shard.patches(patch_size) for shard in self.shards) / tokens

    def shard_path(self, shard: int) -> str:
        """Return where a shard is, for messages."""
        return self.store.path(self.shards[shard].name)

    def load_index(self, shard: int) -> ShardIndex:
        """Load a shard's index; raise BadRecord unless it is the one the manifest was made with."""
        entry = self.shards[shard]
        name = index_name(entry.name)
        where = self.store.path(name)
        try:
            index = ShardIndex.parse(self.store.read_all(name), where, entry.index_crc32)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # this process's fault, not the index's
                raise
            raise BadRecord("unreadable index", where, error.strerror or str(error)) from None
        if len(index) != entry.records:
            raise BadRecord("unreadable index", where, f"{len(index)} records, the manifest says {entry.records}")
        return index

    def check_files(self) -> None:
        """Raise ValueError naming the first shard or index that is missing or not of the recorded size.

        Of a remote data set it checks only the first and the last shard: checking each could take hours.
        """
        for entry in (self.shards[0], self.shards[-1]) if self.store.is_remote else self.shards:
            path, size = self.store.path(entry.name), self.store.size(entry.name)
            if size != entry.bytes:
                found = "missing" if size is None else f"{size} bytes, the manifest says {entry.bytes}"
                raise ValueError(f"shard {path} is {found}; restore it, or encode the data set again")
            if self.store.size(index_name(entry.name)) is None:
                remedy = f"restore it, or make it again with `python -m train.encode index={shown(self.store.root)}`"
                raise ValueError(f"index {self.store.path(index_name(entry.name))} is missing; {remedy}")

    def save(self) -> None:
        with atomic_write(Path(self.store.root) / FILE_NAME) as file:
            file.write(dumps(self._contents(), indent=1).encode())

    def _contents(self) -> dict:
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer_hash": self.tokenizer_hash,
            "vocab_size": self.vocab_size,
            "latent_spec": self.latent_spec.fields() if self.latent_spec is not None else None,
            "shards": [{k: v for k, v in asdict(e).items() if v or k != "caption_tokens"} for e in self.shards],
            **({"captions": self.captions} if self.captions else {}),
            **({"chat_hash": self.chat_hash} if self.chat_hash is not None else {}),
        }

    @classmethod
    def load(cls, folder: str | Path, cache: CacheConfig | None = None, max_ahead: int = 64) -> "Manifest":
        """Open the data set in a local folder or at a URL; raise FileNotFoundError or ValueError if it is none."""
        store = Store(str(folder), cache=cache, max_ahead=max_ahead)
        path = store.path(FILE_NAME)
        try:
            data = store.read_all(FILE_NAME)
        except (FileNotFoundError, NotADirectoryError):
            state = "has no manifest.json" if store.is_remote or Path(folder).is_dir() else "does not exist"
            raise FileNotFoundError(f"data folder {folder} {state}; make it with `python -m train.encode`") from None
        try:
            fields = json.loads(data)
            version = fields.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, this program reads {FORMAT_VERSION}")
            if (spec := fields.pop("latent_spec")) is not None:
                spec = LatentSpec.parse(spec)
            shards = tuple(ShardEntry(**entry) for entry in fields.pop("shards"))
            manifest = cls(store=store, latent_spec=spec, shards=shards, **fields)
            if type(manifest.vocab_size) is not int or manifest.vocab_size < 1:
                raise ValueError(f"vocab_size={manifest.vocab_size!r}: expected a whole number, 1 or more")
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a manifest this program reads: {error}") from None
        if sum(shard.tokens(1) for shard in manifest.shards) >= 1 << 62:
            raise ValueError(f"{path} counts more tokens than any data set holds; it is damaged")
        if not manifest.records:
            raise ValueError(f"{path} lists no records; the data set is empty")
        return manifest


def shard_entry(path: Path, index: ShardIndex, captions: CaptionTokens | None = None) -> ShardEntry:
    """Describe a shard whose index is saved next to it."""
    return ShardEntry(
        name=path.name,
        bytes=path.stat().st_size,
        index_crc32=zlib.crc32(index_path(path).read_bytes()),
        records=len(index),
        largest_record=int(index.spans[:, 1].max(initial=0)),
        text_tokens=int(index.text_tokens.sum()),
        grids=count_grids(index),
        caption_tokens=captions.rounded() if captions is not None else {},
    )


def count_grids(index: ShardIndex) -> dict[str, int]:
    """Return how many images of each latent grid a shard holds, in the form of its entry."""
    return dict(sorted(Counter(f"{h}x{w}" for h, w in index.grids.tolist()).items()))
