"""The slow reference of a step: document by document, masks by a double loop, plain sums; and a small model."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data.documents import Document, ImageSegment, TextSegment
from data.layout import lay_out
from data.packing import ImageDraws, collate, pack
from data.tokenizer import SpecialIds
from model.diffusion import DiffusionConfig
from model.latent_space import LatentStats
from model.transformer import TransformerConfig
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from tests.untied_trunk import untied_trunk
from train.step import micro_step

SPECIAL = SpecialIds(bos=1, eos=2, boi=3, eoi=4, pad=0)
VOCAB, SEED = 300, 5
MODEL = TransfusionConfig(
    transformer=TransformerConfig(width=32, layers=2, heads=2, ffn_multiple_of=16, rope_2d=True),
    patch_size=2,
    latent_channels=2,
    text_loss_chunk=5,
)
STATS = LatentStats(torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.5]))
IMAGE_WEIGHT = 5.0


@dataclass
class Picture:
    """An image of a document, with its random numbers."""

    moments: torch.Tensor  # [2C, h, w]
    u: float
    noise: torch.Tensor  # [C, h, w]
    posterior_noise: torch.Tensor | None
    before_caption: bool


# A document of the reference is a list of token ids, pictures standing where they are, and what follows its last
# token if that is a target although the document was cut there.
Items = list[int | Picture]


def reference(
    model: Transfusion, documents: list[tuple[Items, int | None]], cap: int
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Return (text nll sum, image error sum, text targets, images), one document at a time and nothing packed."""
    text_sum, image_sum, targets, images = torch.zeros(()), torch.zeros(()), 0, 0
    whole_images = model.config.image_attention == "bidirectional"
    for items, cut_before in documents:
        embedded, owner, grid, tokens, noised = [], [], [], [], []
        for item in items:
            if not isinstance(item, Picture):
                embedded.append(model.embed_text(torch.tensor([item])))
                owner.append(None)
                grid.append((-1, -1))
                tokens.append(item)
                continue
            mean, logvar = item.moments.float().chunk(2)
            latents = mean + torch.exp(logvar / 2) * item.posterior_noise
            latents = (latents - STATS.mean[:, None, None]) / STATS.std[:, None, None]
            t = math.floor(item.u * (cap + 1 if item.before_caption else 1000))
            alpha = _alpha_bar(t)
            x_t = math.sqrt(alpha) * latents + math.sqrt(1 - alpha) * item.noise
            (encoded,), skips = model.embed_images(x_t[None], torch.tensor([t]))
            noised.append((item, t, len(tokens), len(encoded), skips))
            embedded.append(encoded)
            owner += [len(noised)] * len(encoded)
            grid += [(i // (x_t.shape[2] // 2), i % (x_t.shape[2] // 2)) for i in range(len(encoded))]
            tokens += [None] * len(encoded)
        length = len(tokens)
        mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
        for q in range(length):
            for k in range(length):
                mask[0, 0, q, k] = k <= q or (whole_images and owner[q] is not None and owner[q] == owner[k])
        positions = torch.arange(length)[None]
        h, grids = torch.cat(embedded)[None], torch.tensor(grid)[None]
        if model.config.untied == "none":
            hidden = model.trunk(h, positions, grids, mask)[0]
        else:
            is_image = torch.tensor([[number is not None for number in owner]])
            hidden = untied_trunk(model, h, positions, grids, mask, is_image)[0]
        for i, token in enumerate(tokens):
            following = tokens[i + 1] if i + 1 < length else cut_before
            if token is None or following is None:
                continue  # a patch, so EOI is no target; BOI and patches, before patches (footnote 8); the end
            text_sum = text_sum - F.log_softmax(model.text_logits(hidden[i]), dim=-1)[following]
            targets += 1
        for picture, t, first, count, skips in noised:
            h, w = picture.noise.shape[1:]
            pred = model.predict_noise(hidden[None, first : first + count], skips, torch.tensor([t]), h, w)[0]
            image_sum = image_sum + ((pred - picture.noise) ** 2).mean()
            images += 1
    return text_sum, image_sum, targets, images


def _alpha_bar(t: int) -> float:
    """Nichol & Dhariwal's cosine schedule as a product of clipped steps, the slow way."""

    def f(s: float) -> float:
        return math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    return math.prod(1 - min(1 - f(s + 1) / f(s), 0.999) for s in range(t + 1))


def plain_model(**changes: Any) -> Transfusion:
    model = Transfusion(replace(MODEL, **changes), VOCAB)
    init_weights(model, SEED)
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every tensor within 1e-5 of the norm of its expectation."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.norm() > 0, f"{name} is not trained at all: the comparison would be empty"
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error <= 1e-5, f"{name}: {error:.2e}"


def reference_step(
    documents: list[tuple[Items, int | None]], **changes: Any
) -> tuple[float, float, int, int, dict[str, torch.Tensor]]:
    """Return the two mean losses, their counts and the gradients of LM + 5 DDPM."""
    model = plain_model(**changes)
    text, image, targets, images = reference(model, documents, cap=500)
    text, image = text / targets, image / images
    (text + IMAGE_WEIGHT * image).backward()
    return text.item(), image.item(), targets, images, gradients(model)


def handmade() -> tuple[list[Document], list[list[Picture]]]:
    """Documents and their pictures: text, caption first, image first, image alone, two images of two grids between
    texts, almost nothing."""
    rng = np.random.default_rng(3)

    def text(length: int) -> TextSegment:
        return TextSegment(rng.integers(5, VOCAB, length))

    def image(h: int, w: int, before: bool = False) -> ImageSegment:
        return ImageSegment(rng.normal(size=(4, h, w)).astype(np.float16), before_caption=before)

    documents = [
        Document((text(9),)),
        Document((text(5), image(4, 4))),
        Document((image(4, 8, before=True), text(3))),
        Document((image(2, 2),)),
        Document((text(2), image(4, 4), text(4), image(2, 6), image(4, 4), text(1))),
        Document((text(1),)),
    ]
    generator = torch.Generator().manual_seed(1)
    return documents, [drawn_pictures(document, generator) for document in documents]


def drawn_pictures(document: Document, generator: torch.Generator, u: float | None = None) -> list[Picture]:
    pictures = []
    for segment in document.segments:
        if isinstance(segment, ImageSegment):
            shape = (2, *segment.grid)
            noise, posterior = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
            drawn = torch.rand((), generator=generator).item() if u is None else u
            pictures.append(Picture(torch.tensor(segment.array), drawn, noise, posterior, segment.before_caption))
    return pictures


def items_of(document: Document, pictures: list[Picture]) -> Items:
    remaining, items = iter(pictures), [SPECIAL.bos]
    for segment in document.segments:
        text = isinstance(segment, TextSegment)
        items += segment.token_ids.tolist() if text else [SPECIAL.boi, next(remaining), SPECIAL.eoi]
    return [*items, SPECIAL.eos]


def batch_of(documents: list[Document], pictures: list[list[Picture]], rows: list[list[int]], length: int) -> Any:
    """Pack the documents with these numbers into rows."""
    packed = [pack([lay_out(documents[i], SPECIAL, 2) for i in row], length, SPECIAL.pad) for row in rows]
    draws = []
    for row in rows:
        flat = [picture for i in row for picture in pictures[i]]
        u = torch.tensor([picture.u for picture in flat])
        draws.append(ImageDraws(u, [p.noise for p in flat], [p.posterior_noise for p in flat]))
    return collate(packed, draws, 2)


def step_on(model: Transfusion, batch: Any, diffusion: DiffusionConfig | None = None, **changes: Any) -> Any:
    settings = {
        "stats": STATS,
        "diffusion": diffusion or DiffusionConfig(),
        "image_weight": IMAGE_WEIGHT,
        "global_text_targets": batch.num_text_targets,
        "global_images": batch.num_images,
    }
    return micro_step(model, batch, **{**settings, **changes})
