"""Features of many pictures by several vision models: what distances need of them, alike on every rank, and on disk."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from data.durable import write_durably
from data.strict_json import dumps
from train.distributed.ranks import Ranks
from train.evaluation.distances import BLOCKS, Moments, cmmd, frechet
from train.evaluation.scores import Score
from train.evaluation.vision import ClipText, VisionModel, clip_scores

Batch = tuple[Sequence[int], Sequence[np.ndarray]]  # sample numbers and their pictures uint8 [H, W, 3]


@dataclass
class Features:
    """Of all ranks' pictures."""

    moments: dict[str, Moments]  # by the model's name
    clip: Tensor | None  # f32 [N, D], in the order of the numbers; None: no CLIP model
    clip_scores: np.ndarray | None = None  # f64 [N]; None: without captions too

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        tensors = {f"{name}.{key}": x.cpu() for name, found in self.moments.items() for key, x in vars(found).items()}
        if self.clip is not None:
            tensors["clip"] = self.clip
        write_durably(path, save(tensors, {"settings": dumps(settings)}))

    @classmethod
    def read(cls, path: Path, settings: dict[str, Any], device: torch.device) -> "Features | None":
        """Return what `save` wrote with equal settings; None if there is no such file."""
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("settings") != dumps(settings):
                return None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        clip, moments = tensors.pop("clip", None), {}
        for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
            moments[name] = Moments(*(tensors[f"{name}.{key}"].to(device) for key in ("counts", "sums", "products")))
        return cls(moments, clip)


@dataclass
class FeatureModels:
    vision: dict[str, VisionModel]  # those whose features have a Fréchet distance
    clip: VisionModel | None
    text: ClipText | None
    device: torch.device

    @classmethod
    def load(cls, names: dict[str, str], clip: str | None, device: torch.device) -> "FeatureModels":
        """Load models by folder or hub id; raise ValueError for one that cannot be used."""
        vision = {name: VisionModel.load(path, device, f"generation.models.{name}") for name, path in names.items()}
        if clip is None:
            return cls(vision, None, None, device)
        of_clip = VisionModel.load(clip, device, "generation.clip")
        return cls(vision, of_clip, ClipText.of(of_clip, "generation.clip"), device)

    @property
    def described(self) -> dict[str, Any]:
        """Return each model's path, class and hash of weights."""
        clip = {} if self.clip is None else {"clip": self.clip.described}
        return {**{name: model.described for name, model in self.vision.items()}, **clip}

    def measure(
        self, batches: Iterable[Batch], captions: Sequence[str] | None, jackknife: bool, ranks: Ranks
    ) -> Features:
        """Return the features of all ranks' batches, each rank's of consecutive numbers, in rank order. Collective.

        With `captions`, by number, also CLIP scores. `jackknife`: moments by block, for intervals.
        """
        blocks = BLOCKS if jackknife else 1
        moments = {name: Moments.zeros(blocks, model.dim, self.device) for name, model in self.vision.items()}
        clip, scores = [torch.zeros(0, 0 if self.clip is None else self.clip.dim)], [np.zeros(0)]
        for numbers, pictures in batches:
            for name, model in self.vision.items():
                moments[name].add(numbers, _finite(model, pictures))
            if self.clip is not None and self.text is not None:
                clip.append(_finite(self.clip, pictures))
                if captions is not None:
                    scores.append(clip_scores(clip[-1], self.text.features([captions[number] for number in numbers])))
        for of_model in moments.values():
            of_model.sum_over(ranks)
        if self.clip is None:
            return Features(moments, None)
        gathered = ranks.gather((torch.cat(clip), np.concatenate(scores)))
        of_texts = None if captions is None else np.concatenate([part for _, part in gathered])
        return Features(moments, torch.cat([part for part, _ in gathered]), of_texts)

    def distances(self, drawn: Features, references: Features, ranks: Ranks) -> dict[str, Score]:
        """Return `frechet_NAME` of each model, and `cmmd`. Collective."""
        found = {f"frechet_{name}": frechet(drawn.moments[name], references.moments[name]) for name in self.vision}
        if drawn.clip is not None and references.clip is not None:
            found["cmmd"] = cmmd(drawn.clip.to(self.device), references.clip.to(self.device), ranks)
        return found


def _finite(model: VisionModel, pictures: Sequence[np.ndarray]) -> Tensor:
    """Return a batch's features; raise ValueError for numbers that no distance is made of."""
    features = model.features(pictures)
    if not features.isfinite().all():
        path = model.described["path"]
        raise ValueError(f"{path}: features of pictures are not finite; expected a sound model: fetch it again")
    return features
