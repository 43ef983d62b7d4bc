"""Vision models of transformers that turn pictures into features, and CLIP's text side.

They are read from safetensors, from a folder or hub id, and run in float32. Pictures are prepared as the model's
preprocessor_config.json says, by Pillow, as the library does without torchvision: bits do not depend on what else is
installed. (torchvision's own antialiasing differs in the last bit of a pixel.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor

from data.pictures import resized
from train.evaluation.texts import OTHER_FORM

# By model_type. Features are the pooled output: of DINOv2 the class token after the last norm, as in Stein et al. 2023;
# CLIP's are projected into the space that it shares with texts.
CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
}
MOST_SIDE = 4096  # pixels of a model's input
KNOWN_STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"}


@dataclass(frozen=True)
class Preparation:
    """How a model wants its pictures: resized, cropped, scaled and normalised."""

    size: int | tuple[int, int] | None  # of the shorter side, or (height, width); None: as they are
    resample: int  # Pillow's filter
    crop: tuple[int, int] | None  # (height, width) of the centre; None: none
    scale: float  # that pixels 0...255 are multiplied by
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, name: str, key: str) -> "Preparation":
        """Read the preprocessor_config.json of a model; `key` is the option that names it.

        Raises ValueError for a missing or another kind of file.
        """
        from transformers import ImageProcessingMixin

        try:
            found = dict(ImageProcessingMixin.get_image_processor_dict(name)[0])
        except (OSError, *OTHER_FORM) as error:
            raise ValueError(
                f"{key}={name}: no preprocessor_config.json ({_first_line(error)}); put the model's own beside it"
            ) from None
        unknown = [
            step for step, value in found.items() if step.startswith("do_") and value and step not in KNOWN_STEPS
        ]
        try:
            if unknown:
                raise ValueError(f"steps {unknown} are not known")
            default_square = "crop_size" not in found  # what a single number means in configs of early versions
            size = _size(found["size"], default_square) if found.get("do_resize", True) else None
            crop = _size(found["crop_size"], True) if found.get("do_center_crop", "crop_size" in found) else None
            if isinstance(crop, int):
                raise ValueError(f"a crop of {found['crop_size']}")
            if crop is not None and (size is None or np.less(size, crop).any()):
                raise ValueError(f"a crop of {crop} from pictures of {size}")
            scale = found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 1.0
            normalizes = found.get("do_normalize", True)
            mean, std = (found["image_mean"], found["image_std"]) if normalizes else ([0.0] * 3, [1.0] * 3)
            of_channels = [tuple(map(float, three)) for three in (mean, std)]
            if not all(len(three) == 3 and np.isfinite((*three, scale)).all() for three in of_channels) or 0 in std:
                raise ValueError(f"scale {scale}, image_mean {mean}, image_std {std}")
            resample = Image.Resampling(found.get("resample", 3))
            return cls(size, int(resample), crop, float(scale), *of_channels)
        except OTHER_FORM as error:
            raise ValueError(
                f"{key}={name}: its preprocessor_config.json is not one of CLIP, DINOv2 or SigLIP ({error!r}); "
                "expected size, image_mean and image_std"
            ) from None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return the model's input f32 [3, H, W] of a picture uint8 [H, W, 3]."""
        height, width = pixels.shape[:2]
        if isinstance(self.size, int):
            short = min(height, width)
            pixels = resized(pixels, (self.size * height // short, self.size * width // short), self.resample)
        elif self.size is not None:
            pixels = resized(pixels, self.size, self.resample)
        if self.crop is not None:
            top, left = ((side - kept) // 2 for side, kept in zip(pixels.shape, self.crop, strict=False))
            pixels = pixels[top : top + self.crop[0], left : left + self.crop[1]]
        scaled = (pixels.astype(np.float64) * self.scale).astype(np.float32)
        normal = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return normal.transpose(2, 0, 1)


@dataclass
class VisionModel:
    module: Any  # of transformers, or the vision side of it and more
    prepare: Preparation
    described: dict[str, Any]  # path, class and hash of its weights, for a record of results

    @classmethod
    def load(cls, name: str, device: torch.device, key: str) -> "VisionModel":
        """Load a model by folder or hub id; `key` is the option that names it.

        Raises ValueError for what is not there, and for models of other kinds.
        """
        import transformers

        if (kind := _kind(name, key)) not in CLASSES:
            raise ValueError(f"{key}={name}: its model_type is {kind}; expected one of {', '.join(CLASSES)}")
        prepare, module = Preparation.read(name, key), _read(getattr(transformers, CLASSES[kind]), name, device, key)
        return cls(module, prepare, {"path": name, "class": CLASSES[kind], "weights": weights_hash(module)})

    @property
    def dim(self) -> int:
        """Return D, the size of its features."""
        projection, vision = self._sides()
        return vision.config.hidden_size if projection is None else projection.out_features

    @torch.no_grad()
    def features(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Return f32 [N, D] on the CPU of one batch of pictures uint8 [H, W, 3]."""
        projection, vision = self._sides()
        pixels = torch.from_numpy(np.stack([self.prepare(picture) for picture in pictures]))
        pooled = vision(pixel_values=pixels.to(self.module.device)).pooler_output
        return (pooled if projection is None else projection(pooled)).float().cpu()

    def _sides(self) -> tuple[Any, Any]:
        """Return the projection, None if there is none, and the vision side."""
        return getattr(self.module, "visual_projection", None), getattr(self.module, "vision_model", self.module)


@dataclass
class ClipText:
    """The text side of a CLIP model."""

    module: Any
    tokenizer: Any

    @classmethod
    def of(cls, model: VisionModel, key: str) -> "ClipText":
        """Return the text side of a loaded CLIP; raise ValueError for another model or a folder without tokenizer."""
        from transformers import AutoTokenizer

        name = model.described["path"]
        if model.described["class"] != "CLIPModel":
            raise ValueError(f"{key}={name} is a {model.described['class']}; expected a CLIPModel, with texts")
        try:
            return cls(model.module, AutoTokenizer.from_pretrained(name))
        except Exception as error:  # as of weights
            raise ValueError(
                f"{key}={name}: no tokenizer ({_first_line(error)}); put the model's own beside it"
            ) from None

    @torch.no_grad()
    def features(self, texts: Sequence[str]) -> Tensor:
        """Return f32 [N, D] on the CPU of one batch of texts, each cut to what the model takes (77 tokens)."""
        most = self.module.text_model.config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        given = {key: tokens[key].to(self.module.device) for key in ("input_ids", "attention_mask")}
        return self.module.text_projection(self.module.text_model(**given).pooler_output).float().cpu()


def clip_scores(pictures: Tensor, texts: Tensor) -> np.ndarray:
    """Return f64 [N]: 100 · max(cosine, 0) of each picture's and its text's features.

    Hessel et al. 2021 without their factor w = 2.5, which is how tables of generated pictures state it.
    """
    cosines = torch.nn.functional.cosine_similarity(pictures.double(), texts.double())
    return 100 * cosines.clamp(min=0).numpy()


def weights_hash(module: torch.nn.Module) -> str:
    """Return a hash of a model's parameters and their names."""
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _kind(name: str, key: str) -> str:
    from transformers import PretrainedConfig

    try:
        return str(PretrainedConfig.get_config_dict(name)[0].get("model_type", "not given"))
    except (OSError, *OTHER_FORM) as error:
        raise ValueError(
            f"{key}={name}: no model there ({_first_line(error)}); give a folder with config.json, or a hub id"
        ) from None


def _read(model_class: Any, name: str, device: torch.device, key: str) -> Any:
    """Load weights in float32; raise ValueError unless they are safetensors and all there (P11)."""
    try:
        module, found = model_class.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # the libraries' errors for half a file share no class
        raise ValueError(f"{key}={name}: no readable weights in safetensors ({_first_line(error)})") from None
    if found["missing_keys"]:
        raise ValueError(
            f"{key}={name}: weights are missing, such as {sorted(found['missing_keys'])[0]}; fetch it again"
        )
    return module.to(device).eval()


def _size(value: Any, square: bool) -> int | tuple[int, int]:
    """Return a size of a config: of the shorter side, or (height, width); refuse what no model has."""
    names = ("shortest_edge",) if not isinstance(value, int) and "shortest_edge" in value else ("height", "width")
    sides = (value,) if isinstance(value, int) else tuple(int(value[name]) for name in names)
    if not all(0 < side <= MOST_SIDE for side in sides):
        raise ValueError(f"a size of {value}")
    if len(sides) == 2:
        return sides[0], sides[1]
    return (sides[0], sides[0]) if square and isinstance(value, int) else sides[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
