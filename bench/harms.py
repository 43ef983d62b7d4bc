"""What faults do to files: damage to a file is permanent, harm to the environment lasts as long as its context."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench.job import Job


def flip_bit(path: Path, luck: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[luck.randrange(len(content))] ^= 1 << luck.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, luck: random.Random) -> None:
    os.truncate(path, luck.randrange(path.stat().st_size))


def remove(path: Path, luck: random.Random) -> None:
    path.unlink()


@contextmanager
def full_disk(job: Job, luck: random.Random) -> Iterator[None]:
    """Fill the disk, but for a random remainder that may be too small for a save."""
    filler = job.run_dir.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:  # full
            pass
        file.truncate(max(0, file.tell() - luck.choice([0, luck.randrange(2_000_000)])))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(job: Job, luck: random.Random) -> Iterator[None]:
    """Mount the folder of checkpoints read-only over itself; root ignores permission bits.

    Via a second mount that is not written through: remounting one in use fails with "busy".
    """
    job.checkpoints.mkdir(parents=True, exist_ok=True)
    side = job.run_dir.with_name("side")
    side.mkdir(exist_ok=True)
    with ExitStack() as stack:
        for source, target in ((job.checkpoints, side), (side, job.checkpoints)):
            subprocess.run(["mount", "--bind", source, target], check=True)
            stack.callback(partial(subprocess.run, ["umount", "--lazy", str(target)], check=True))
            if target is side:
                subprocess.run(["mount", "-o", "remount,bind,ro", side], check=True)
        yield


@contextmanager
def vanished_shard(job: Job, luck: random.Random) -> Iterator[None]:
    """Remove a shard, also for those who have it open; restore it at the end."""
    folders = [Path(value) for key, value in job.settings.items() if key.startswith("data.sources.")]
    shard = luck.choice(sorted(path for folder in folders for path in folder.glob("*.tar")))
    kept = shard.with_name(f"{shard.name}.kept")
    shutil.copy2(shard, kept)
    os.truncate(shard, 0)
    shard.unlink()
    try:
        yield
    finally:
        kept.rename(shard)
