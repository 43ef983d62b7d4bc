"""Whole encoded folders: verify that every record is what the manifest says; index shards from elsewhere.

Verifying reads each byte once and checks sizes, the checksums of indices and records, that each record decodes to
finite latents and known tokens, and that the counts add up.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.captions import CaptionTokens
from data.documents import ImageSegment, check_document, decode_document, sizes_of
from data.inputs import expand
from data.manifest import LatentSpec, LatentSums, Manifest, count_grids
from data.raw import TAR
from data.remote import file_version
from data.shards import BadRecord, BadRecords, Record, index_shard, read_at
from train.console import plural
from train.distributed.launcher import place
from train.encoding.encoder import Encoder, EncoderConfig
from train.encoding.sidecar import Sidecar, build_manifest


def verify_folder(folder: str) -> int:
    """Check an encoded folder, local or remote; print what is wrong; return the exit status, 1 for a damaged one.

    Under torchrun each rank checks its share of the shards.
    """
    manifest = Manifest.load(folder)
    rank, ranks = place().rank, place().world_size
    shards = range(rank, len(manifest.shards), ranks)
    bad, damaged = BadRecords(max_fraction=1), []
    total = sum(manifest.shards[shard].bytes for shard in shards)
    with tqdm(desc="verify", total=total, unit="B", unit_scale=True, mininterval=1, disable=rank > 0) as progress:
        for shard in shards:
            before = bad.reasons.total()
            verify_shard(manifest, shard, bad)
            progress.update(manifest.shards[shard].bytes)
            if bad.reasons.total() > before:
                damaged.append(manifest.shards[shard].name)
                progress.set_postfix_str(f"bad {bad.summary()}")
    for name in bad.names:
        print(f"verify: {name}")
    share = f"{plural(len(shards), 'shard')} ({total / 1e9:.2f} GB)" + (
        f", rank {rank} of {ranks}" if ranks > 1 else ""
    )
    if damaged:
        print(
            f"verify: {bad.reasons.total()} problems in {len(damaged)} of {share}: {bad.summary()}; damaged: "
            f"{', '.join(damaged[:20])}. Remove these shards' .json sidecars and encode again"
        )
        return 1
    print(f"verify: {plural(bad.seen, 'record')} in {share} match the manifest")
    return 0


def verify_shard(manifest: Manifest, shard: int, bad: BadRecords) -> None:
    """Check one shard, its index and each record; count in `bad` what is wrong."""
    entry, where = manifest.shards[shard], manifest.shard_path(shard)
    kind, channels = manifest.kind_and_channels
    try:
        size = manifest.store.size(entry.name)
        if size != entry.bytes:
            found = "no such file" if size is None else f"{size} bytes, the manifest says {entry.bytes}"
            raise BadRecord("wrong size", where, found)
        index = manifest.load_index(shard)
    except BadRecord as error:
        bad.add(error)
        return
    bad_before = bad.reasons.total()
    grids, captions = np.split(index.grids, index.grid_starts[1:-1]), CaptionTokens()
    for record, span in enumerate(index.spans):
        bad.seen += 1
        name = f"{where}#{record}"
        try:
            members = read_at(lambda offset, length: manifest.store.read(entry.name, offset, length), span, name)
            document = decode_document(members, name)
            check_document(document, manifest.vocab_size, kind, channels, name, len(manifest.captions))
            if sizes_of(document, captions) != (
                index.text_tokens[record],
                [tuple(grid) for grid in grids[record].tolist()],
            ):
                raise BadRecord("index of another record", name)
        except BadRecord as error:
            bad.add(error)
        except OSError as error:
            bad.add(BadRecord("unreadable shard", name, str(error)))
    if (int(index.text_tokens.sum()), count_grids(index)) != (entry.text_tokens, entry.grids):
        bad.add(BadRecord("wrong counts", where, "index and manifest differ"))
    if entry.caption_tokens and bad.reasons.total() == bad_before and captions.rounded() != entry.caption_tokens:
        bad.add(BadRecord("wrong counts", where, "lengths of captions and manifest differ"))


def index_folder(folder: Path, config: EncoderConfig, stats: LatentSpec | None, bad: BadRecords) -> Manifest:
    """Write missing or stale indices and sidecars of a folder's .tar files, and its manifest.

    For shards in our record layout that were written elsewhere or lost their indices. Bad records are counted in `bad`
    and left out of the index. `stats`: the latent spec of `config.stats_from`.
    """
    shards = [Path(path) for path in expand([str(folder)], (TAR,), quiet=True)]
    encoder = Encoder(config, config.vae is not None, stats)
    sidecars = []
    for shard in tqdm(shards, desc="index", unit="shard", mininterval=1):
        origin = Sidecar.origin_of(shard) or {"indexed": True, **encoder.origin(file_version(str(shard)))}
        for name in ("tokenizer", "vae", "resolution", "caption_keys"):
            given = encoder.made_with.get(name)
            known = origin.get(name, given if name != "caption_keys" else None)  # which is named only where set
            if known != given:
                raise ValueError(f"{shard} was made with {name}={known}, not {given}: give the one it was made with")
        sidecar = Sidecar.read(shard, origin)
        if sidecar is None:
            of_shard, latents = BadRecords(max_fraction=1), LatentSums.total(encoder.channels)
            captions = CaptionTokens()
            index = index_shard(shard, partial(_checked_sizes, encoder, latents, captions, shard), of_shard)
            if not len(index):  # a raw tar, perhaps
                found = "; ".join(of_shard.failed) or f"{shard}: no record of an encoded shard: {of_shard.summary()}"
                bad.failed.append(found)
                continue
            sidecar = Sidecar.write(shard, index, origin, latents, of_shard, captions=captions)
            bad.update(replace(sidecar.counted(), names=of_shard.names, examples=of_shard.examples))
        else:
            bad.update(sidecar.counted())
        sidecars.append(sidecar)
    for remark in bad.remarks():
        print(f"index: {remark}")
    bad.check(final=True)
    manifest = build_manifest(encoder, sidecars, folder)
    for name in bad.names:
        print(f"index: left out {name}")
    counts = f"{plural(manifest.records, 'record')} in {plural(len(manifest.shards), 'shard')}"
    print(f"index: {counts} in {folder}; left out {bad.summary()}")
    return manifest


def _checked_sizes(
    encoder: Encoder, latents: LatentSums, captions: CaptionTokens, shard: Path, record: Record
) -> tuple[int, list[tuple[int, int]]]:
    where = f"{shard}/{record['__key__'].decode()}"
    document = decode_document(record, where)
    if document.has_image and encoder.space is None:
        raise ValueError(f"{where} holds images: give vae=FOLDER, the VAE that made them, or vae=pixels")
    kinds = len(encoder.config.caption_kinds)
    check_document(document, encoder.tokenizer.vocab_size, encoder.kind, encoder.channels, where, kinds)
    for segment in document.segments:
        if isinstance(segment, ImageSegment):
            latents.add(segment.array, segment.kind)
    return sizes_of(document, captions)
