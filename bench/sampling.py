"""Measure sampling: batches of several kinds beside their bare matrix products, and the cache beside none.

usage: python -m bench.sampling [--size 0.16b] [--layers 2] [--prefix 128] [--steps 3] [--device auto]

Cases of `--rows` rows: a full batch of pictures, with guidance and without; the last batch, which has one row; prompts
of very different lengths; text after one of the pictures; the same for text alone. `bound` is the time of the linear
layers' products alone, of as many tokens and the same precision, right after the case: so 1 - share is attention,
norms, sampling, Python and padding. `per_row` is a row's time over a full batch's (text after a picture: what the text
adds, over its time in the last batch), 1 where nothing is paid for rows that are short, done or absent.

With the cache a step runs the picture's tokens only, without it the whole prefix again (512 tokens); both draw the same
pictures, which are compared. All take turns; figures are medians, ratios those of the rounds. The last line is one JSON
object. The defaults take a minute and a half on two cores.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.attention import dense_mask
from model.diffusion import CLEAN, DiffusionConfig, ddim_step, to_x0_and_eps
from model.draws import SeededDraws
from model.sampler import Prompt, SpecialTokens, generate
from model.sampler_config import SamplerConfig
from model.schedule import BASE_NUMBERS, NoiseSchedule
from model.transformer import SIZES
from model.transfusion import Transfusion, TransfusionConfig, init_weights
from train.streams import open_streams

VOCAB, GRID = 32002, (32, 32)
SPECIAL = SpecialTokens(bos=1, eos=2, boi=3, eoi=4)


@torch.no_grad()
def draw_without_cache(model: Transfusion, prompts: list[Prompt], config: SamplerConfig) -> Tensor:
    """Return latents [R, C, h, w] from DDIM that runs every token of both branches in every step."""
    device, draws, diffusion = model.head_weight.device, SeededDraws(0), DiffusionConfig(prediction="v")
    shape = (model.config.latent_channels, *GRID)
    patches = GRID[0] * GRID[1] // model.config.patch_size**2
    rows = len(prompts)
    ids = torch.stack([torch.cat([torch.tensor([1]), *p.segments, torch.tensor([3])]) for p in prompts]).to(device)
    length = ids.shape[1] + patches
    free = torch.full_like(ids, 0)  # the unconditional branch `BOS BOI` and its picture, then padding
    free[:, 0], free[:, 1] = SPECIAL.bos, SPECIAL.boi
    starts = torch.tensor([ids.shape[1]] * rows + [2] * rows, device=device)
    index = torch.arange(length, device=device).expand(2 * rows, -1)
    is_picture = (index >= starts[:, None]) & (index < starts[:, None] + patches)
    documents = (index < starts[:, None] + patches).long()
    mask = dense_mask(documents, torch.where(is_picture, 0, -1), torch.full_like(documents, length))
    embedded = model.embed_text(torch.cat([ids, free]))
    blank = embedded.new_zeros(2 * rows, patches, embedded.shape[-1])
    embedded = torch.cat([embedded, blank], dim=1)
    grid = torch.full((2 * rows, length, 2), -1, device=device)
    x = torch.stack([draws.noise(p.index, 0, 0, shape) for p in prompts]).to(device)
    steps = NoiseSchedule.of(diffusion, BASE_NUMBERS).sampling_steps(config.steps, config.spacing)
    for (t, level), (_, cleaner) in zip(steps, [*steps[1:], (0, CLEAN)], strict=True):
        at = torch.full((2 * rows,), t, device=device)
        tokens, skips = model.embed_images(x.repeat(2, 1, 1, 1), at)
        h = embedded.masked_scatter(is_picture[..., None], tokens)
        hidden = model.trunk(h, index, grid, mask)[is_picture].view(tokens.shape)
        conditional, unconditional = model.predict_noise(hidden, skips, at, *GRID).float().chunk(2)
        pred = unconditional + config.guidance * (conditional - unconditional)
        x = ddim_step(*to_x0_and_eps(pred, x, level, diffusion), level, cleaner, 0.0, None)
    return x


def measure(model: Transfusion, rows: int, prefix: int, config: SamplerConfig, repeats: int) -> dict:
    """Draw `rows` pictures both ways in turn; return the medians' ratio and the pictures' largest difference."""
    generator = torch.Generator().manual_seed(0)
    caption = prefix - 2  # BOS and BOI belong to the prefix
    prompts = [Prompt([torch.randint(5, VOCAB, (caption,), generator=generator)], True, i) for i in range(rows)]

    def cached() -> Tensor:
        results = generate(model, prompts, config, DiffusionConfig(prediction="v"), SPECIAL, GRID, SeededDraws(0))
        return torch.stack([parts[0] for parts in results])

    def uncached() -> Tensor:
        return draw_without_cache(model, prompts, config).cpu()

    seconds: dict[str, list[float]] = {"cached": [], "uncached": []}
    pictures = {}
    for number in range(1, repeats + 1):
        for name, draw in (("cached", cached), ("uncached", uncached)):
            start = time.perf_counter()
            pictures[name] = draw()
            seconds[name].append(time.perf_counter() - start)
            print(f"{rows} rows {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
        left = sum(map(sum, seconds.values())) / number * (repeats - number)
        print(f"{rows} rows: {datetime.timedelta(seconds=round(left))} left", file=sys.stderr, flush=True)
    medians = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    difference = (pictures["cached"] - pictures["uncached"]).abs().max().item()
    return {
        "speedup": medians["uncached"] / medians["cached"],
        "images_per_s": rows / medians["cached"],
        "largest_difference": difference,
    }


@dataclass(frozen=True)
class Case:
    """A batch to sample: prompts of `lengths` tokens, BOS included."""

    lengths: tuple[int, ...]
    draw: bool  # one picture a row; else text alone
    tokens: int = 0  # of text: of each row; after a picture of the first row alone
    guidance: float = 3.0
    batch: int = 0  # rows of a full batch; 0: these

    def config(self, steps: int, patches: int) -> SamplerConfig:
        room = max(self.lengths) + 1 + patches if self.draw and self.tokens else None  # none after the longest rows
        return SamplerConfig(
            sampler="ddim",
            spacing="trailing",
            steps=steps,
            guidance=self.guidance if self.draw else 1.0,
            max_new_tokens=self.tokens,
            max_images=int(self.draw),
            max_length=room,
        )

    def prompts(self) -> list[Prompt]:
        generator = torch.Generator().manual_seed(0)
        return [
            Prompt([torch.randint(5, VOCAB, (length - 1,), generator=generator)], self.draw, index)
            for index, length in enumerate(self.lengths)
        ]

    def forwards(self, steps: int, patches: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (number of forwards, tokens in each, whether the text head follows) of what the batch must compute."""
        rows = len(self.lengths)
        yield 1, sum(self.lengths) + rows * self.draw, False
        if self.draw:
            yield steps, rows * patches * (1 if self.guidance == 1 else 2), False
        if self.draw and self.tokens:
            yield 1, patches + 1, False
        if self.tokens:
            yield self.tokens, 1 if self.draw else rows, True


def make_cases(rows: int, prefix: int, tokens: int, patches: int) -> dict[str, Case]:
    """Return the cases by name; the last batches have one row, mixed prompts `prefix` tokens on average."""
    equal, mixed = (prefix,) * rows, tuple(max(8, 2 * prefix * (row + 1) // (rows + 1)) for row in range(rows))
    after = (prefix - tokens - 1, *equal[1:])  # EOI and `tokens` fit behind the first row's picture alone
    return {
        "pictures": Case(equal, True),
        "pictures, no guidance": Case(equal, True, guidance=1.0),
        "pictures, last batch": Case(equal[:1], True, batch=rows),
        "pictures, mixed prompts": Case(mixed, True),
        "pictures, text after one": Case(after, True, tokens),
        "text": Case(equal, False, tokens),
        "text, last batch": Case(equal[:1], False, tokens, batch=rows),
        "text, mixed prompts": Case(mixed, False, tokens),
    }


@torch.no_grad()
def products_seconds(model: Transfusion, tokens: int, head: bool) -> float:
    """Return the time of the blocks' linear layers, and of the text head, on `tokens` rows and nothing else."""
    layers: list[nn.Linear] = []
    for block in model.transformer.blocks:
        layers += [block.attention.qkv, block.attention.out, block.ffn.gate_up, block.ffn.down]  # type: ignore[union-attr,list-item]  # Block
    weight = model.head_weight
    inputs = {layer.in_features: torch.randn(tokens, layer.in_features).to(weight) for layer in layers}
    _wait(weight)
    start = time.perf_counter()
    for layer in layers:
        layer(inputs[layer.in_features])
    if head:
        model.text_logits(inputs[weight.shape[1]])
    _wait(weight)
    return time.perf_counter() - start


def measure_cases(model: Transfusion, cases: dict[str, Case], steps: int, rounds: int) -> dict[str, dict]:
    """Run the cases in turn, each beside its products; return what the module's docstring names."""
    patches = GRID[0] * GRID[1] // model.config.patch_size**2
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    bounds: dict[str, list[float]] = {name: [] for name in cases}
    counts: dict[str, int] = {}
    for number in range(rounds + 1):  # the first warms up
        for name, case in cases.items():
            config = case.config(steps, patches)
            generate_all = _generator(model, case, config)
            _wait(model.head_weight)
            start = time.perf_counter()
            results = generate_all()
            spent = time.perf_counter() - start  # the results are on the host
            counts[name] = sum(len(part) for parts in results for part in parts if part.ndim == 1)
            bound = sum(
                count * min(products_seconds(model, tokens, head) for _ in range(3))
                for count, tokens, head in case.forwards(steps, patches)
            )
            if number:
                seconds[name].append(spent)
                bounds[name].append(bound)
            print(f"{number}/{rounds} {name}: {spent:.2f} s, products {bound:.2f} s", file=sys.stderr, flush=True)
    return {name: _summary(name, cases, seconds, bounds, counts[name]) for name in cases}


def _generator(model: Transfusion, case: Case, config: SamplerConfig) -> Callable[[], list[list[Tensor]]]:
    endless = dataclasses.replace(SPECIAL, never=(SPECIAL.eos,))
    fixed = DiffusionConfig(prediction="v"), endless, GRID, SeededDraws(0)
    return lambda: generate(model, case.prompts(), config, *fixed, batch=case.batch or None)


def _summary(
    name: str, cases: dict[str, Case], seconds: dict[str, list[float]], bounds: dict[str, list[float]], tokens: int
) -> dict:
    case, kind = cases[name], name.split(",")[0]
    rows, full_rows = len(case.lengths), len(cases[kind].lengths)
    shares = [bound / spent for bound, spent in zip(bounds[name], seconds[name], strict=True)]
    if case.draw and case.tokens:
        added = [spent - full for spent, full in zip(seconds[name], seconds[kind], strict=True)]
        alone = seconds["text, last batch"]
        per_row = [extra / one for extra, one in zip(added, alone, strict=True)]
    else:
        pairs = zip(seconds[name], seconds[kind], strict=True)
        per_row = [spent / rows / (full / full_rows) for spent, full in pairs]
    record = {"seconds": round(_median(seconds[name]), 3), "bound_s": round(_median(bounds[name]), 3)}
    if case.draw:
        record["pictures_per_s"] = round(rows / _median(seconds[name]), 3)
    if tokens:
        record |= {"tokens": tokens, "tokens_per_s": round(tokens / _median(seconds[name]), 1)}
    return record | {"share_of_bound": round(_median(shares), 3), "per_row": round(_median(per_row), 2)}


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.16b", help="whose blocks (0.16b)")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the measured stack (2)")
    parser.add_argument("--patches", choices=("linear", "unet"), default="linear", help="patcher (linear)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a full batch (8)")
    parser.add_argument("--prefix", type=int, default=128, help="tokens of a prompt, on average (128)")
    parser.add_argument("--tokens", type=int, default=32, help="text tokens sampled per row, below --prefix (32)")
    parser.add_argument("--steps", type=int, default=3, help="denoising steps (3)")
    parser.add_argument("--batches", type=int, nargs="+", default=[4], help="pictures drawn with and without cache (4)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each; the median counts (3)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA if there is any")
    options = parser.parse_args()
    name = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and name != "cuda":
        print("bench.sampling: --device cuda, but there is no CUDA GPU; --device cpu runs here", file=sys.stderr)
        return 2
    trunk = dataclasses.replace(SIZES[options.size], layers=options.layers)
    model = Transfusion(TransfusionConfig(transformer=trunk, patches=options.patches), VOCAB).eval()
    init_weights(model, 0)
    model.head_weight.data.mul_(8)  # a few likely tokens, as a trained model has
    model.to(name, torch.bfloat16 if name == "cuda" else torch.float32)
    patches = GRID[0] * GRID[1] // model.config.patch_size**2
    cases = make_cases(options.rows, options.prefix, options.tokens, patches)
    machine = torch.cuda.get_device_name() if name == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    record = {"bench": "sampling", **vars(options), "device": machine, "torch": torch.__version__}
    record["cases"] = measure_cases(model, cases, options.steps, options.repeats)
    config = SamplerConfig(sampler="ddim", steps=options.steps, max_new_tokens=0, spacing="trailing", prefill_chunk=512)
    drawn = {rows: measure(model, rows, 512, config, options.repeats) for rows in options.batches}
    record["cached_speedup"] = round(drawn[max(drawn)]["speedup"], 2)
    record["largest_difference"] = max(result["largest_difference"] for result in drawn.values())
    for name, case in record["cases"].items():
        print(f"{name:26}", "  ".join(f"{key} {value}" for key, value in case.items()))
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    open_streams()
    sys.exit(main())
