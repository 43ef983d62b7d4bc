"""The environment of the peer from the package registry: made once, with our torch.

A `.pth` file lets it see our packages behind its own. So pip finds torch installed, both sides run the same one, and
nothing large is downloaded; what the peer needs in another version goes into its own folder and hides ours. Nothing is
ever written into our environment. Rejected: an own copy of torch, a gigabyte that could be another build.
"""

import os
import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path

import torch

PACKAGE, VERSION = "transfusion-pytorch", "0.19.4"


def default_folder() -> Path:
    """Return a folder of the user's cache that belongs to this version and this torch."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return cache / "transfusion-bench" / f"{PACKAGE}-{VERSION}-torch-{torch.__version__}-{python}"


def python_of(folder: Path) -> Path:
    return folder / "bin" / "python"


def packages_of(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def is_made(folder: Path) -> bool:
    """Return whether the peer is installed there, in this version."""
    own = [str(packages_of(folder))]
    return any(d.name == PACKAGE and d.version == VERSION for d in distributions(name=PACKAGE, path=own))


def make(folder: Path) -> None:
    """Create the environment and install the peer, unless it is there; raise RuntimeError if the registry is not
    reached or has no such version."""
    if is_made(folder):
        return
    print(f"bench.compare: installing {PACKAGE} {VERSION} in {folder}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    ours = Path(torch.__file__).parents[1]
    (packages_of(folder) / "ours.pth").write_text(f"{ours}\n", encoding="utf-8")
    command = [str(python_of(folder)), "-m", "pip", "install", "--quiet", "--retries", "1", f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not is_made(folder):
        lines = done.stderr.splitlines()
        lines = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        raise RuntimeError(
            f"cannot install {PACKAGE}=={VERSION} in {folder}: {' '.join(lines)}. It needs the Python package "
            "registry; without it, `--only plain` compares with the baseline alone, and --env names an environment "
            "made elsewhere"
        )
