"""The sidecar file of each encoded shard, and the manifest built from all of them.

The sidecar is written last, so it vouches for its shard and index. It says what the shard was made from and how, so a
restarted job knows what is done, and keeps the sums from which the latents' statistics come.
"""

import json
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.captions import CaptionTokens
from data.durable import atomic_write
from data.manifest import LatentSums, Manifest, ShardEntry, shard_entry
from data.shard_index import ShardIndex, index_path
from data.shards import BadRecords
from data.storage import Store
from data.strict_json import dumps
from train.encoding.encoder import Encoder
from train.encoding.word_counts import WordCounts


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    origin: dict[str, Any]  # what decides the shard's bytes
    entry: ShardEntry
    cells: int  # latent cells
    sums: list[list[float]]  # of latents by channel: means, and second moments
    seen: int  # records of the input, good and bad
    skipped: dict[str, int]  # by reason
    words: WordCounts = field(default_factory=WordCounts)
    lost: float = 0.0  # share of the input's bytes, 1 where it was cut
    failed: str = ""  # what the input is, if nothing in it can be read
    noted: dict[str, int] = field(default_factory=dict)  # oddities that cost no record

    @classmethod
    def write(
        cls,
        shard: Path,
        index: ShardIndex,
        origin: dict[str, Any],
        latents: LatentSums,
        bad: BadRecords,
        words: WordCounts | None = None,
        captions: CaptionTokens | None = None,
    ) -> "Sidecar":
        """Save a written shard's index and then its sidecar."""
        index.save(index_path(shard))
        sidecar = cls(
            origin=origin,
            entry=shard_entry(shard, index, captions),
            cells=latents.cells,
            sums=latents.sums.tolist(),
            seen=bad.seen,
            skipped=dict(sorted(bad.reasons.items())),
            words=words or WordCounts(),
            lost=sum(share for _, share in bad.files),
            failed="".join(bad.failed),
            noted=dict(sorted(bad.noted.items())),
        )
        with atomic_write(sidecar_path(shard)) as file:
            file.write(dumps(asdict(sidecar)).encode())
        return sidecar

    def counted(self) -> BadRecords:
        """Return what was skipped of the input, without names other than a failed file's."""
        size = self.origin.get("input_bytes", self.entry.bytes)
        return BadRecords(
            max_fraction=1,
            seen=self.seen,
            reasons=Counter(self.skipped),
            failed=[self.failed] if self.failed else [],
            files=[] if self.failed else [(size, self.lost)],
            noted=Counter(self.noted),
        )

    @staticmethod
    def origin_of(shard: Path) -> dict[str, Any] | None:
        """Return a shard's origin as its sidecar states it, None without a readable one."""
        try:
            return dict(json.loads(sidecar_path(shard).read_text(encoding="utf-8"))["origin"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @classmethod
    def read(cls, shard: Path, origin: dict[str, Any]) -> "Sidecar | None":
        """Return a shard's sidecar, None unless shard and index are whole and have that origin."""
        try:
            # Older sidecars lack `words`.
            fields = {"words": {}, **json.loads(sidecar_path(shard).read_text(encoding="utf-8"))}
            parts = {"entry": ShardEntry(**fields["entry"]), "words": WordCounts(**fields["words"])}
            sidecar = cls(**{**fields, **parts})
            is_whole = sidecar.origin == origin and shard.stat().st_size == sidecar.entry.bytes
            is_whole = is_whole and zlib.crc32(index_path(shard).read_bytes()) == sidecar.entry.index_crc32
            return sidecar if is_whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def sidecar_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".json")


def build_manifest(encoder: Encoder, sidecars: list[Sidecar], folder: Path) -> Manifest:
    """Write manifest.json from the sidecars of all shards; raise ValueError if they hold nothing."""
    if not any(sidecar.entry.records for sidecar in sidecars):
        raise ValueError(f"nothing could be encoded from {len(sidecars)} input files")
    sums = LatentSums.total(encoder.channels, (LatentSums(np.array(s.sums), s.cells) for s in sidecars))
    manifest = Manifest(
        store=Store(str(folder)),
        tokenizer_hash=encoder.tokenizer.hash,
        vocab_size=encoder.tokenizer.vocab_size,
        latent_spec=encoder.latent_spec(sums),
        shards=tuple(sidecar.entry for sidecar in sidecars if sidecar.entry.records),
        captions=encoder.config.caption_kinds if encoder.space is not None else {},  # texts have none
        chat_hash=next((sidecar.words.chat for sidecar in sidecars if sidecar.words.chat is not None), None),
    )
    manifest.save()
    spec = manifest.latent_spec
    if spec is not None and sums.cells and not 0.5 <= (deviation := sums.whitened_by(spec)) <= 2:
        print(
            f"warning: whitened latents have deviation {deviation:.3g}, but the noise schedule expects about 1 "
            f"(statistics: {encoder.stats_source}); the same command with latent_stats=measured uses these pictures' "
            "own and rewrites only manifest.json"
        )
    return manifest
