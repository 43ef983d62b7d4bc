"""The tables that train.view prints of checkpoints: the run's list, then what one of them holds."""

import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from train.checkpoints.lookup import read_while_there
from train.distributed.ranks import alone
from train.pages.checkpoint_listing import CheckpointListing
from train.pages.checkpoint_summary import CheckpointSummary, SavedTensor
from train.pages.terminal import Table, Value, View

NAMED_PROBLEMS = 20
EXTREMES = 3  # tensors listed for each kind of extreme

progress_bar = partial(tqdm, unit="B", unit_scale=True, disable=None)  # on a terminal only


def view_checkpoints(path: Path, verify: bool) -> View:
    """List the checkpoints at `path` and describe the one that a resume takes, or the newest where none is whole.

    If the run removes the one that is being read, all are listed again. Raises FileNotFoundError where there is no
    checkpoint.
    """
    listing, summary = CheckpointListing.open(path), None

    def choose() -> Path:
        nonlocal listing
        listing = listed = CheckpointListing.open(path)
        if not listed.checkpoints:
            raise FileNotFoundError(f"checkpoint={path}: the run has removed all checkpoints it held")
        if verify:
            with progress_bar(desc="verify", total=listing.num_bytes) as bar:
                listing = listing.verified(bar.update)
        return (listing.resumes or [*listed.checkpoints, *listing.checkpoints][-1]).folder

    def read(folder: Path) -> CheckpointSummary:
        chosen = next((one for one in listing.checkpoints if one.folder == folder), None)
        if chosen is not None:
            with progress_bar(desc="read", total=chosen.num_bytes) as bar:
                found = CheckpointSummary.read(folder, chosen.damaged_files, bar.update)
            if not found.problems or folder.exists():
                return found
        raise FileNotFoundError(folder)

    if listing.checkpoints:
        summary = read_while_there(choose, read, alone())
    facts, remarks = _facts(listing), list(listing.remarks)
    tables = [_list(listing), Table("leftovers", ["folder", "bytes", "what it is"], listing.leftovers)]
    for one in listing.checkpoints:
        remarks += _first(one.problems or [], f"{one.folder.name} is damaged: ")
    if not verify:
        remarks.append("Not verified (verify=false): a resume reads every byte and passes over damaged checkpoints.")
    if summary is not None:
        facts |= _counters(summary)
        bad = [one for one in summary.tensors if one.sums.nonfinite]
        for problems in (summary.problems, [f"{one.name} has {one.sums.nonfinite:,} non-finite values" for one in bad]):
            remarks += _first(problems, f"{summary.folder.name}: ")
        tables += _contents(summary)
    tables = [table for table in tables if table.rows]
    return View(facts, remarks, tables, damaged=any(one.problems for one in listing.checkpoints))


def _facts(listing: CheckpointListing) -> dict[str, Value]:
    facts: dict[str, Value] = {"checkpoints": f"{len(listing.checkpoints)}, {listing.num_bytes / 1e6:,.1f} MB"}
    if (resumes := listing.resumes) is not None:
        doubt = ", if it verifies (verify=false)" if resumes.problems is None else ""
        facts["resume"] = f"from step {resumes.step:,}{doubt}"
    else:
        facts["resume"] = "refused: every checkpoint is damaged" if listing.checkpoints else "from scratch"
    if listing.attempt is not None:
        facts["attempts"] = "{attempt}, the last since {started} on {host} (pid {pid})".format(**listing.attempt)
    return facts


def _first(problems: list[str], before: str) -> list[str]:
    """Return the first problems, each with `before`, and how many more there are."""
    more = [f"{before}and {len(problems) - NAMED_PROBLEMS:,} more"] if len(problems) > NAMED_PROBLEMS else []
    return [f"{before}{problem}" for problem in problems[:NAMED_PROBLEMS]] + more


def _list(listing: CheckpointListing) -> Table:
    metrics = list(dict.fromkeys(name for one in listing.checkpoints for name in one.metrics))
    rows = []
    for one in listing.checkpoints:
        whole = "not verified" if one.problems is None else "damaged" if one.problems else "yes"
        resume = "from here" if one is listing.resumes else ""
        seen = (one.progress.get("tokens_seen"), one.progress.get("images_seen"))
        row: list[Value] = [one.step, _age(time.time() - one.saved_at), one.num_bytes, *seen, one.num_ranks]
        rows.append([*row, whole, resume, listing.kept(one), *map(one.metrics.get, metrics)])
    head = ["step", "age", "bytes", "tokens", "images", "ranks", "whole", "resume", "kept", *metrics]
    return Table("checkpoints", head, rows)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _counters(summary: CheckpointSummary) -> dict[str, Value]:
    """Return how far the run was when it saved the checkpoint."""
    facts: dict[str, Value] = {"described": summary.folder.name}
    facts |= {name.replace("_", " "): value for name, value in summary.progress.items() if name != "excluded"}
    if summary.back_to is not None:
        facts["went back"] = f"to step {summary.back_to:,}"
    if excluded := summary.progress.get("excluded"):  # [first, last step] each
        facts["batches left out"] = "of steps " + ", ".join(f"{first:,} to {last:,}" for first, last in excluded)
    if summary.guard:
        skipped, in_a_row, _, mean = summary.guard
        facts["updates skipped"] = f"{skipped:,.0f} for their gradients, the last {in_a_row:,.0f} in a row"
        facts["gradient norm"] = f"{mean:.4g} on average"
    facts |= summary.metrics
    if packed := summary.lane_rows:
        facts["lanes"] = f"{len(packed):,}, {min(packed):,} to {max(packed):,} sequences each"
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in summary.skipped.most_common())
        facts["documents skipped"] = f"{summary.skipped.total():,}" + (f" ({reasons})" if reasons else "")
    return facts


def _contents(summary: CheckpointSummary) -> list[Table]:
    weights = [one for one in summary.tensors if one.entry == "model" and one.sums.measured]
    config = [[key, str(default), str(stored)] for key, stored, default in summary.config]
    fingerprint = [[name, str(value)] for name, value in summary.fingerprint.items()]
    return [
        _entries(summary),
        _extremes(weights),
        Table("config: differences from the defaults", ["key", "default", "stored"], config),
        Table("fingerprint: what must be the same on resume", ["name", "value"], fingerprint),
    ]


def _entries(summary: CheckpointSummary) -> Table:
    """Return a row each for the model, the EMAs and the optimizer's moments; norms are of the finite values read."""
    rows = []
    for name, sums in summary.entries().items():
        numbers = [sums.norm, sums.rms, sums.largest] if sums.measured else [None] * 3
        unread, dtypes = sums.elements - sums.measured, " ".join(sorted(sums.dtypes))
        rows.append([name, sums.tensors, sums.elements, sums.num_bytes, dtypes, *numbers, sums.nonfinite, unread])
    head = ["entry", "tensors", "elements", "bytes", "dtype", "norm", "rms", "largest", "non-finite", "not read"]
    return Table("what it holds", head, rows)


def _extremes(weights: list[SavedTensor]) -> Table:
    """Return the weights with the highest and the lowest RMS and those with the largest magnitudes."""
    by_rms = sorted(weights, key=lambda one: one.sums.rms)
    by_value = sorted(weights, key=lambda one: -one.sums.largest)
    kinds = {"highest rms": by_rms[::-1], "lowest rms": by_rms, "largest value": by_value}
    rows: list[list[Value]] = []
    for one in weights:
        if why := [kind for kind, ranked in kinds.items() if one in ranked[:EXTREMES]]:
            shape = "x".join(map(str, one.shape)) or "scalar"
            rows.append([one.name, shape, one.sums.rms, one.sums.largest, ", ".join(why)])
    return Table("extreme weights", ["tensor", "shape", "rms", "largest", "extreme in"], rows)
