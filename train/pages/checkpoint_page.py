"""Checkpoints as a page and a terminal show them: the run's list, then what one of them holds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from train.checkpoints.lookup import read_while_there
from train.distributed.ranks import alone
from train.optim.ema import is_label
from train.pages.charts import ACCENT, SOFT, figure, label
from train.pages.checkpoint_listing import CheckpointListing
from train.pages.checkpoint_summary import BLOCK, MODEL, CheckpointSummary, SavedTensor, Sums, magnitude_edges
from train.pages.page import Table, View, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST_TENSORS, NAMED_PROBLEMS = 12, 20


def view_checkpoints(path: Path, verify: bool) -> View:
    """List the checkpoints at `path` and describe the one that a resume takes, or the newest where none is whole.

    A run that is training may remove what is read: then all is listed again. Raises FileNotFoundError where there is
    no checkpoint.
    """
    listing, contents = CheckpointListing.open(path), None

    def choose() -> Path:
        nonlocal listing
        listing = listed = CheckpointListing.open(path)
        if not listed.checkpoints:
            raise FileNotFoundError(f"checkpoint={path}: all that were in it were removed meanwhile")
        if verify:
            with _bar("verify", listing.num_bytes) as on_read:
                listing = listing.verified(on_read)
        return (listing.resumes or [*listed.checkpoints, *listing.checkpoints][-1]).folder

    def read(folder: Path) -> CheckpointSummary:
        chosen = next((one for one in listing.checkpoints if one.folder == folder), None)
        if chosen is not None:
            with _bar("read", chosen.num_bytes) as on_read:
                contents = CheckpointSummary.read(folder, chosen.damaged_files, on_read)
            if not contents.problems or folder.exists():
                return contents
        raise FileNotFoundError(folder)

    if listing.checkpoints:
        contents = read_while_there(choose, read, alone())
    tables = [("checkpoints", _list(listing))] if listing.checkpoints else []
    sections = [("checkpoints", "Checkpoints", _list(listing).html())] if listing.checkpoints else []
    if listing.leftovers:
        rows = [
            [str(one.folder.relative_to(listing.run or listing.path)), f"{one.num_bytes / 1e6:,.1f} MB", one.meaning]
            for one in listing.leftovers
        ]
        tables.append(("leftovers", Table(["folder", "size", "what it is"], rows, is_text=True)))
        sections.append(("leftovers", "Leftovers", tables[-1][1].html()))
    facts, remarks, record = _facts(listing), _remarks(listing, verify), _record(listing)
    if contents is not None:
        facts |= _counters(contents)
        remarks += _cut(contents.problems, f"{contents.folder.name}: ") + _nonfinite(contents)
        described = _tables(contents)
        tables += described.values()
        sections += _sections(contents, described)
        record["contents"] = _contents_record(contents)
    damaged = any(one.problems for one in listing.checkpoints)
    of_listing = f"Checkpoints of {listing.path}", facts, remarks, sections
    return View(*of_listing, tables=tables, record=record, damaged=damaged)


@contextmanager
def _bar(what: str, num_bytes: int) -> Iterator[Callable[[int], object]]:
    """Yield what advances a bar with the time left; on a terminal alone."""
    with tqdm(desc=what, total=num_bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


# ---- the run's list ----


def _list(listing: CheckpointListing) -> Table:
    """Return one row a checkpoint."""
    metrics = list(dict.fromkeys(name for one in listing.checkpoints for name in one.metrics))
    head = ["step", "saved", "size", "tokens", "images", "ranks", "whole", "resume", "retention", *metrics]
    rows = []
    for one in listing.checkpoints:
        kept = {True: "kept", False: "to be removed", None: "unknown"}[listing.keeps(one)]
        rows.append(
            [
                f"{one.step:,}",
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.saved_at)),
                f"{one.num_bytes / 1e6:,.1f} MB",
                *(
                    f"{one.progress[name]:,}" if name in one.progress else "?"
                    for name in ("tokens_seen", "images_seen")
                ),
                str(one.num_ranks),
                "not verified" if one.problems is None else "damaged" if one.problems else "yes",
                "from here" if one is listing.resumes else "",
                kept,
                *(f"{one.metrics[name]:.4f}" if name in one.metrics else "" for name in metrics),
            ]
        )
    return Table(head, rows)


def _facts(listing: CheckpointListing) -> dict[str, str]:
    resumes, facts = listing.resumes, {}
    verified = all(one.problems is not None for one in listing.checkpoints)
    facts["checkpoints"] = f"{len(listing.checkpoints)}, {listing.num_bytes / 1e6:,.1f} MB"
    if resumes is not None:
        facts["resume"] = f"from step {resumes.step:,}" + ("" if verified else ", if it verifies (verify=false)")
    else:
        facts["resume"] = "refused: every checkpoint is damaged" if listing.checkpoints else "from scratch"
    if listing.attempt is not None:
        facts["attempts"] = "{attempt}, the last since {started} on {host} (pid {pid})".format(**listing.attempt)
    return facts


def _remarks(listing: CheckpointListing, verify: bool) -> list[str]:
    remarks = list(listing.remarks)
    for one in listing.checkpoints:
        remarks += _cut(one.problems or [], f"{one.folder.name} is damaged: ")
    if not verify:
        remarks.append("Not verified (verify=false): a resume reads every byte and passes over what is damaged.")
    return remarks


def _record(listing: CheckpointListing) -> dict[str, Any]:
    """Return the list as JSON has it."""
    checkpoints = [
        {
            "folder": str(one.folder),
            "step": one.step,
            "saved_at": one.saved_at,
            "bytes": one.num_bytes,
            "ranks": one.num_ranks,
            **{name: one.progress.get(name) for name in ("tokens_seen", "images_seen")},
            "metrics": one.metrics,
            "problems": one.problems,
            "kept": listing.keeps(one),
        }
        for one in listing.checkpoints
    ]
    leftovers = [asdict(one) | {"folder": str(one.folder)} for one in listing.leftovers]
    resumes = str(listing.resumes.folder) if listing.resumes is not None else None
    return {"checkpoints": checkpoints, "resumes": resumes, "leftovers": leftovers, "attempt": listing.attempt}


# ---- one checkpoint ----


def _counters(contents: CheckpointSummary) -> dict[str, str]:
    facts = {"described": contents.folder.name}
    progress = dict(contents.progress)
    excluded = progress.pop("excluded", [])  # [first, last step] each
    facts |= {name.replace("_", " "): f"{value:,}" for name, value in progress.items()}
    if contents.back_to is not None:
        facts["went back"] = f"to step {contents.back_to:,}"
    if excluded:
        facts["batches left out"] = "of steps " + ", ".join(f"{first:,} to {last:,}" for first, last in excluded)
    if contents.guard:
        skipped, in_a_row, _, mean = contents.guard
        facts["updates skipped"] = f"{skipped:,.0f} for their gradients, the last {in_a_row:,.0f} in a row"
        facts["gradient norm"] = f"{mean:.4g} on average"
    facts |= {name: f"{value:.4f}" for name, value in contents.metrics.items()}
    if contents.lanes is not None:
        lanes = contents.lanes
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in lanes.skipped.most_common())
        facts["lanes"] = f"{lanes.lanes:,}, {lanes.rows[0]:,} to {lanes.rows[1]:,} sequences each"
        facts["documents skipped"] = f"{lanes.skipped.total():,}" + (f" ({reasons})" if reasons else "")
    return facts


def _tables(contents: CheckpointSummary) -> dict[str, tuple[str, Table]]:
    """Return what a terminal shows of a checkpoint, by section."""
    tables = {}
    if contents.tensors:
        tables["entries"] = ("what it holds", _entries(contents.sums(lambda tensor: tensor.entry)))
        tables["parts"] = ("weights by part", _parts(contents))
        tables["tensors"] = ("largest tensors", _largest(contents))
    if contents.lanes is not None:
        rows = [
            [one.name, *(f"{epoch:.4g}" for epoch in one.epochs), f"{one.tokens:,}", f"{one.pending:,}"]
            for one in contents.lanes.sources
        ]
        head = ["source", "epoch, least", "mean", "most", "tokens drawn", "documents pending"]
        tables["lanes"] = ("lanes", Table(head, rows))
        if contents.lanes.skipped_names:
            rows = [[name] for name in contents.lanes.skipped_names]
            tables["skipped"] = ("last documents skipped", Table(["document"], rows, is_text=True))
    if contents.config:
        rows = [[key, str(stored), str(default)] for key, stored, default in contents.config]
        tables["config"] = (
            "config: differences from the defaults",
            Table(["key", "stored", "default"], rows, is_text=True),
        )
    if contents.fingerprint:
        rows = [[name, str(value)] for name, value in contents.fingerprint.items()]
        tables["fingerprint"] = (
            "fingerprint: what a resume must find unchanged",
            Table(["name", "value"], rows, is_text=True),
        )
    return tables


def _entries(entries: dict[str, Sums]) -> Table:
    rows = [
        [
            name,
            f"{sums.tensors:,}",
            f"{sums.elements:,}",
            f"{sums.num_bytes / 1e6:,.1f} MB",
            " ".join(sorted(sums.dtypes)),
            _number(sums, sums.norm),
            _number(sums, sums.largest),
            f"{sums.nonfinite:,}",
        ]
        for name, sums in entries.items()
    ]
    return Table(["entry", "tensors", "elements", "size", "dtype", "norm", "largest", "non-finite"], rows)


def _weights(contents: CheckpointSummary, entry: str, key: Callable[[SavedTensor], Any]) -> dict[Any, Sums]:
    return contents.sums(lambda tensor: key(tensor) if tensor.entry == entry else None)


def _parts(contents: CheckpointSummary) -> Table:
    entries = [name for name in contents.sums(lambda tensor: tensor.entry) if name == MODEL or is_label(name)]
    parts = {entry: _weights(contents, entry, lambda tensor: tensor.part) for entry in entries}
    counted = next(iter(parts.values()), {})
    total = sum(sums.elements for sums in counted.values())
    head = ["part", "parameters", "share", *(f"{what}, {entry}" for entry in parts for what in ("norm", "rms"))]
    rows = []
    for part, sums in counted.items():
        shown = [parts[entry].get(part, Sums()) for entry in parts]
        numbers = [_number(one, value) for one in shown for value in (one.norm, one.rms)]
        rows.append([part, f"{sums.elements:,}", f"{100 * sums.elements / total:.1f} %", *numbers])
    return Table(head, rows)


def _largest(contents: CheckpointSummary) -> Table:
    weights = [tensor for tensor in contents.tensors if tensor.entry == MODEL] or contents.tensors
    rows = []
    for tensor in sorted(weights, key=lambda tensor: -tensor.sums.num_bytes)[:LARGEST_TENSORS]:
        shape, sums = "x".join(map(str, tensor.shape)) or "scalar", tensor.sums
        numbers = [_number(sums, value) for value in (sums.norm, sums.rms, sums.largest)]
        rows.append([tensor.name, shape, *sorted(sums.dtypes), f"{sums.num_bytes / 1e6:,.2f} MB", *numbers])
    return Table(["tensor", "shape", "dtype", "size", "norm", "rms", "largest"], rows)


def _number(sums: Sums, value: float) -> str:
    if sums.measured == sums.elements:
        return f"{value:.4g}"
    return f"{value:.4g} of what is read" if sums.measured else "not read"


def _nonfinite(contents: CheckpointSummary) -> list[str]:
    named = [
        f"{one.name} has {one.sums.nonfinite:,} non-finite values" for one in contents.tensors if one.sums.nonfinite
    ]
    return _cut(named, f"{contents.folder.name}: ")


def _cut(problems: list[str], before: str) -> list[str]:
    """Return the first problems, each with `before`, and how many more there are."""
    more = [f"{before}and {len(problems) - NAMED_PROBLEMS:,} more"] if len(problems) > NAMED_PROBLEMS else []
    return [f"{before}{problem}" for problem in problems[:NAMED_PROBLEMS]] + more


def _sections(contents: CheckpointSummary, tables: dict[str, tuple[str, Table]]) -> list[tuple[str, str, str]]:
    """Return a section a table, with the charts that belong to it."""
    charts: dict[str, list[str]] = {}
    if contents.tensors:
        charts["entries"] = [_size_chart(contents.sums(lambda tensor: tensor.entry))]
        charts["parts"] = [*_layer_chart(contents), *_histograms(contents)]
    sections = []
    for name, (title, table) in tables.items():
        drawn = f'<div class="charts">{"".join(charts[name])}</div>' if charts.get(name) else ""
        about = note(f"Of {contents.folder.name}.") if name in charts else ""
        sections.append((name, title.capitalize(), about + drawn + table.html()))
    return sections


def _size_chart(entries: dict[str, Sums]) -> str:
    sizes = [sums.num_bytes / 1e6 for sums in entries.values()]

    def draw(axes: "Axes") -> None:
        axes.barh(range(len(sizes)), sizes, color=ACCENT)
        axes.set_yticks(range(len(sizes)), list(entries))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)

    said = "Size by entry: " + ", ".join(f"{name} {sums.num_bytes / 1e6:,.1f} MB" for name, sums in entries.items())
    return figure("sizes", "Size", "by entry, MB", said, draw)


def _layer_chart(contents: CheckpointSummary) -> list[str]:
    """Return the chart of how large the weights of each block are."""
    kinds: dict[str, dict[int, Sums]] = {}
    for (kind, layer), sums in _weights(contents, MODEL, _block_of).items():
        kinds.setdefault(kind, {})[layer] = sums
    if not any(sums.measured for layers in kinds.values() for sums in layers.values()):
        return []

    def draw(axes: "Axes") -> None:
        from matplotlib.ticker import MaxNLocator

        for (kind, layers), colour in zip(kinds.items(), (ACCENT, SOFT), strict=True):
            axes.plot(
                list(layers), [sums.rms for sums in layers.values()], "o-", markersize=3, color=colour, label=kind
            )
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("block", color=SOFT)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8, loc="lower right")

    ranges = [
        f"{kind} {min(sums.rms for sums in layers.values()):.4g} to {max(sums.rms for sums in layers.values()):.4g}"
        for kind, layers in kinds.items()
    ]
    said = "Root mean square of each block's weights: " + ", ".join(ranges)
    return [figure("layers", "Weights by block", "root mean square", said, draw)]


def _block_of(tensor: SavedTensor) -> tuple[str, int] | None:
    found = BLOCK.match(tensor.parameter)
    return (found["kind"], int(found["layer"])) if found else None


def _histograms(contents: CheckpointSummary) -> list[str]:
    """Return a histogram of the weights' magnitudes for each part."""
    drawn, edges = [], magnitude_edges()
    for part, sums in _weights(contents, MODEL, lambda tensor: tensor.part).items():
        if not (counted := int(sums.histogram.sum())):
            continue
        filled = np.flatnonzero(sums.histogram)
        first, last = int(filled[0]), int(filled[-1]) + 1

        def draw(axes: "Axes", sums: Sums = sums, first: int = first, last: int = last) -> None:
            from matplotlib.ticker import FuncFormatter

            heights = 100 * sums.histogram[first:last] / max(1, counted)
            axes.bar(edges[first:last], heights, np.diff(edges[first : last + 1]), align="edge", color=ACCENT)
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.xaxis.set_major_formatter(FuncFormatter(label))

        unit = "share of the weights by magnitude, %" + (f"; {sums.zeros:,} are 0" if sums.zeros else "")
        said = f"Magnitudes of {part}: {edges[first]:.2g} to {edges[last]:.2g}, root mean square {sums.rms:.3g}"
        drawn.append(figure(f"weights-{len(drawn)}", part.capitalize(), unit, said, draw))
    return drawn


def _contents_record(contents: CheckpointSummary) -> dict[str, Any]:
    """Return a checkpoint as JSON has it."""

    def numbers(groups: dict[Any, Sums]) -> dict[str, dict[str, Any]]:
        names = ("tensors", "elements", "num_bytes", "nonfinite", "measured", "norm", "rms", "largest")
        return {
            key: {name: getattr(sums, name) for name in names} | {"dtypes": sorted(sums.dtypes)}
            for key, sums in groups.items()
        }

    return {
        "folder": str(contents.folder),
        "progress": contents.progress,
        "guard": contents.guard,
        "back_to": contents.back_to,
        "metrics": contents.metrics,
        "entries": numbers(contents.sums(lambda tensor: tensor.entry)),
        "parts": numbers(_weights(contents, MODEL, lambda tensor: tensor.part)),
        "nonfinite": {one.name: one.sums.nonfinite for one in contents.tensors if one.sums.nonfinite},
        "lanes": asdict(contents.lanes) if contents.lanes is not None else None,
        "config": {key: stored for key, stored, _ in contents.config},
        "fingerprint": contents.fingerprint,
        "problems": contents.problems,
    }
