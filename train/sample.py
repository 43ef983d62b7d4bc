"""Draw pictures from prompts, edit, describe and ask about pictures, or continue prompts as the model chooses.

A prompt is a caption to draw, or with edit=FILE an instruction for that picture. `<image>` in it stands for the next of
`images`; images that no prompt uses are described, or with ask="..." asked about. With interleaved=true the model
chooses what follows a prompt, text or pictures. Writes to `output` one JSON line per sample (results.jsonl), its
pictures (NNNN-0.png, ...) and text (NNNN.txt), and a contact sheet (sheet.png). Under torchrun the ranks divide the
samples.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.conversations import IMAGE
from data.durable import atomic_write
from data.pictures import contact_sheet, decode_picture, encode_png
from data.storage import Location
from data.strict_json import dumps
from model.sampler_config import one_picture, text_alone
from train.config import load_config, run_program
from train.distributed.agreement import facts_of
from train.distributed.ranks import Ranks, init_ranks
from train.distributed.shared_folder import require_shared
from train.inference.pipeline import BAR_FORMAT, Pipeline, PipelineConfig, Progress
from train.inference.prompts import Part, require_captions, require_instruction, require_question
from train.output_folder import make_writable

# Not part of a sample's `settings`.
ASKED = ("prompt", "prompts", "prompts_file", "images", "edit", "ask", "n", "output", "seed")
NAMES = r"results\.jsonl|sheet\.png|\d{4,}(-\d+\.png|\.txt)"
OURS = re.compile(rf"({NAMES})|({NAMES})\.tmp-.*")  # files of an earlier call, also those that a kill cut short
SHEET_PICTURES = 200  # at most, so that viewers can open the sheet


@dataclass(frozen=True, kw_only=True)
class SampleConfig(PipelineConfig):
    output: Location = "runs/samples"  # folder to write
    prompt: str | None = None  # a caption to draw; <image> in it stands for the next of `images`
    prompts: list[str] = field(default_factory=list)  # more captions
    prompts_file: Location | None = None  # text file of more captions, one per line
    images: list[Location] = field(default_factory=list)  # picture files for <image> in prompts; others are described
    # Pictures to edit: all of them come before each prompt, which says what to make of them.
    edit: list[Location] = field(default_factory=list)
    # A question about each of `images` that no prompt uses, in the chat form of the tokenizer's model (docs/data.md);
    # without images it is asked alone. null: those images are described.
    ask: str | None = None
    n: int = 1  # samples per prompt or picture, >= 1
    interleaved: bool = False  # true: the model chooses what follows, up to max_new_tokens and max_images
    size: tuple[int, int] | None = None  # [height, width] of drawn pictures in pixels; null: the training data's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1:
            raise ValueError(f"n={self.n}: expected at least 1")
        if not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"prompts={self.prompts}: expected texts; put those with ': ' in prompts_file=FILE")


CONFIG = SampleConfig
GROUP = True  # its ranks form a process group
# May differ between ranks; the contents are compared instead.
OWN = ("checkpoint", "prompts_file", "images", "edit", "output", "device", "vae", "tokenizer", "guide")


@dataclass(frozen=True)
class Request:
    """One sample to make."""

    prompt: str | None  # None: describe the picture, or answer
    images: tuple[str, ...]  # picture files for its <image>s
    edit: tuple[str, ...] = ()  # picture files before it
    ask: str | None = None  # a question about the picture

    def parts(self, pictures: dict[str, np.ndarray], pipeline: Pipeline) -> list[Part]:
        """Return what is given, text and pictures in order."""
        if self.ask is not None:
            return pipeline.ask([pictures[name] for name in self.images], self.ask)
        texts, images = (IMAGE if self.prompt is None else self.prompt).split(IMAGE), iter(self.images)
        parts: list[Part] = [*[pictures[name] for name in self.edit], texts[0]]
        for text in texts[1:]:
            parts += [pictures[next(images)], text]
        return [part for part in parts if not isinstance(part, str) or part.strip()]

    def show(self, pictures: dict[str, np.ndarray], made: list[Part]) -> list[tuple[np.ndarray, str]]:
        """Return pictures and titles for the contact sheet: the new ones, and those that were edited or described."""
        text = " ".join(part for part in made if isinstance(part, str))
        drawn = [part for part in made if isinstance(part, np.ndarray)]
        given = self.edit or (() if drawn else self.images[:1])
        title = "given" if self.edit else f"given: {text}" if self.ask is None else f"{self.ask} {text}"
        new = f"{self.prompt or ''} {text}".strip()
        return [*[(pictures[name], title) for name in given], *[(picture, new) for picture in drawn]]


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    requests = [request for request in _requests(config) for _ in range(config.n)]
    asked = [(each.prompt, len(each.images), len(each.edit)) for each in requests]
    facts = {**facts_of(config, OWN), "prompts": str(asked)}
    ranks = init_ranks(timeout_s=1800, device=config.device, facts=facts)
    pipeline = Pipeline.load(config, ranks).sized(config.size)
    assert pipeline.saved is not None
    guide = pipeline.describe_guide()
    step, given = pipeline.saved.step, dict.fromkeys((*config.images, *config.edit))
    pictures = {name: _read_picture(Path(name), pipeline.latent_spec.resolution) for name in given}
    output = Path(config.output)
    ranks.require_alike({"images (contents)": str([zlib.crc32(picture.tobytes()) for picture in pictures.values()])})
    ranks.on_first(lambda: _clear(output))
    require_shared(output, "output", ranks)
    mine = range(ranks.rank, len(requests), ranks.world_size)
    in_force = config.suited_to(pipeline.config.diffusion)
    settings = {f.name: getattr(in_force, f.name) for f in fields(SampleConfig) if f.name not in ASKED}
    lines: list[dict[str, Any]] = []
    shown: list[tuple[int, np.ndarray, str]] = []  # sample number, picture and title for the contact sheet
    with tqdm(desc="sample", total=len(mine), bar_format=BAR_FORMAT, disable=not ranks.is_first) as bar:
        for number, parts in _sample(pipeline, config, requests, pictures, mine, bar.update):
            request = requests[number]
            line = {"index": number, **asdict(request)}
            made = {"output": _write_sample(output, number, parts), "seed": config.seed, "step": step, "guide": guide}
            lines.append({**line, **made, "settings": settings})
            shown += [(number, *each) for each in request.show(pictures, parts)]
    beside = 1 + len(config.edit)  # of the contact sheet's pictures: what was given and what became of it
    _finish(output, lines, shown, beside * max(1, 5 // beside), step, ranks)
    ranks.close()
    return 0


def _clear(output: Path) -> None:
    """Create the folder, and remove the results of an earlier call; raise ValueError for a folder of something else."""
    paths = list(make_writable(output).iterdir())
    ours = [path for path in paths if OURS.fullmatch(path.name)]
    foreign = sorted(path.name for path in paths if path not in ours)
    if foreign and not (output / "results.jsonl").exists():
        raise ValueError(
            f"output={output}: holds {foreign[0]}, which train.sample did not write; choose another folder or remove it"
        )
    for path in ours:
        path.unlink()


def _requests(config: SampleConfig) -> list[Request]:
    """Pair prompts with images; raise ValueError for a prompt without enough images, or if there is nothing to do."""
    prompts = ([config.prompt] if config.prompt is not None else []) + list(config.prompts)
    if config.prompts_file is not None:
        try:
            text = Path(config.prompts_file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompts_file={config.prompts_file}: not a readable UTF-8 text file ({error})") from None
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if config.edit and not prompts:
        raise ValueError(f'edit={config.edit}: nothing says what to make of it; give prompt="..."')
    if not prompts and not config.images and config.ask is None:
        raise ValueError('nothing to do: give prompt="...", prompts_file=FILE, images=[FILE,...] or ask="..."')
    if config.ask is not None:
        require_question("ask", config.ask)
    require_captions("prompt", [[prompt] for prompt in prompts])
    left, requests = list(config.images), []
    for prompt in prompts:
        if config.edit:
            require_instruction("prompt", prompt.replace(IMAGE, " "), len(config.edit), "edit")
        wanted = prompt.count(IMAGE)
        if wanted > len(left):
            raise ValueError(
                f"prompt={prompt!r} asks for {wanted} images, {len(left)} of {len(config.images)} are left; expected "
                "one file in images=[...] for each <image>"
            )
        requests.append(Request(prompt, tuple(left[:wanted]), tuple(config.edit)))
        del left[:wanted]
    rest = [()] if config.ask is not None and not config.images else [(name,) for name in left]
    if config.ask is not None and not rest:
        raise ValueError(f"ask={config.ask!r}: the prompts use all of images={config.images}; expected one more")
    return requests + [Request(None, names, ask=config.ask) for names in rest]


def _sample(
    pipeline: Pipeline,
    config: SampleConfig,
    requests: list[Request],
    pictures: dict[str, np.ndarray],
    numbers: range,
    progress: Progress,
) -> Iterator[tuple[int, list[Part]]]:
    """Yield (number, result) of each of this rank's requests."""
    drawn = [number for number in numbers if requests[number].prompt is not None]
    described = [number for number in numbers if requests[number].prompt is None]
    jobs = [(drawn, one_picture(config), True), (described, text_alone(config), False)]
    if config.interleaved:
        jobs = [(list(numbers), config, False)]
    for chosen, settings, draw in jobs:
        if not chosen:
            continue
        prompts = [requests[number].parts(pictures, pipeline) for number in chosen]
        yield from zip(chosen, pipeline.complete(prompts, settings, config.seed, progress, chosen, draw), strict=True)


def _write_sample(output: Path, number: int, parts: list[Part]) -> list[dict[str, str]]:
    """Write a sample's pictures and text; return its parts as in results.jsonl."""
    written: list[dict[str, str]] = []
    for part in parts:
        if isinstance(part, str):
            written.append({"text": part})
            continue
        name = f"{number:04d}-{sum('image' in other for other in written)}.png"
        with atomic_write(output / name) as file:
            file.write(encode_png(part))
        written.append({"image": name})
    if any("text" in part for part in written):
        with atomic_write(output / f"{number:04d}.txt") as file:
            file.write("\n".join(part["text"] if "text" in part else f"[{part['image']}]" for part in written).encode())
    return written


def _finish(
    output: Path,
    lines: list[dict[str, Any]],
    shown: list[tuple[int, np.ndarray, str]],
    columns: int,
    step: int,
    ranks: Ranks,
) -> None:
    """Write results.jsonl and the contact sheet of all ranks' samples, on rank 0. Collective."""
    lines = sorted((line for part in ranks.gather(lines) for line in part), key=lambda line: line["index"])
    shown = sorted((item for part in ranks.gather(shown[:SHEET_PICTURES]) for item in part), key=lambda item: item[0])
    if not ranks.is_first:
        return
    with atomic_write(output / "results.jsonl") as file:
        file.write("".join(dumps(line) + "\n" for line in lines).encode())
    for line in lines:
        texts = [part["text"] for part in line["output"] if "text" in part]
        if texts:
            asked = [text for text in (line["prompt"], line["ask"]) if text]
            what = ", ".join([*asked, *line["images"], *line["edit"]])
            print(f"{line['index']:04d} {what}: {dumps(' ... '.join(texts), ensure_ascii=False)}")  # no escapes
    where = ""
    if shown:
        _, pictures, titles = zip(*shown[:SHEET_PICTURES], strict=True)
        with atomic_write(output / "sheet.png") as file:
            contact_sheet(pictures, titles, columns).save(file, "PNG")
        where = f", contact sheet {output / 'sheet.png'}"
    print(f"sample: {len(lines)} results of step {step} in {output}{where}")


def _read_picture(path: Path, resolution: int) -> np.ndarray:
    """Return the picture as uint8 [resolution, resolution, 3]; raise ValueError where there is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); expected a .jpg, .png or .webp") from None
    return decode_picture(data, [(resolution, resolution)], str(path))


if __name__ == "__main__":
    run_program(main)
