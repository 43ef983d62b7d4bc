"""Whether a run is healthy, said in one sentence a topic, by rules that are printed beside the sentence.

Only what the run wrote is asked: metrics.jsonl, events.jsonl, bad_updates.jsonl, attempt.json. A rule without the
numbers that it needs says nothing. Thresholds are the constants here; they are for looking, none of them stops a run.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from train.console import plural
from train.pages.metric_columns import Series
from train.pages.report_inputs import RunInputs
from train.pages.svg_chart import number
from train.pages.time_shares import spoken

LEAST_ROWS = 16  # fewer say nothing about a trend
SPIKE, BLOCK = 0.3, 50  # above the median of the block of rows before, and a block's rows
CLIPPED = 4.0  # median norm over clip_norm: to scale every gradient down a little is common and harms nothing
SLOWER = 0.1  # than the best
STALL, LAG, SAVES, MEASURING, PADDING, IDLE = 0.05, 0.05, 0.05, 0.15, 0.1, 0.05  # shares of time, or of token slots
WORSE = 0.01  # than the best held-out loss, relative
MEMORY = 0.1  # growth of host memory over the newer half
SILENT = 10  # times the interval between rows, and at least ten minutes


@dataclass(frozen=True)
class Finding:
    topic: str
    healthy: bool | None  # None: it cannot be said
    words: str
    rule: str


def findings(run: RunInputs, now: float | None = None) -> list[Finding]:
    """Return what there is to say of each topic; `now` in seconds since 1970 is for tests."""
    rules: list[Callable[[RunInputs], Iterator[Finding]]]
    rules = [_losses, _falling, _held_out, _updates, _clipping, _data, _reading, _waiting, _speed, _memory, _restarts]
    found = [*_progress(run, time.time() if now is None else now)]
    return found + [finding for rule in rules for finding in rule(run)]


def _progress(run: RunInputs, now: float) -> Iterator[Finding]:
    last, times, steps = run.columns.last("step"), run.columns["time"], run.setting("optim.steps")
    if last is None:
        return
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    rule = f"there is no row for {SILENT} times the usual interval, and ten minutes"
    at = f"Step {int(last):,}{of}"
    ends = [event for event in run.events if event.get("kind") in ("start", "stop")]
    if isinstance(steps, int) and last >= steps:
        yield Finding("Progress", True, f"Finished: step {int(last):,}.", rule)
    elif ends and (stop := ends[-1])["kind"] == "stop":
        yield Finding("Progress", stop.get("status") in (0, 75, 130), f"{at}; {stop.get('words', 'it stopped')}.", rule)
    elif len(times) > 2:
        silence, usual = now - float(times.values[-1]), float(np.median(np.diff(times.values[-100:])))
        silent = silence > max(SILENT * usual, 600)
        words = f"the newest row is {spoken(silence)} old: stopped, waiting or hanging" if silent else "it is running"
        yield Finding("Progress", not silent, f"{at}; {words}.", rule)


def _losses(run: RunInputs) -> Iterator[Finding]:
    known = {kind: run.columns[f"{kind}_loss"] for kind in ("text", "image")}
    lost = [(kind, one.steps[~np.isfinite(one.values)]) for kind, one in known.items()]
    lost = [(kind, steps) for kind, steps in lost if len(steps)]
    jumps = [(kind, *found) for kind, one in known.items() for found in _spikes(one.finite)]
    rule = f"a value is not finite, or {SPIKE:.0%} above the median of the {BLOCK} rows before"
    if not any(map(len, known.values())):
        return
    words = [
        f"the {kind} loss is not finite in {plural(len(s), 'row')}, first at step {int(s[0]):,}" for kind, s in lost
    ]
    if jumps:
        kind, step, factor = max(jumps, key=lambda jump: jump[2])
        words.append(f"{plural(len(jumps), 'spike')}, the highest {factor:.1f} times ({kind}, step {int(step):,})")
    yield Finding("Losses", not words, _sentence(words) or "All finite, without spikes.", rule)


def _spikes(series: Series) -> list[tuple[float, float]]:
    """Return step and height, as a multiple of the median before, of each value that is far above it."""
    blocks = len(series) // BLOCK
    if blocks < 2:
        return []
    values = series.values[: blocks * BLOCK].reshape(blocks, BLOCK)
    factors = (values[1:] / np.maximum(np.median(values, axis=1)[:-1, None], 1e-12)).ravel()
    places = np.flatnonzero(factors > 1 + SPIKE)
    return [(float(series.steps[BLOCK + place]), float(factors[place])) for place in places]


def _falling(run: RunInputs) -> Iterator[Finding]:
    words, healthy = [], True
    for kind in ("text", "image"):
        series = run.columns[f"{kind}_loss"].finite
        if len(series) < LEAST_ROWS:
            continue
        before, newest = np.array_split(series.values[len(series) // 2 :], 2)
        (level, error), (now, error_now) = _median(before), _median(newest)
        change, error = (now - level) / level, 2 * math.hypot(error, error_now) / level
        healthy &= change < -error
        how = f"falls by {-change:.1%}" if change < -error else "no longer falls"
        words.append(f"the {kind} loss {f'rises by {change:.1%}' if change > error else how}")
    rule = "the last quarter's median is not two standard errors below that of the quarter before"
    if words:
        yield Finding("Learning", healthy, _sentence(words), rule)


def _median(values: np.ndarray) -> tuple[float, float]:
    """Return the median and its standard error, from the median deviation: a spike moves neither."""
    middle = float(np.median(values))
    return middle, 1.253 * 1.4826 * float(np.median(np.abs(values - middle))) / math.sqrt(len(values))


def _held_out(run: RunInputs) -> Iterator[Finding]:
    best, worse = 0, []
    for label, name in run.columns.matching("(heldout(?:_ema)?/(?:.*_loss|.*/x0_error))").items():
        series = run.columns[name].finite
        if len(series) > 2:
            least, last, best = float(series.values.min()), float(series.values[-1]), best + 1
            if last > (1 + WORSE) * least and series.values[-3:].min() > least:
                at = int(series.steps[series.values.argmin()])
                worse.append(f"the best {label} was at step {at:,}; now it is {last / least - 1:.1%} higher")
    if best:
        words = _sentence(worse[:3]) or f"Each is within {WORSE:.0%} of its best, or reached it in the last three rows."
        yield Finding(
            "Held-out", not worse, words, f"one is {WORSE:.0%} above its best, and the last three did not reach that"
        )


def _updates(run: RunInputs) -> Iterator[Finding]:
    skipped, back = run.columns.last("skipped_updates"), run.columns.last("rollbacks") or 0
    if skipped is None:
        return
    words = []
    if skipped:
        steps = [row["step"] for row in run.bad_updates if isinstance(row.get("step"), int)]
        at = f", at step {', '.join(f'{step:,}' for step in steps[-3:])}" if steps else ""
        words.append(f"{int(skipped):,} of {int(run.columns.last('step') or 0):,} updates were skipped{at}")
    if back:
        words.append(f"the run went back {plural(int(back), 'time')}, and left batches out")
    yield Finding(
        "Updates",
        not words,
        _sentence(words) or "None was skipped.",
        "an update was skipped, or bad ones sent the run back",
    )


def _clipping(run: RunInputs) -> Iterator[Finding]:
    norms, clip = run.columns["grad_norm"].finite, run.setting("optim.clip_norm")
    if len(norms) < LEAST_ROWS or not isinstance(clip, int | float) or clip <= 0:
        return
    newer = norms.values[len(norms) // 2 :]
    share, median = float((newer > clip).mean()), float(np.median(newer))
    words = f"{share:.0%} of the newer half's rows are above optim.clip_norm={clip:g}; the median is {number(median)}."
    yield Finding("Clipping", median <= CLIPPED * clip, words, f"the median is above {CLIPPED:g} times clip_norm")


def _data(run: RunInputs) -> Iterator[Finding]:
    skipped = run.columns.last("skipped_documents")
    if skipped is None:
        return
    reasons = {reason: run.columns.last(n) for reason, n in run.columns.matching("skips/(.*)").items()}
    by_reason = ", ".join(f"{int(count):,} {reason}" for reason, count in reasons.items() if count)
    words = [f"{plural(int(skipped), 'document')} skipped{f' ({by_reason})' if by_reason else ''}"] if skipped else []
    for name, what, most in (("padding_share", "padding", PADDING), ("idle_row_share", "idle rows", IDLE)):
        if (share := _mean(run, name)) is not None and share > most:
            words.append(f"{share:.1%} of the token slots are {what}")
    padding = _mean(run, "padding_share")
    well = "No document was skipped" + (f"; {padding:.1%} of the token slots are padding." if padding else ".")
    rule = f"a document was skipped, padding is above {PADDING:.0%}, or idle rows are above {IDLE:.0%}"
    yield Finding("Data", not words, _sentence(words) or well, rule)


def _reading(run: RunInputs) -> Iterator[Finding]:
    shares = {"data_stall_share": ("data", STALL), "checkpoint_stall_share": ("saves", SAVES)}
    shares["evaluation_share"] = ("evaluations and previews", MEASURING)
    known = [(words, most, _mean(run, name)) for name, (words, most) in shares.items()]
    found = [(words, most, share) for words, most, share in known if share is not None]
    if not found:
        return
    much = [f"{share:.1%} of the time is spent on {words}" for words, most, share in found if share > most]
    stalls = run.columns["data_stall_share"].finite
    if len(stalls) and (worst := float(stalls.values.max())) > 0.5:
        at = int(stalls.steps[stalls.values.argmax()])
        much.append(f"up to step {at:,} it waited for data for {worst:.0%} of an interval")
    well = ", ".join(f"{words} {share:.1%}" for words, _, share in found)
    rule = f"waiting for data or saves takes {STALL:.0%} of the time, or evaluations {MEASURING:.0%}"
    yield Finding("Stalls", not much, _sentence(much) or f"Shares of time: {well}.", rule)


def _waiting(run: RunInputs) -> Iterator[Finding]:
    share, ranks, hosts = (
        _mean(run, "slowest_lag_share"),
        run.columns["slowest_rank"],
        run.columns.words("slowest_host"),
    )
    if share is None or not len(ranks):
        return
    rank, count = Counter(ranks.values.astype(int).tolist()).most_common(1)[0]
    host = f" on {Counter(hosts).most_common(1)[0][0]}" if hosts else ""
    often = f"rank {rank} is the slowest in {count / len(ranks):.0%} of the rows{host}"
    words = f"Others wait {share:.1%} of the time for the slowest" + (f"; {often}." if share > LAG else " rank.")
    yield Finding("Slowest rank", share <= LAG, words, f"it is above {LAG:.0%} of the time")


def _speed(run: RunInputs) -> Iterator[Finding]:
    name = "mfu" if len(run.columns["mfu"]) else "tokens_per_s"
    series = run.columns[name].finite
    if len(series) < LEAST_ROWS:
        return
    tenths = [float(np.median(part)) for part in np.array_split(series.values, 10)]
    best, newest = max(tenths), tenths[-1]
    drop = 1 - newest / best if best else 0.0
    what = f"MFU is {newest:.1%}" if name == "mfu" else f"{number(newest)} tokens/s"
    steps = series.steps[len(series) * tenths.index(best) // 10]
    words = f"{what}; {drop:.0%} less than around step {int(steps):,}." if drop > SLOWER else f"{what}, and steady."
    yield Finding("Speed", drop <= SLOWER, words, f"the newest tenth is {SLOWER:.0%} below the best tenth")


def _memory(run: RunInputs) -> Iterator[Finding]:
    host = run.columns["host_memory_gib"].finite
    if len(host) < LEAST_ROWS:
        return
    middle, newest = (float(np.median(part)) for part in np.array_split(host.values[len(host) // 2 :], 2))
    growth = newest / max(middle, 1e-9) - 1
    device = run.columns.last("device_memory_gib") or 0
    also = f"; device {device:.1f} GiB" if device else ""
    words = f"Host {newest:.1f} GiB{also}" + (f", growing by {growth:.0%}" if growth > MEMORY else "")
    yield Finding(
        "Memory", growth <= MEMORY, f"{words}.", f"host memory grows by {MEMORY:.0%} from the third quarter to the last"
    )


def _restarts(run: RunInputs) -> Iterator[Finding]:
    kinds = [event.get("kind") for event in run.events if event.get("kind") in ("start", "stop")]
    died = sum(one == after == "start" for one, after in pairwise(kinds))
    attempts = max(run.attempts, kinds.count("start"))
    if not attempts:
        return
    words = [f"{attempts} starts"] if attempts > 1 else []
    words += [f"{died} of them after an attempt that died without saying so"] if died else []
    sizes = [
        event["ranks"] for event in run.events if event.get("kind") == "start" and isinstance(event.get("ranks"), int)
    ]
    if len(set(sizes)) > 1:
        words.append(
            f"on {', then '.join(str(size) for i, size in enumerate(sizes) if sizes[i - 1 : i] != [size])} ranks"
        )
    yield Finding(
        "Restarts",
        not died,
        _sentence([", ".join(words)]) if words else "One start.",
        "an attempt died without saying so",
    )


def _mean(run: RunInputs, name: str) -> float | None:
    """Return the mean over steps, nan left out."""
    series = run.columns[name].finite
    return float(series.values.mean()) if len(series) else None


def _sentence(parts: list[str]) -> str:
    text = "; ".join(part for part in parts if part)
    return f"{text[0].upper()}{text[1:]}." if text else ""
