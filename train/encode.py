"""Encode raw data once, offline: pictures to latents (or bytes, with vae=pixels), captions and text to token ids.

Reads img2dataset-style .tar shards (picture + .txt or .json), interleaved documents, rows of .jsonl (.gz, .zst) or
.parquet with text, captioned pictures, conversations or edits, and .txt text; writes one shard per input file with its
index and sidecar, then manifest.json. Start it as often as you like, under torchrun, as a Slurm array, on machines that
come and go: workers share the input files through leases in the output folder, skip what is done, and take over from
dead workers; the bytes written are always the same.
`verify=FOLDER` checks an encoded folder, `index=FOLDER` indexes encoded shards from elsewhere.
"""

import os
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from data.captions import CaptionTokens
from data.contents import contents_of
from data.documents import document_sizes
from data.durable import TEMPORARY_NAME
from data.inputs import expand
from data.manifest import FILE_NAME, MAX_NAME_BYTES, LatentSpec, Manifest
from data.parquet import PARQUET, check_pyarrow
from data.raw import SUFFIXES, TAR, input_name, read_raw, suffix_of
from data.raw_document import RawDocument
from data.remote import file_version, is_remote, shown
from data.shards import BadRecords, Record, index_shard, write_shard
from data.storage import Location, local_copy
from data.strict_json import dumps
from train.config import load_config, run_program
from train.console import plural
from train.distributed.launcher import place
from train.encoding.encoder import Encoder, EncoderConfig
from train.encoding.leases import Leases
from train.encoding.progress import Progress
from train.encoding.sidecar import Sidecar, build_manifest, sidecar_path
from train.encoding.tasks import WAIT_S, Task, claimed, list_tasks
from train.encoding.verification import index_folder, verify_folder
from train.encoding.word_counts import EXAMPLES_KEPT, GIVEN
from train.output_folder import make_writable

LEASES = ".leases"  # folder in the output


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(EncoderConfig):
    # Files of pictures (.tar), of rows (.jsonl, .parquet) or of text (.txt): paths, folders, globs, {000..099},
    # http(s)://, s3:// and what fsspec reads.
    inputs: list[Location] = field(default_factory=list)
    output: Location = "runs/latents"  # folder for the shards and manifest.json
    # Share of the data that may be skipped, in [0, 1]: of the records, and of the input's bytes where tars are damaged.
    max_bad_fraction: float = 0.01
    max_failed_files: int = 0  # input files that may hold nothing readable, e.g. LFS pointers or error pages, >= 0
    lease_timeout_s: float = 60  # seconds without a heartbeat after which another worker takes a file over, >= 1
    verify: Location | None = None  # encoded folder to check instead: checksums, counts, decodable, finite
    index: Location | None = None  # folder of encoded shards to index instead: .idx files, sidecars, manifest.json

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction}: expected a share in [0, 1]")
        if self.max_failed_files < 0:
            raise ValueError(f"max_failed_files={self.max_failed_files}: expected 0 or more")
        if self.lease_timeout_s < 1:
            raise ValueError(f"lease_timeout_s={self.lease_timeout_s}: expected at least 1")
        modes = {name: getattr(self, name) for name in ("verify", "index") if getattr(self, name)}
        if len(modes) + bool(self.inputs) > 1:
            raise ValueError(f"{' and '.join([*modes, *(['inputs'] if self.inputs else [])])}: expected one of them")

    def bad_records(self) -> BadRecords:
        return BadRecords(self.max_bad_fraction, max_failed_files=self.max_failed_files)


CONFIG = EncodeConfig


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    if config.verify:
        return verify_folder(config.verify)
    if config.index:
        index_folder(Path(config.index), config, given_spec(config.stats_from), config.bad_records())
        return None
    output = Path(config.output)
    sources, has_pictures = check(config)
    encoder = Encoder(config, has_pictures, given_spec(config.stats_from))
    tasks = list_tasks(encoder, sources, output)
    say_what_changed(encoder, tasks)
    bad = config.bad_records()
    leases = Leases(output / LEASES, config.lease_timeout_s)
    with closing(encoder), leases, closing(Progress(tasks, bad)) as progress:
        refuse_other_settings(encoder, output, leases)
        for task in claimed(tasks, leases, progress.waits_for):
            encode_file(encoder, task, bad, progress)
            bad.check()
        for name in bad.names:
            print(f"encode: skipped {name}")
        with redirect_stdout(None if place().rank else sys.stdout):  # once for the ranks of a launcher
            finish(encoder, tasks, output, leases, bad)
    return None


def check(config: EncodeConfig) -> tuple[list[str], bool]:
    """Make the output folder; return the input files and whether they hold pictures.

    Raises ValueError or OSError if they cannot be encoded together, or there.
    """
    if config.verify or config.index:
        return [], False
    if is_remote(config.output):
        raise ValueError(f"output={config.output}: expected a local or shared folder; copy it to the store when done")
    sources, output = expand(config.inputs, SUFFIXES), Path(config.output)
    if any(suffix_of(source) == PARQUET for source in sources):
        check_pyarrow()
    contents = contents_of(sources, config)
    if {"pictures", "texts"} <= contents:
        what = ".tar shards" if any(suffix_of(source) == TAR for source in sources) else "rows with pictures"
        raise ValueError(f"inputs mix {what} with text files: encode them into two folders")
    name, count = Counter(map(input_name, sources)).most_common(1)[0]
    if count > 1:
        raise ValueError(f"two input files are named {name}: their shards would overwrite each other; rename one")
    for source in sources:
        name = f"{input_name(source)}.tar"
        if len(os.fsencode(name)) > MAX_NAME_BYTES or name.startswith(".") or not name.isprintable():
            raise ValueError(
                f"input {shown(source)!r}: expected a name of at most {MAX_NAME_BYTES} printable bytes, without a "
                "leading dot; rename it"
            )
        if Path(source).resolve() == (output / name).resolve():
            raise ValueError(f"output={output}: the shard of {source} would overwrite it; choose another folder")
    make_writable(output)
    is_ours = (output / FILE_NAME).exists() or (output / LEASES).exists() or any(output.glob("*.tar.json"))
    foreign = [name for name in map(input_name, sources) if not is_ours and (output / f"{name}.tar").exists()]
    if foreign:
        raise ValueError(
            f"output={output}: {foreign[0]}.tar exists and was not made by train.encode; choose another folder"
        )
    return sources, "pictures" in contents or ("conversations" in contents and config.vae is not None)


def given_spec(folder: str | None) -> LatentSpec | None:
    """Return the latent spec of an encoded folder, a run, a checkpoint or an export; None for text and for None."""
    if folder is None:
        return None
    if any((Path(folder) / name).exists() for name in ("export.json", "checkpoints", "meta.json")):
        from train.inference.saved_model import stored_spec  # takes a second, which most encoding jobs need not spend

        return stored_spec(Path(folder))
    return Manifest.load(folder).latent_spec


def say_what_changed(encoder: Encoder, tasks: Sequence[Task]) -> None:
    """Print why existing shards will be encoded again, if any will."""
    present = {path.name for path in tasks[0].shard.parent.glob("*.tar.json")}
    made = (Sidecar.origin_of(task.shard) for task in tasks if sidecar_path(task.shard).name in present)
    before = next((origin for origin in made if origin is not None), {})
    changed = [
        f"{name} {before[name]} (now {now})" for name, now in encoder.made_with.items() if before.get(name, now) != now
    ]
    if changed:
        print(f"encode: the shards in {tasks[0].shard.parent} have another {', '.join(changed)}: encoding them again")


def refuse_other_settings(encoder: Encoder, output: Path, leases: Leases) -> None:
    """Raise ValueError if a worker with other settings is using the folder: each would undo the other's work."""
    settings = f"job-{zlib.crc32(dumps(encoder.made_with).encode()):08x}-"
    leases.claim(f"{settings}{socket.gethostname()}-{os.getpid()}")
    deadline = time.monotonic() + leases.timeout_s + WAIT_S
    while others := [name for name in leases.held_by_others("job-") if not name.startswith(settings)]:
        if time.monotonic() > deadline:  # its lease is being renewed
            raise ValueError(
                f"output={output}: {others[0].split('-', 2)[2]} encodes into it with another tokenizer, VAE or "
                "resolution; choose another folder, or wait for it"
            )
        time.sleep(WAIT_S)


def encode_file(encoder: Encoder, task: Task, bad: BadRecords, progress: Progress) -> None:
    """Write one input file's shard, index and, last, sidecar; add to `bad` what was skipped."""
    shard = task.shard
    # First remove what vouches for the old contents.
    for stale in (shard.with_name(FILE_NAME), sidecar_path(shard)):
        stale.unlink(missing_ok=True)
    of_file = BadRecords(max_fraction=1)
    progress.begins(task, of_file)

    def documents() -> Iterator[RawDocument]:
        with local_copy(task.source) as file:
            for document in read_raw(file, task.source, of_file, encoder.config):
                yield document
                progress.add(document)

    def records() -> Iterator[Record]:
        yield from encoder.records(documents(), of_file)
        if task.sidecar() is not None:
            raise FileExistsError  # and keep it: written on another machine, its last bits may differ

    try:
        inode = write_shard(shard, records())
        in_shard = BadRecords(max_fraction=0, max_failed_files=1)  # it may be without records
        captions = CaptionTokens()
        index = index_shard(shard, partial(document_sizes, captions=captions), in_shard)
        if shard.stat().st_ino != inode:
            raise FileExistsError(f"{shard}: another worker wrote it at the same time; start again")
        in_shard.check(final=True)
        if encoder.origin(file_version(task.source)) != task.origin:
            raise ValueError(f"{shown(task.source)} changed while it was encoded; start again")
        sidecar = Sidecar.write(shard, index, task.origin, encoder.latent_sums, of_file, encoder.words, captions)
    except (FileExistsError, FileNotFoundError):  # another worker was faster, and may have cleaned up already
        theirs = task.sidecar()
        if theirs is None:
            raise
        sidecar = theirs
    bad.update(replace(sidecar.counted(), names=of_file.names, examples=of_file.examples))
    progress.is_done()


def finish(encoder: Encoder, tasks: Sequence[Task], output: Path, leases: Leases, mine: BadRecords) -> None:
    """Write the manifest unless another worker does, and print the totals of the whole job."""
    while not leases.claim("manifest"):
        if (output / FILE_NAME).is_file():
            print(f"encode: done; another worker wrote {output / FILE_NAME}")
            return
        time.sleep(WAIT_S)
    sidecars, bad = [], replace(mine, seen=0, reasons=Counter(), failed=[], files=[], noted=Counter())
    for task in tasks:
        if (sidecar := task.sidecar()) is None:
            raise ValueError(f"{task.source} or its shard changed during this job; start again")
        sidecars.append(sidecar)
        bad.update(sidecar.counted())
    for remark in bad.remarks():
        print(f"encode: {remark}")
    bad.check(final=True)
    manifest = build_manifest(encoder, sidecars, output)
    made = {f"{task.shard.name}{suffix}" for task in tasks for suffix in ("", ".idx", ".json")}
    for leftover in output.glob("*.tmp-*"):  # of killed workers; one still writing will find its shard done
        if (match := TEMPORARY_NAME.fullmatch(leftover.name)) and match[1] in {*made, FILE_NAME}:
            leftover.unlink(missing_ok=True)
    others = {path.name for path in output.glob("*.tar.json")} - {sidecar_path(task.shard).name for task in tasks}
    if others:
        print(
            f"encode: {output} also holds {plural(len(others), 'shard')} of other inputs "
            f"({min(others).removesuffix('.json')} ...), which are not in the manifest: name all inputs of a data set "
            "in each call"
        )
    if encoder.space is not None:
        print(f"encode: latent statistics: {encoder.stats_source}")
    say_captions(sidecars)
    warn_of_unknown(sidecars, encoder.config.tokenizer)
    counts = f"{plural(manifest.records, 'record')} in {plural(len(manifest.shards), 'shard')}"
    print(f"encode: {counts} in {output}; skipped {bad.summary()}")


def say_captions(sidecars: Sequence[Sidecar]) -> None:
    """Print how many pictures have each kind of caption, if there are several, and why the others lack it."""
    counts: dict[str, Counter] = {}
    for sidecar in sidecars:
        for kind, found in sidecar.words.captions.items():
            counts.setdefault(kind, Counter()).update(found)
    said: list[str] = []
    for kind, found in counts.items():
        of = "" if said else f" of {plural(found.total(), 'picture')}"
        missing, reasons = found.total() - found[GIVEN], ("empty", "undecodable")
        why = ", ".join(f"{number} {reason}" for reason in reasons if (number := found[f"{reason} caption"]))
        said.append(
            f"{kind} {found[GIVEN]}{of}" + (f" ({missing} missing{why and f', of these {why}'})" * (missing > 0))
        )
    if said:
        print(f"encode: captions: {', '.join(said)}")
    for kind in [kind for kind, found in counts.items() if not found[GIVEN]]:
        print(f"encode: warning: no picture has a caption under {kind!r}; is the key in caption_keys spelt right?")


def warn_of_unknown(sidecars: Sequence[Sidecar], tokenizer: str) -> None:
    """Print the share of tokens that the tokenizer does not know, if any."""
    if unknown := sum(sidecar.words.unknown for sidecar in sidecars):
        share = unknown / sum(sidecar.words.tokens for sidecar in sidecars)
        words = list(dict.fromkeys(word for sidecar in sidecars for word in sidecar.words.examples))
        print(
            f"encode: warning: {share:.2%} of the tokens are unknown to {tokenizer}, such as {words[:EXAMPLES_KEPT]}: "
            "the model cannot tell them apart. Use a tokenizer with byte fallback, as train.tokenizer trains"
        )


if __name__ == "__main__":
    run_program(main, lasting=True)
