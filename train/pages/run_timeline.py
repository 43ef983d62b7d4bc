"""What happened to a run besides training, and when: starts, stops, skipped updates, gaps, long stalls.

events.jsonl says most of it; bad_updates.jsonl and the times of the rows say what they can of runs of earlier versions.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np

from train.pages.report_inputs import RunInputs
from train.pages.time_shares import spoken

MOST = 80  # moments shown, the newest
TOGETHER = 3  # more moments of one kind in a row are one line
GAP, GAP_S = 10, 60.0  # a gap is this many times the usual time between rows, and at least these seconds
PIECES = 40  # a stall is looked for in as many pieces of the run
STALLS = {"data_stall_share": "waited for data", "slowest_lag_share": "waited for the slowest rank"}
LATEST = 1e11  # seconds since 1970; more is no time
MUCH = 0.1  # of a piece's time
KINDS = {"start": "start", "stop": "stop", "skipped_update": "skipped", "went_back": "went back"}
KINDS |= {"save_failed": "save failed"}


@dataclass(frozen=True)
class Moment:
    time: float | None  # seconds since 1970; None: not recorded
    step: int | None
    kind: str
    words: str

    @property
    def when(self) -> str:
        return "" if self.time is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))


def timeline(run: RunInputs) -> tuple[list[Moment], int]:
    """Return the newest moments in their order, and how many there are in all."""
    moments = [*_events(run), *_gaps(run), *_stalls(run)]
    if not any(moment.kind == KINDS["skipped_update"] for moment in moments):
        moments += _bad_updates(run)
    moments.sort(key=lambda moment: (moment.step if moment.step is not None else -1, moment.time or 0))
    if all(moment.time is not None for moment in moments):
        moments.sort(key=lambda moment: moment.time or 0)
    together: list[Moment] = []
    for kind, group in groupby(moments, key=lambda moment: moment.kind):
        found = list(group)
        if len(found) > TOGETHER and kind != KINDS["start"]:
            words = f"{len(found)} times, up to step {found[-1].step}; the last: {found[-1].words}"
            found = [Moment(found[0].time, found[0].step, kind, words)]
        together += found
    return together[-MOST:], len(moments)


def _events(run: RunInputs) -> Iterator[Moment]:
    """Yield what the run wrote down; a start without a stop before it tells of a death."""
    running = False
    for event in run.events:
        at, step, kind = event.get("time"), event.get("step"), str(event.get("kind"))
        at = at if isinstance(at, int | float) and 0 <= at < LATEST else None
        step = step if isinstance(step, int) else None
        if kind == "start" and running:
            yield Moment(at, step, "died", "the attempt before ended without a word")
        running = kind == "start" or (running and kind != "stop")
        yield Moment(at, step, KINDS.get(kind, kind), str(event.get("words", "")))


def _bad_updates(run: RunInputs) -> Iterator[Moment]:
    for row in run.bad_updates:
        documents = row.get("documents") or ["unknown documents"]
        if isinstance(row.get("step"), int) and isinstance(documents, list):
            words = f"gradient norm {row.get('grad_norm')}; {', '.join(map(str, documents[:3]))}"
            yield Moment(None, row["step"], KINDS["skipped_update"], words)


def _gaps(run: RunInputs) -> Iterator[Moment]:
    """Yield the times without a row that are far longer than usual, unless a stop tells why."""
    series = run.columns["time"]
    if len(series) < 3:
        return
    waited = np.diff(series.values)
    least = max(GAP * float(np.median(waited)), GAP_S)
    stops = [float(event["time"]) for event in run.events if event.get("kind") == "stop" and event.get("time")]
    for place in np.flatnonzero(waited > least)[:MOST]:
        step, at = int(series.steps[place]), float(series.values[place])
        if any(at <= stop <= at + waited[place] for stop in stops):
            continue
        yield Moment(at, step, "gap", f"no row for {spoken(float(waited[place]))} after step {step:,}")


def _stalls(run: RunInputs) -> Iterator[Moment]:
    """Yield the parts of the run in which much of the time was lost."""
    times = run.columns["time"]
    for name, words in STALLS.items():
        series = run.columns[name]
        if len(series) < 2 or len(times) != len(series):
            continue
        starts = np.arange(0, len(series), -(-len(series) // PIECES))
        sizes = np.diff([*starts, len(series)])
        shares = np.add.reduceat(np.nan_to_num(series.values), starts) / sizes
        for much, group in groupby(enumerate((shares > MUCH).tolist()), key=itemgetter(1)):
            pieces = [piece for piece, _ in group]
            if much:
                first, last = starts[pieces[0]], starts[pieces[-1]] + sizes[pieces[-1]] - 1
                until = f"steps {int(series.steps[first]):,} to {int(series.steps[last]):,}"
                share = f"{shares[pieces].mean():.0%} of the time"
                yield Moment(float(times.values[first]), int(series.steps[first]), "stall", f"{words} {share}, {until}")
