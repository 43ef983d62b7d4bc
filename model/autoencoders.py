"""diffusers' image autoencoders as latent spaces, one class here for each of theirs.

A folder's config.json names the class. Only weights in safetensors are read (P11). diffusers is imported only where a
model is loaded: the import takes three seconds, and most programs never need it.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from model.latent_space import Kind, LatentSpace, LatentStats, Pixels
from model.vae import decode, moments
from model.vae_folder import check_class, find_vae

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

_MODULE = "diffusers.models.autoencoders"
_STATED = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # in a config.json


class Autoencoder(LatentSpace):
    """One of diffusers' models; by default deterministic, and scaled by the numbers in its config."""

    kind: Kind = "latents"
    BLOCKS = "encoder_block_out_channels"  # of the config: channels at each resolution; every block but the last halves

    def __init__(self, module: Any) -> None:
        self.module = module.eval()
        self.config: dict[str, Any] = module.config
        self.hash = vae_hash(module)
        self._set_sizes()

    def _set_sizes(self) -> None:
        self.channels, self.stride = self.config["latent_channels"], 2 ** (len(self.config[self.BLOCKS]) - 1)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        return self._encode(pixels.to(self.module.dtype)).half()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self._decode(latents.to(self.module.dtype)).float()

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.module.encode(pixels, return_dict=False)[0]

    def _decode(self, latents: Tensor) -> Tensor:
        return decode(self.module, latents)

    @property
    def states_scaling(self) -> bool:
        """Without a scaling in config.json diffusers fills in its own, such as 0.18215."""
        if "scaling_factor" in self.config.get("_use_default_values", ()):
            return False
        stats = self.stated_stats()
        return bool((stats.mean != 0).any() or (stats.std != 1).any())

    def stated_stats(self) -> LatentStats:
        """Return the scaling in the config as statistics: whitening by them is the formula of diffusers' pipelines.

        That is (z - shift_factor) * scaling_factor or, where the config has them, (z - latents_mean) * scaling_factor /
        latents_std.
        """
        factor, shift, mean, std = (self.config.get(name) for name in _STATED)
        try:
            if (mean is None) != (std is None):
                raise ValueError("expected latents_mean and latents_std, or neither")
            if mean is None or std is None:
                mean, std = [shift or 0.0] * self.channels, [1.0] * self.channels
            if not len(mean) == len(std) == self.channels:
                raise ValueError(f"expected {self.channels} channels")
            if factor is None or not factor > 0:
                raise ValueError("expected scaling_factor > 0")
            return LatentStats(torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64) / factor)
        except (TypeError, ValueError) as error:
            stated = ", ".join(f"{name}={self.config.get(name)}" for name in _STATED)
            raise ValueError(
                f"the VAE's config states {stated}: {error}; correct its config.json, or use latent_stats=measured"
            ) from None

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Self:
        torch.nn.Module.to(self.module, device, dtype)  # diffusers' own `to` warns of a list of nothing
        return self

    def save(self, folder: Path) -> bool:
        self.module.save_pretrained(folder, safe_serialization=True)
        return True


class KL(Autoencoder):
    """Stable Diffusion's (1 to 3, XL) and FLUX.1's: posteriors of 4 or 16 channels."""

    kind = "moments"
    BLOCKS = "block_out_channels"

    def _encode(self, pixels: Tensor) -> Tensor:
        return moments(self.module, pixels)


class Flux2(KL):
    """FLUX.2's, as its denoiser sees it: 2x2 cells are one, and the statistics of a batch norm over them whiten it."""

    def _set_sizes(self) -> None:
        super()._set_sizes()
        self.patch = self.config["patch_size"][0]
        self.channels, self.stride = self.channels * self.patch**2, self.stride * self.patch
        norm = self.module.bn  # read before `to`, which would round it
        self.mean, self.variance, self.eps = norm.running_mean.double(), norm.running_var.double(), norm.eps

    def _encode(self, pixels: Tensor) -> Tensor:
        mean, logvar = super()._encode(pixels).chunk(2, dim=1)
        return torch.cat([pixel_unshuffle(mean, self.patch), pixel_unshuffle(logvar, self.patch)], dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(pixel_shuffle(latents, self.patch))

    @property
    def states_scaling(self) -> bool:
        return bool((self.mean != 0).any() or (self.variance != 1).any())

    def stated_stats(self) -> LatentStats:
        return LatentStats(self.mean, (self.variance + self.eps).sqrt())


class DC(Autoencoder):
    """SANA's deep compression autoencoder, 32 to 128 pixels a cell."""


class Tiny(Autoencoder):
    """TAESD and its kin: small, distilled from another VAE; the latents are those that its denoiser sees."""


class RAE(Autoencoder):
    """Features of a frozen vision encoder with a decoder: one size of picture; it normalises its latents itself."""

    def _set_sizes(self) -> None:
        if not self.config["reshape_to_2d"]:
            raise ValueError("the config.json of this AutoencoderRAE states reshape_to_2d=false, expected a grid: true")
        self.channels, self.stride = self.config["encoder_hidden_size"], self.config["patch_size"]
        self.picture_side = self.module.decoder_image_size

    def _encode(self, pixels: Tensor) -> Tensor:  # theirs are in [0, 1]
        return super()._encode((pixels + 1) / 2)

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(latents) * 2 - 1

    @property
    def states_scaling(self) -> bool:
        stated = (self.config[name] is not None for name in ("latents_mean", "latents_std"))
        return any(stated) or self.config["scaling_factor"] != 1

    def stated_stats(self) -> LatentStats:
        zeros = torch.zeros(self.channels, dtype=torch.float64)
        return LatentStats(zeros, zeros + 1)


_ADAPTERS: dict[str, type[Autoencoder]] = {
    "AutoencoderKL": KL,
    "AutoencoderKLFlux2": Flux2,
    "AutoencoderDC": DC,
    "AutoencoderRAE": RAE,
    "AutoencoderTiny": Tiny,
}


def load_latent_space(name: str | Path) -> LatentSpace:
    """Load the latent space `name`: pixels, or an autoencoder's folder or hub id by `find_vae`'s rules.

    Raises FileNotFoundError for a missing folder, ValueError for one without an autoencoder that we know or whose
    weights do not match its config: diffusers would initialise missing weights at random.
    """
    if str(name) == Pixels.hash:
        return Pixels()
    source, reasons = find_vae(str(name)), []
    options = {"variant": source.variant, "low_cpu_mem_usage": False, "output_loading_info": True}
    unreachable = False  # the hub: what is left is this machine's cache, and asking again would take minutes
    for folder in (None, "vae") if source.is_hub_id else (None,):  # where a pipeline's repository has it
        try:
            config = _config_of(source.name, folder, cached=unreachable)
        except (OSError, ValueError) as error:
            reasons.append(_one_line(error))
            unreachable = unreachable or _is_unreachable(error)
            continue
        kind = check_class(config, str(name))
        theirs = _diffusers_class(kind, str(name))
        try:
            module, loading = theirs.from_pretrained(
                source.name, subfolder=folder, use_safetensors=True, local_files_only=unreachable, **options
            )
            break
        # AttributeError: diffusers was written for another version of transformers, whose encoder an RAE holds.
        except (OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            reasons.append(_one_line(error))
            unreachable = unreachable or _is_unreachable(error)
    else:
        if unreachable:
            raise ValueError(
                f"vae={name} is not in this machine's cache of the hub, and the hub cannot be reached: download it "
                "where it can (`hf download`), and give its folder here"
            )
        raise ValueError(f"vae={name}: not an autoencoder in safetensors: {reasons[0]}")
    problems = [f"{key} is missing" for key in sorted(loading["missing_keys"])]
    problems += [f"{key} is not in the model" for key in sorted(loading["unexpected_keys"])]
    if problems:
        raise ValueError(
            f"vae={name}: its weights do not match its config.json: {'; '.join(problems[:4])}"
            + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")
            + "; restore the folder"
        )
    return _ADAPTERS[kind](module)


def _config_of(name: str, subfolder: str | None, cached: bool) -> dict[str, Any]:
    return importlib.import_module(_MODULE).AutoencoderKL.load_config(
        name, subfolder=subfolder, local_files_only=cached
    )


def _is_unreachable(error: BaseException | None) -> bool:
    """Return whether diffusers found no file because the hub did not answer; it says that the file does not exist."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if error is None or isinstance(error, LocalEntryNotFoundError):
        return error is not None
    return _is_unreachable(error.__cause__ or error.__context__)


def _diffusers_class(kind: str, name: str) -> Any:
    """Return diffusers' class; raise ValueError if the installed libraries lack it."""
    if kind == "AutoencoderRAE":
        try:
            importlib.import_module("transformers")
        except ImportError:
            raise ValueError(
                f"vae={name}: the vision encoder of an {kind} is a model of transformers, which cannot be imported; "
                "pip install transformers"
            ) from None
    if (found := getattr(importlib.import_module(_MODULE), kind, None)) is None:
        version = importlib.import_module("diffusers").__version__
        raise ValueError(f"vae={name}: diffusers {version} has no {kind}; pip install -U diffusers")
    return found


def vae_hash(module: "ModelMixin") -> str:
    """Return 16 hex digits that identify a model by its structure and the bits of its weights, not its location."""
    digest = hashlib.sha256()
    kept = {key: value for key, value in module.config.items() if not key.startswith("_")}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
