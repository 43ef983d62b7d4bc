"""What a config's `data` section names: encoded sources, their mix, and whether this run can train on them.

Opened and checked before anything else starts, so that a mismatch of tokenizer, latent space, grid or size is refused
in one message (P10). Independent of ranks and workers.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from data.arrangement import OrderConfig
from data.captions import weights_in_force
from data.documents import ImageKind
from data.lane_state import Position
from data.layout import patch_grid
from data.manifest import LatentSpec, Manifest
from data.shard_cache import CacheConfig
from data.source import LaneSettings, Source, SourceConfig, sum_in_order
from data.storage import Location
from data.tokenizer import Tokenizer
from data.too_long import find_too_long
from data.watch import ReadWatch

READ_AHEAD = 16  # documents, of remote data


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # encoded data sets by name, mixed by weight
    # Share of image tokens (patches) among all, in (0, 1): the weights of sources with and without images are scaled
    # to meet it, captions counting as text and clean copies not at all (the paper: 0.5). null: weights as given.
    image_share: float | None = None
    # What made the shards' token ids: a SentencePiece model, a tokenizer.json, or a folder with one of them.
    tokenizer: Location = MISSING
    lanes: int = 512  # L, sequences a global batch; the number of ranks may not exceed it
    sequence_length: int = 4096  # S, tokens a sequence
    shuffle_block: int = 1024  # documents a lane shuffles among
    look_ahead: int = 16  # documents a lane keeps pending to fill sequences from
    order: OrderConfig = field(default_factory=OrderConfig)
    # Give what follows an image that is noised a clean copy of it to see, at the cost of as many tokens (BAGEL). false:
    # it sees the noised one, as in the paper, where diffusion.before_caption_max_timestep caps that noise.
    clean_copies: bool = False
    # Documents of each source that a lane requests in advance, for remote data and network disks. null: 16 for remote
    # data without a cache, else 0.
    read_ahead: int | None = None
    cache_dir: Location | None = None  # local folder for whole copies of remote shards, shared by a node's ranks
    cache_gib: float = 100.0  # GiB that `cache_dir` may hold
    read_warning_s: float = 30.0  # seconds after which an unfinished read is named in the log, > 0
    num_workers: int = 0  # loader processes a rank; 0 reads in the rank's own prefetch thread
    prefetch_steps: int = 2  # steps a rank keeps ready, >= 1
    max_bad_documents: int = 100  # skipped documents above which the run stops, each counted once

    def __post_init__(self) -> None:
        for name in ("lanes", "sequence_length", "shuffle_block", "look_ahead", "prefetch_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)}: expected at least 1")
        for name in ("num_workers", "max_bad_documents", "read_ahead"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)}: expected 0 or more")
        if not self.read_warning_s > 0:
            raise ValueError(f"data.read_warning_s={self.read_warning_s}: expected more than 0")
        steps = {1, *(int(step) for source in self.sources.values() for step in source.weight_from)}
        for step in steps if self.sources else ():
            if not any(source.weight_at(step) for source in self.sources.values()):
                raise ValueError(f"data.sources: every weight is 0 from step {step} on; expected one above 0")
        if self.image_share is not None and len(steps) > 1:
            raise ValueError(
                f"data.image_share={self.image_share} and weight_from both decide the mix: leave one of them out"
            )
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
    def kind(self) -> ImageKind:
        """Return what the records keep of an image; moments if there is no image."""
        return self.latent_spec.kind if self.latent_spec is not None else "moments"

    def under(self, **changes: Any) -> "DataSet":
        """Return the same data, opened once, with changes of `settings`, such as another seed or order."""
        settings = replace(self.settings, **changes)
        return replace(self, sources=[source.under(settings) for source in self.sources], settings=settings)

    def name_of(self, position: Position) -> str:
        """Return a document's name for messages: its shard and its number there."""
        source, shard, record = position
        return f"{self.sources[source].manifest.shard_path(shard)}#{record}"

    @property
    def too_long(self) -> list[str]:
        """Name the documents that are known before the first step to be skipped."""
        places = [(source.number, *place) for source in self.sources for place in sorted(source.too_long)]
        return [f"{self.name_of(place)}: longer than a sequence" for place in places]

    def fingerprint(self, step: int) -> dict[str, str]:
        """Return what a resume after `step` must find unchanged; sources without weight so far may be appended."""
        found = {"tokenizer": self.tokenizer.hash}
        for source in self.sources:
            config = source.config
            changes = sorted((int(s), weight) for s, weight in config.weight_from.items() if int(s) <= step)
            if any(weight for since, weight in [(1, config.weight), *changes] if since <= step):
                weights = "".join([str(config.weight), *(f" {weight} from step {s}" for s, weight in changes)])
                said = f"{source.manifest.content_hash} weight {weights} repeat {config.repeat}"
                if kinds := source.manifest.captions:
                    said += f" captions {dict(zip(kinds, source.caption_weights, strict=True))}"
                said += "".join(f" {name} {share}" for name, share in vars(config.order).items() if share is not None)
                found[f"source {source.number}"] = said
        return found | {name: str(value) for name, value in vars(self.settings).items()}


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
        clean_copies=config.clean_copies,
    )
    cache = CacheConfig(folder=config.cache_dir, max_gib=config.cache_gib) if config.cache_dir else None
    most_ahead = 2 * (config.read_ahead or READ_AHEAD) * config.lanes
    manifests = {name: Manifest.load(source.path, cache, most_ahead) for name, source in config.sources.items()}
    given = {name: source.captions for name, source in config.sources.items()}
    captions = {name: weights_in_force(name, manifest.captions, given[name]) for name, manifest in manifests.items()}
    weights = source_weights(config, manifests, captions, patch_size)
    watch = ReadWatch(config.read_warning_s)
    sources: list[Source] = []
    spec: LatentSpec | None = None
    grids: set[tuple[int, int]] = set()
    for number, (name, source) in enumerate(config.sources.items()):
        manifest = manifests[name]
        manifest.check_files()
        ahead = config.read_ahead
        if ahead is None:
            ahead = READ_AHEAD if manifest.store.is_remote and cache is None else 0
        _require_tokenizer(name, manifest, tokenizer)
        theirs = manifest.latent_spec
        if spec is not None and theirs is not None and theirs != spec:
            raise ValueError(
                f"data.sources.{name} holds {theirs.images}, other sources hold {spec.images} (or other statistics); "
                "encode all sources with one vae=; if they are, run the train.encode command again with "
                "stats_from=FOLDER of another source, which only rewrites the manifest"
            )
        if manifest.records < config.lanes:
            raise ValueError(
                f"data.sources.{name} has {manifest.records} documents, fewer than data.lanes={config.lanes}; "
                "use fewer lanes or more data"
            )
        spec = spec or theirs
        grids |= manifest.grids()
        too_long = find_too_long(manifest, settings.special, patch_size, config.sequence_length, captions[name])
        weighted = replace(source, weight=weights[name])
        sources.append(Source(number, weighted, manifest, settings, watch, ahead, too_long, captions[name]))
    _require_room(grids, patch_size, config)
    return DataSet(sources, settings, tokenizer, spec, sorted(grids))


def _require_tokenizer(name: str, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raise ValueError for a source whose token ids are of another tokenizer or of another chat template."""
    if manifest.tokenizer_hash != tokenizer.hash:
        raise ValueError(
            f"data.sources.{name} was encoded with tokenizer {manifest.tokenizer_hash}, but {tokenizer.path} is "
            f"{tokenizer.hash}; name the tokenizer it was encoded with, or encode it again"
        )
    if manifest.chat_hash not in (None, tokenizer.chat_hash):
        raise ValueError(
            f"data.sources.{name} holds conversations laid out by chat template {manifest.chat_hash}, but that of "
            f"{tokenizer.path} is {tokenizer.chat_hash}; name the tokenizer it was encoded with, or encode it again "
            "into another folder"
        )


def _require_room(grids: set[tuple[int, int]], patch_size: int, config: DataConfig) -> None:
    """Raise ValueError for images that are longer than a sequence."""
    for grid in grids:
        rows, columns = patch_grid(grid, patch_size)
        tokens = rows * columns * (1 + config.clean_copies) + 4
        if tokens > config.sequence_length:
            copied = ", with its clean copy" if config.clean_copies else ""
            raise ValueError(
                f"an image of latent grid {grid[0]}x{grid[1]} is {tokens} tokens with BOS, BOI, EOI, EOS{copied}, "
                f"more than data.sequence_length={config.sequence_length}; use longer sequences or larger patches"
            )


def source_weights(
    config: DataConfig, manifests: dict[str, Manifest], captions: dict[str, tuple[float, ...]], patch_size: int
) -> dict[str, float]:
    """Return each source's share of all tokens, up to a common factor: as configured, or scaled to meet `image_share`.

    Raises ValueError if no scaling can meet it.
    """
    weights = {name: source.weight for name, source in config.sources.items()}
    if config.image_share is None:
        return weights
    image_shares = {}
    for name, source in config.sources.items():
        kept = 1 - source.order.over(config.order).caption_dropout
        image_shares[name] = manifests[name].image_token_share(patch_size, kept, captions[name])
    with_images = {name: weight for name, weight in weights.items() if image_shares[name] > 0}
    total = sum_in_order(with_images.values())
    most = sum_in_order(weight * image_shares[name] for name, weight in with_images.items()) / total if total else 0.0
    if most <= config.image_share or len(with_images) == len(weights):
        raise ValueError(
            f"data.image_share={config.image_share}: the sources with images hold {most:.3f} image tokens a token, and "
            f"{len(weights) - len(with_images)} sources hold text alone; expected less than the former and at least "
            "one of the latter; add such a source, or set data.image_share=null"
        )
    share = config.image_share / most  # of all tokens, in documents with images
    text_total = sum_in_order(weight for name, weight in weights.items() if name not in with_images)
    return {
        name: share * weight / total if name in with_images else (1 - share) * weight / text_total
        for name, weight in weights.items()
    }
