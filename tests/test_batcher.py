"""The one thread of train.serve: what runs in a batch, for how long, and how often it is shown."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest

from tests.runs import DrawingRun
from tests.servers import until
from tests.test_serve import LONG, SAMPLER, pictures
from train.distributed.ranks import alone
from train.inference.pipeline import Pipeline, PipelineConfig
from train.serving.batcher import Batcher, Pace
from train.serving.orders import Orders


@pytest.fixture(scope="module")
def pipeline(drawn: DrawingRun) -> Pipeline:
    return Pipeline.load(PipelineConfig(checkpoint=str(drawn.run_dir), device="cpu"), alone())


@contextmanager
def batching(pipeline: Pipeline) -> Iterator[Batcher]:
    batcher = Batcher(pipeline, 0.0, 8, {})
    try:
        yield batcher
    finally:
        batcher.stop()
        batcher.join()


def test_a_batch_that_nobody_waits_for_ends_after_the_step_that_runs(pipeline: Pipeline) -> None:
    """Cancelled in its third step, it runs no fourth, and the next batch runs."""
    orders, forwards, events = Orders(pipeline, SAMPLER), [], []
    left, done = threading.Event(), threading.Event()

    def leave_in_third_step(event: dict, is_last: bool) -> None:
        events.append(event)
        if event.get("step") == 3:
            batcher.cancel(events[0]["id"])
            left.set()

    def keep(event: dict, is_last: bool) -> None:
        if is_last:
            events.append(event)
            done.set()

    hook = pipeline.model.patches.to_patch.register_forward_hook(lambda *_: forwards.append(None))
    with batching(pipeline) as batcher:
        batcher.submit(orders.draw({"prompt": "a", "steps": 50}), leave_in_third_step)
        assert left.wait(30)
        until(lambda: batcher.load() == {"waiting": 0, "running": 0})
        batcher.submit(orders.draw({"prompt": "b", "n": 2}), keep)
        assert done.wait(30)
    hook.remove()
    assert [event["event"] for event in events[:-1]] == ["queued", "started", *["step"] * 3, "cancelled"]
    assert len(forwards) == 3 + SAMPLER.steps and len(pictures(events[-1])) == 2
    with pytest.raises(Exception, match="the server stops"):
        batcher.submit(orders.draw({"prompt": "b"}), keep)


def test_a_request_that_is_cancelled_leaves_its_batch_to_the_others(pipeline: Pipeline) -> None:
    """They get the same bits in forwards of fewer rows."""
    orders, rows, started, ended = Orders(pipeline, SAMPLER), [], threading.Event(), threading.Event()
    ids: dict[str, str] = {}
    last: dict[str, dict] = {}

    def listen(name: str, event: dict, is_last: bool) -> None:
        ids.setdefault(name, event.get("id", ""))
        if name == "first":
            started.set()
        if name == "large" and event.get("step") == 2:
            batcher.cancel(ids["large"])
        if is_last:
            last[name] = event
            if {"large", "small"} <= last.keys():
                ended.set()

    with batching(pipeline) as batcher:
        batcher.submit(orders.draw(LONG), partial(listen, "first"))
        assert started.wait(30)
        batcher.submit(orders.draw({"prompt": "a", "n": 30}), partial(listen, "large"))
        batcher.submit(orders.draw({"prompt": "b", "seed": 4}), partial(listen, "small"))
        hook = pipeline.model.patches.to_patch.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
        batcher.cancel(ids["first"])
        assert ended.wait(30)
    hook.remove()
    assert last["large"]["event"] == "cancelled" and last["small"]["rows"] == 31
    assert rows[-1] == rows[-2] < 10 < 60 < rows[-3], rows
    assert np.array_equal(pictures(last["small"])[0], pipeline.draw(["b"], SAMPLER, seed=4)[0])


def test_previews_take_the_share_of_time_that_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("train.serving.batcher.time.monotonic", lambda: now)
    pace, shown = Pace(0.1), 0
    for _ in range(10_000):  # steps of a second, previews of 3
        now += 1
        if pace.due():
            pace.begin()
            now += 3
            pace.end()
            shown += 1
    assert 3 * shown / now == pytest.approx(0.1, rel=0.01)
    assert Pace(1.0).due() and not Pace(0.0).due()
