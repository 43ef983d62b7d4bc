"""Show what an encoded data set holds before a model is trained on it, or what a run has saved since.

Prints a summary and writes `output`/index.html, one self-contained page. With `shards`: histograms, a card a document,
and `output`/sheet.png, the pictures with their captions. A quick look needs `shards` alone: latents are then shown in
false colours, and captions are those in the records' json. With `checkpoint`: the run's checkpoints, verified, and
what is in the one that a resume takes; no GPU is needed, and memory for the largest tensor alone. Exit status 1 if any
checkpoint is damaged.
"""

import json
import math
import shlex
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.durable import atomic_write
from data.manifest import LatentSums
from data.pictures import contact_sheet
from data.remote import shown
from data.shards import BadRecords
from data.storage import Location
from train.config import load_config, run_program
from train.output_folder import make_writable
from train.pages.charts import ACCENT, LINE, SOFT, figure, label
from train.pages.checkpoint_page import view_checkpoints
from train.pages.dataset_summary import LATENT_RANGE, Counts, EncodedData, ShownDocument, bins, quantiles
from train.pages.page import Table, View, card, cards, document, image, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_DOCUMENTS = 1000  # shown, so that the page can be opened
SHEET_PICTURES = 200  # at most, so that the sheet can be
GRIDS, SHARDS = 20, 50  # listed, the largest
QUANTILES = {"shortest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "longest": 1.0}


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    shards: Location | None = None  # folder of train.encode or its URL, or one shard in it (FOLDER/00012.tar)
    checkpoint: Location | None = None  # instead of shards: a run folder, a folder of checkpoints, or one checkpoint
    verify: bool = True  # read every byte of the checkpoints against their checksums; false: trust them
    json: bool = False  # print one JSON object instead of text
    vae: Location | None = None  # AutoencoderKL that encoded the pictures; null: latents in false colours
    tokenizer: Location | None = None  # SentencePiece model of the token ids; null: captions from the records' json
    n: int = 32  # documents shown, 1 to 1000
    seed: int = 0  # of the choice of documents
    patch_size: int = 2  # latent cells a side of an image token, as in the model to be trained; 1 or more
    sequence_length: int = 4096  # tokens of a training sequence: longer documents are counted; 1 or more
    output: Location = "runs/view"  # folder to write index.html and sheet.png into

    def __post_init__(self) -> None:
        if (self.shards is None) == (self.checkpoint is None):
            raise ValueError(
                f"shards={self.shards}, checkpoint={self.checkpoint}: expected exactly one of them; give shards=FOLDER "
                "to look at data, or checkpoint=RUN to look at what training saved"
            )
        if not 1 <= self.n <= MOST_DOCUMENTS:
            raise ValueError(f"n={self.n}: expected 1 to {MOST_DOCUMENTS}, so that the page can be opened")
        for name in ("patch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")


CONFIG = ViewConfig


def main(argv: list[str]) -> int | None:
    config = load_config(CONFIG, argv)
    if config.checkpoint is not None:
        view = view_checkpoints(Path(config.checkpoint), config.verify)
    else:
        view = view_data(EncodedData.open(config.shards, config.patch_size, config.tokenizer, config.vae), config)
    output = make_writable(Path(config.output))
    write(view, output, shown(shlex.join(["python", "-m", "train.view", *argv])))
    if config.json:
        print(json.dumps({"facts": view.facts, "remarks": view.remarks, **view.record}))
    else:
        show(view, output)
    return int(view.damaged)


def write(view: View, output: Path, command: str) -> None:
    """Write the page and the sheet."""
    remarks = ("remarks", "Remarks", "".join(f"<p>{escape(remark)}</p>" for remark in view.remarks))
    sections = [*([remarks] if view.remarks else []), *view.sections]
    with atomic_write(output / "index.html") as file:
        file.write(document(view.title, view.facts | {"command": command}, sections).encode())
    sheet = output / "sheet.png"
    if view.sheet is None:
        sheet.unlink(missing_ok=True)  # an earlier call's would pass for this one's
    else:
        with atomic_write(sheet) as file:
            view.sheet.save(file, "PNG")


def show(view: View, output: Path) -> None:
    """Print what a terminal can show."""
    width = max(map(len, view.facts))
    for name, value in view.facts.items():
        print(f"{name:<{width}}  {value}")
    for remark in view.remarks:
        print(f"view: {remark}")
    for title, table in view.tables:
        print(f"\n{title}\n{table.text()}")
    sheet = f" and {output / 'sheet.png'}" if view.sheet is not None else ""
    print(f"view: wrote {output / 'index.html'}{sheet}")


def view_data(data: EncodedData, config: ViewConfig) -> View:
    """Count and look at a data set; raise ValueError where no index of it can be read."""
    bad = BadRecords(max_fraction=1.0)
    counts = data.count(config.sequence_length, bad)
    if not counts.documents:
        raise ValueError(
            f"shards={shown(config.shards)}: none of {len(data.manifest.shards)} indices can be read ({bad.names[0]}); "
            "restore them, or encode the data set again"
        )
    documents, latents = data.look(counts.shards, config.n, config.seed, bad)
    pictures = [(picture, text) for one in documents for picture, text in one.captioned() if picture.pixels is not None]
    sections = [("documents", "Documents", _documents(data, documents, config.seed))]
    sections.append(("lengths", "Lengths", _lengths(counts, config.sequence_length)))
    if data.manifest.latent_spec is not None and data.manifest.grids():
        sections.append(("sizes", "Picture sizes", _sizes(data)))
    if latents.cells:
        sections.append(("latents", "Latents", _latents(data, latents)))
    sections.append(("shards", "Shards", _shards(data)))
    sheet = None
    if pictures:
        prefix = "" if data.vae is not None else "latents: "
        chosen = pictures[:SHEET_PICTURES]
        sheet = contact_sheet([picture.pixels for picture, _ in chosen], [prefix + text for _, text in chosen], 8)
    facts = _facts(data, counts, bad, config.sequence_length)
    return View(f"Data set {shown(config.shards)}", facts, _remarks(data, counts, bad, len(pictures)), sections, sheet)


def _facts(data: EncodedData, counts: Counts, bad: BadRecords, sequence_length: int) -> dict[str, str]:
    """Return the summary. Totals are the manifest's, what needs every document's length is the indices'."""
    manifest, spec, entries = data.manifest, data.manifest.latent_spec, data.manifest.shards
    grids = sorted(_grids(data).items(), key=lambda item: -item[1])
    kinds = {"text alone": counts.images[0], "one picture": counts.images[1]}
    kinds["several pictures"] = counts.documents - sum(kinds.values())
    lengths = zip(QUANTILES, quantiles(counts.lengths, list(QUANTILES.values())), strict=True)
    facts = {
        "shards": f"{len(entries):,}",
        "documents": f"{manifest.records:,}",
        "kinds": ", ".join(f"{kind} {count:,}" for kind, count in kinds.items() if count),
        "pictures": ", ".join(f"{grid}: {count:,}" for grid, count in grids[:GRIDS]) or "none",
        "text tokens": f"{sum(entry.text_tokens for entry in entries):,}",
        "image tokens": f"{sum(entry.patches(data.patch_size) for entry in entries):,} (patch_size={data.patch_size})",
        "document tokens": ", ".join(f"{name} {length:,}" for name, length in lengths),
        f"longer than {sequence_length:,}": f"{counts.long:,} documents, {counts.long_with_images:,} with pictures",
        "size": f"{sum(entry.bytes for entry in entries) / 1e6:,.1f} MB",
        "tokenizer": f"{manifest.tokenizer_hash} ({manifest.vocab_size:,} ids)",
    }
    if spec is not None:
        facts["VAE"] = f"{spec.vae_hash} ({spec.channels} channels, stride {spec.stride}, {spec.resolution} pixels)"
        facts |= {f"latent {name}": " ".join(f"{v:.4g}" for v in getattr(spec, name)) for name in ("mean", "std")}
    return facts | {"missing or damaged": bad.summary()}


def _remarks(data: EncodedData, counts: Counts, bad: BadRecords, num_pictures: int) -> list[str]:
    """Say what is left out, and what stands in for what was not given."""
    remarks = []
    if data.vae is None and num_pictures:
        remarks.append(
            "No vae=FOLDER was given: pictures are latents in false colours, the first three channels' means, whitened "
            f"and clipped at ±{LATENT_RANGE:g}."
        )
    if data.tokenizer is None:
        remarks.append(
            "No tokenizer=MODEL was given: captions are those in the records' json, other texts show as the number of "
            "their tokens."
        )
    if not num_pictures:
        remarks.append("No pictures are among the documents shown, so there is no sheet.png.")
    elif num_pictures > SHEET_PICTURES:
        remarks.append(f"sheet.png shows the first {SHEET_PICTURES} of {num_pictures} pictures.")
    if missing := data.manifest.records - counts.documents:
        remarks.append(
            f"{missing:,} of {data.manifest.records:,} documents are in shards whose index cannot be read: lengths and "
            "kinds of documents are those of the others."
        )
    if bad.reasons:
        more = bad.reasons.total() - len(bad.names)
        named = [*bad.names, *([f"{more} more"] if more else [])]
        remarks += [f"Missing or damaged: {name}" for name in named]
    return remarks


def _documents(data: EncodedData, documents: list[ShownDocument], seed: int) -> str:
    """Return a card for each document: its pictures, text, and where it is."""
    items = []
    for one in documents:
        seen = [(picture, text) for picture, text in one.captioned() if picture.pixels is not None]
        width = 168 if len(seen) == 1 else 78  # CSS pixels of a card's inside, or half of them
        pictures = "".join(image(picture.pixels, text or "no caption", width) for picture, text in seen)
        grids = [f"{h}x{w}" for h, w in dict.fromkeys(picture.grid for picture in one.pictures)]
        facts = [one.key, one.shard, *grids, f"{one.num_tokens:,} tokens"]
        if len(seen) < len(one.pictures):
            facts.insert(2, f"{len(seen)} of {len(one.pictures)} pictures")
        items.append(card(f'<div class="row">{pictures}</div>', one.text, None, note(" · ".join(facts))))
    about = f"{len(documents):,} of {data.manifest.records:,} documents, spread over the data by seed {seed}."
    if data.vae is not None:
        about += " Pictures are decoded from the mean of their posterior."
    return note(about) + cards(items)


def _lengths(counts: Counts, sequence_length: int) -> str:
    """Return the histograms of tokens a document."""
    texts = Counter({tokens: documents for tokens, documents in counts.text_tokens.items() if tokens})
    figures = [histogram("tokens", "Length", "tokens a document", counts.lengths, (sequence_length, "sequence_length"))]
    if texts:
        unit = "text tokens a document"
        if without := counts.text_tokens[0]:
            unit += f"; {without:,} without text are left out"
        figures.append(histogram("text", "Text", unit, texts))
    return f'<div class="charts">{"".join(figures)}</div>'


def histogram(key: str, title: str, unit: str, tally: Counter, mark: tuple[int, str] | None = None) -> str:
    """Return a `<figure>` of how many documents have which value; `mark` is drawn where it lies among the values."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    edges, documents, is_log = bins(tally)

    def draw(axes: "Axes") -> None:
        axes.bar(edges[:-1] - 0.5, documents, np.diff(edges), align="edge", color=ACCENT)
        if mark is not None and edges[0] <= mark[0] < edges[-1]:
            middle = math.sqrt(edges[0] * edges[-1]) if is_log else (edges[0] + edges[-1]) / 2
            side, shift = ("left", 3) if mark[0] < middle else ("right", -3)
            axes.axvline(mark[0], color=SOFT, linewidth=1, linestyle="--")
            axes.annotate(mark[1], (mark[0], 1), (shift, -2), xycoords=("data", "axes fraction"), ha=side, va="top",
                          textcoords="offset points", fontsize=8, color=SOFT)  # fmt: skip
        if is_log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if edges[-1] < 200 * edges[0] else (1,)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(label))
        axes.set_ylim(0, documents.max() * 1.15)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(label))
        axes.set_ylabel("documents", color=SOFT)

    median, longest = quantiles(tally, [0.5, 1.0])
    said = f"{title}, {unit}: median {median:,}, most {longest:,}"
    return figure(key, title, unit + (", log scale" if is_log else ""), said, draw)


def _grids(data: EncodedData) -> Counter:
    """Return how many pictures there are of each latent grid."""
    return sum((Counter(entry.grids) for entry in data.manifest.shards), Counter())


def _sizes(data: EncodedData) -> str:
    """Return a bar for each latent grid: what sizes and aspects the pictures have."""
    stride, grids = data.manifest.latent_spec.stride, _grids(data).most_common()
    lines = ""
    for grid, count in grids[:GRIDS]:
        h, w = map(int, grid.split("x"))
        bar = f'<i style="width:{100 * count / grids[0][1]:.1f}%"></i>'
        cells = (grid, f"{h * stride}x{w * stride}", f"{w / h:.2f}", f"{count:,}", bar)
        lines += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    head = "<tr><th>grid</th><th>pixels</th><th>width / height</th><th>pictures</th><th></th></tr>"
    rest = f" The {GRIDS} most frequent of {len(grids):,}." if len(grids) > GRIDS else ""
    return note(f"Height x width, of latents and of pixels.{rest}") + f'<table class="bars">{head}{lines}</table>'


def _latents(data: EncodedData, latents: LatentSums) -> str:
    """Return the shown documents' latents against the manifest's statistics, by channel."""
    spec, mean, std = data.manifest.latent_spec, latents.mean, latents.std
    channels = np.arange(spec.channels)
    centres, spreads = (mean - spec.mean) / spec.std, std / np.array(spec.std)

    def draw(axes: "Axes") -> None:
        axes.axhspan(-1, 1, color=LINE, alpha=0.4, linewidth=0)
        axes.errorbar(channels, centres, spreads, fmt="o", markersize=4, linewidth=1.6, color=ACCENT)
        axes.set_xticks(channels[:: -(-len(channels) // 16)])
        axes.set_xlim(-0.7, len(channels) - 0.3)
        axes.set_xlabel("channel", color=SOFT)

    unit = "of the documents shown, whitened by the manifest: mean and deviation; the band is 0 ± 1"
    said = f"Whitened latents: means {centres.min():.2f} to {centres.max():.2f}, "
    said += f"deviations {spreads.min():.2f} to {spreads.max():.2f}"
    rows = zip(channels, spec.mean, mean, spec.std, std, strict=True)
    head = ["channel", "mean, manifest", "shown", "std, manifest", "shown"]
    table = Table(head, [[str(channel), *(f"{value:.4f}" for value in values)] for channel, *values in rows])
    return f'<div class="charts">{figure("latents", "Latents", unit, said, draw)}</div>{table.html()}'


def _shards(data: EncodedData) -> str:
    """Return the table of the largest shards."""
    entries = sorted(data.manifest.shards, key=lambda entry: -entry.records)
    rows = []
    for entry in entries[:SHARDS]:
        tokens = (entry.text_tokens, entry.tokens(data.patch_size))
        counts = (entry.records, sum(entry.grids.values()), *tokens, entry.bytes)
        rows.append([entry.name, *(f"{count:,}" for count in counts)])
    table = Table(["shard", "documents", "pictures", "text tokens", "tokens", "bytes"], rows)
    rest = note(f"The {SHARDS} with the most documents, of {len(entries):,}.") if len(entries) > SHARDS else ""
    return rest + table.html()


if __name__ == "__main__":
    run_program(main)
