"""Where an autoencoder is: a folder in diffusers' layout, or a repository on the Hugging Face hub.

Folders are inspected before diffusers opens them, since its errors do not say what it found. A name is a hub id only if
it is `owner/name` and not a path: `owner` is neither a folder here nor `runs`, where this trainer's programs write.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# diffusers' classes that model/autoencoders.py adapts, as config.json names them.
CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC", "AutoencoderRAE", "AutoencoderTiny")
WEIGHTS = "diffusion_pytorch_model"  # .safetensors, .VARIANT.safetensors; diffusers' name
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_VARIANT = re.compile(
    rf"{WEIGHTS}\.([\w-]+?)(?:-\d+-of-\d+)?\.safetensors|{WEIGHTS}\.safetensors\.index\.([\w-]+)\.json"
)


@dataclass(frozen=True)
class VaeSource:
    name: str  # a local folder, or a hub id
    is_hub_id: bool = False
    variant: str | None = None  # of the weights' file name, such as fp16


def find_vae(name: str) -> VaeSource:
    """Return where an autoencoder is; raise FileNotFoundError or ValueError that says what was found instead."""
    path = Path(name)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        raise ValueError(
            f"vae={name} is a file, expected a folder in diffusers' layout; convert other layouts with "
            f"diffusers' AutoencoderKL.from_single_file({name!r}).save_pretrained(FOLDER)"
        )
    owner = name.partition("/")[0]
    if not _HUB_ID.fullmatch(name) or owner == "runs" or Path(owner).is_dir():
        raise FileNotFoundError(
            f"vae={name}: no such folder; make one with `python -m train.vae`, or name one, or OWNER/NAME on the hub; "
            "vae=pixels needs none"
        )
    return VaeSource(name, is_hub_id=True)


def check_class(config: Any, name: str) -> str:
    """Return the class that a config.json names; raise ValueError unless it is one of CLASSES."""
    kind = config.get("_class_name", CLASSES[0]) if isinstance(config, dict) else type(config).__name__
    if kind not in CLASSES:
        raise ValueError(
            f"vae={name} holds a model of class {kind}, expected {', '.join(CLASSES)}; give such a one's folder, train "
            "an AutoencoderKL with `python -m train.vae`, or use vae=pixels"
        )
    return kind


def _in_folder(folder: Path) -> VaeSource:
    config, found = folder / "config.json", sorted(path.name for path in folder.iterdir())
    if not config.is_file() and (folder / "vae" / "config.json").is_file():  # a whole pipeline
        return _in_folder(folder / "vae")
    expected = f"expected an autoencoder in diffusers' layout: config.json and {WEIGHTS}.safetensors"
    if not config.is_file():
        raise ValueError(f"vae={folder} holds {found[:10] or 'nothing'}, {expected}")
    try:
        stated = json.loads(config.read_bytes())
    except ValueError as error:
        raise ValueError(f"vae={folder}: its config.json is not JSON ({error}), {expected}") from None
    check_class(stated, str(folder))
    if f"{WEIGHTS}.safetensors" in found or f"{WEIGHTS}.safetensors.index.json" in found:
        return VaeSource(str(folder))
    variants = sorted({match[1] or match[2] for match in map(_VARIANT.fullmatch, found) if match})
    if len(variants) == 1:
        return VaeSource(str(folder), variant=variants[0])
    if variants:
        raise ValueError(f"vae={folder} holds weights of {variants}; copy the one you want to {WEIGHTS}.safetensors")
    if any(name.endswith((".bin", ".pt", ".ckpt")) for name in found):
        raise ValueError(
            f"vae={folder} holds {found[:10]}: pickled weights, which can execute code and are not read. Convert "
            f"them: diffusers' AutoencoderKL.from_pretrained({str(folder)!r}, use_safetensors=False)"
            ".save_pretrained(FOLDER)"
        )
    raise ValueError(f"vae={folder} holds {found[:10]}, {expected}")
