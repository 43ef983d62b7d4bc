"""What a job runs, frozen at submission: the code and the resolved config, named by their hashes.

A job may wait for days and be requeued for weeks; later changes of the working tree must not reach it.
    <jobs>/code-<hash>/        data, model, train, slurm
    <jobs>/config-<hash>.yaml  every option, no overrides left
"""

import hashlib
import os
import shutil
from pathlib import Path

from data.durable import atomic_write

PACKAGES = ("data", "model", "train", "slurm")
SUFFIXES = (".py", ".css")  # everything else in these folders, such as data in data/, is not copied
ROOT = Path(__file__).resolve().parent.parent
HASH_DIGITS = 10


def write_code(jobs: Path) -> Path:
    """Copy the packages unless the same copy exists; return the folder to import them from."""
    files = {name: (ROOT / name).read_bytes() for name in _code_files()}
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    folder = jobs / f"code-{digest.hexdigest()[:HASH_DIGITS]}"
    if folder.exists():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    for name, content in files.items():
        path = temporary / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    try:
        temporary.rename(folder)
    except OSError:  # another launch was faster
        shutil.rmtree(temporary)
        if not folder.exists():
            raise
    return folder


def write_config(jobs: Path, resolved: str) -> Path:
    """Write a resolved config (YAML) into the jobs' folder; return its path."""
    path = jobs / f"config-{hashlib.sha256(resolved.encode()).hexdigest()[:HASH_DIGITS]}.yaml"
    if not path.exists():
        jobs.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(resolved.encode())
    return path


def _code_files() -> list[str]:
    """Return the files of the packages, relative to the root."""
    folders = [ROOT / package for package in PACKAGES]
    for folder in folders:
        folders += [path.parent for path in folder.glob("*/__init__.py")]
    found = (path for folder in folders for path in folder.iterdir() if path.suffix in SUFFIXES)
    return sorted(str(path.relative_to(ROOT)) for path in found)
