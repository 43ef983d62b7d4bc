"""One thread owns the model. Orders wait in a bounded queue; those of equal settings run side by side in one batch.

An order that arrives while a batch runs waits for the next: rows do not join a batch that has begun. Each picture has
the bits that `train.sample` gives it (P12). One that is cancelled gets its last event at once, and its
rows leave the batch after the forward that is running.
"""

import base64
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from data.pictures import encode_png, encode_preview
from model.draws import DrawsOfSamples
from train.distributed.process import wait_for
from train.inference.pipeline import Pipeline
from train.inference.prompts import Part
from train.serving.orders import Order, Refusal

log = logging.getLogger(__name__)

PREVIEW_SIDE = 256  # pixels, at most
Event = dict[str, Any]


class _NobodyWaits(Exception):
    """All orders of the batch are cancelled, or the server stops."""


class Job:
    """An order in the queue or in a batch. `listen` gets its events, on any thread; the last one has `last` true."""

    def __init__(self, order: Order, listen: Callable[[Event, bool], object]) -> None:
        self.id, self.order, self._listen = secrets.token_hex(8), order, listen
        self.ended = False
        self._lock = threading.RLock()  # as a listener may cancel

    def tell(self, event: str, **facts: Any) -> None:
        with self._lock:
            if not self.ended:
                self._listen({"event": event, **facts}, False)

    def end(self, event: str, **facts: Any) -> None:
        """Send the last event, unless there was one."""
        with self._lock:
            if not self.ended:
                self.ended = True
                self._listen({"event": event, **facts}, True)

    def cancel(self) -> None:
        self.end("cancelled", id=self.id)

    def fail(self, refusal: Refusal) -> None:
        self.end("failed", **refusal.as_json())


class Batcher:
    """The queue and its thread. `preview_share` is the share of sampling time that previews may take, 0...1."""

    def __init__(self, pipeline: Pipeline, preview_share: float, most_waiting: int, facts: dict[str, Any]) -> None:
        self.pipeline, self.most_waiting, self._facts = pipeline, most_waiting, facts
        self._pace = Pace(preview_share)
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._changed, self._stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="model")
        self._thread.start()

    def submit(self, order: Order, listen: Callable[[Event, bool], object]) -> Job:
        """Put an order at the end of the queue; raise Refusal if that is full or the server stops."""
        job = Job(order, listen)
        with self._changed:
            self._waiting = [other for other in self._waiting if not other.ended]
            if self._stopping:
                raise _stopping()
            if len(self._waiting) >= self.most_waiting:
                found, most = f"{len(self._waiting)} requests wait", f"at most {self.most_waiting} (max_waiting)"
                raise Refusal(found, most, "try again in a while, or cancel some", status=503)
            before = len(self._waiting) + sum(not other.ended for other in self._running)
            job.tell("queued", id=job.id, waiting=before, unknown=order.unknown)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, name: str) -> bool:
        """Cancel the order of this id; return whether it was there and had not ended."""
        with self._changed:
            found = [job for job in self._waiting + self._running if job.id == name and not job.ended]
        for job in found:
            job.cancel()
        return bool(found)

    def load(self) -> dict[str, int]:
        """Return how many orders wait and how many run."""
        with self._changed:
            jobs = {"waiting": self._waiting, "running": self._running}
            return {name: sum(not job.ended for job in part) for name, part in jobs.items()}

    def stop(self) -> None:
        """End all orders; the thread ends after the forward that it is in."""
        with self._changed:
            self._stopping = True
            jobs = self._waiting + self._running
            self._changed.notify_all()
        for job in jobs:
            job.fail(_stopping())

    def join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                self._sample(batch)
            except _NobodyWaits:
                pass
            except Exception as error:  # of one batch, such as too little memory; the next may be smaller
                log.exception("a batch of %d orders failed", len(batch))
                reason = Refusal(str(error) or type(error).__name__, "an answer", "see the server's log", status=500)
                for job in batch:
                    job.fail(reason)
            with self._changed:
                self._running = []

    def _next_batch(self) -> list[Job]:
        """Wait for orders; return the first and those that can run beside it, none when the server stops."""
        with self._changed:
            while not self._stopping:
                self._waiting = [job for job in self._waiting if not job.ended]
                rows, batch = 0, []
                for job in self._waiting:
                    if rows + job.order.n <= self.pipeline.batch_size and job.order.key == self._waiting[0].order.key:
                        batch.append(job)
                        rows += job.order.n
                if batch:
                    self._waiting = [job for job in self._waiting if job not in batch]
                    self._running = batch
                    return batch
                self._changed.wait()
        return []

    def _sample(self, batch: Sequence[Job]) -> None:
        """Run orders of one key and end their jobs."""
        start, order = time.monotonic(), batch[0].order
        samples = [(job, number) for job in batch for number in range(job.order.n)]
        draws = DrawsOfSamples([(job.order.seed, number) for job, number in samples])
        for job in batch:
            job.tell("started", id=job.id, rows=len(samples))

        def poll(_: float) -> None:
            if self._stopping or all(job.ended for job in batch):
                raise _NobodyWaits

        def watch(places: Sequence[int], step: int, x0: torch.Tensor) -> None:
            self._show(samples, places, step, x0)

        poll(0)
        prompts = [job.order.parts for job, _ in samples]
        run = partial(self.pipeline.complete, draw=order.draw, watch=watch, left=lambda place: samples[place][0].ended)
        outputs = list(run(prompts, order.sampler, draws, poll))
        for job in batch:
            mine = [parts for (owner, _), parts in zip(samples, outputs, strict=True) if owner is job]
            settings = {**self._facts, **asdict(order.sampler), "seed": job.order.seed, "n": job.order.n}
            facts = {"id": job.id, "seconds": round(time.monotonic() - start, 3), "rows": len(samples)}
            job.end("done", **facts, samples=[_as_json(parts) for parts in mine], settings=settings)

    def _show(self, samples: Sequence[tuple[Job, int]], places: Sequence[int], step: int, x0: torch.Tensor) -> None:
        """Tell each job its step and, when a preview is due, its pictures so far."""
        shown: dict[int, str] = {}
        jobs, steps = [samples[place][0] for place in places], samples[0][0].order.sampler.steps
        wanted = [i for i, job in enumerate(jobs) if job.order.previews and not job.ended]
        if wanted and step < steps and self._pace.due():
            wait_for(x0.device)  # else the time of the preview would be that of the steps before it
            self._pace.begin()
            for i, pixels in zip(wanted, self.pipeline.decode([x0[i] for i in wanted]), strict=True):
                shown[places[i]] = base64.b64encode(encode_preview(pixels, PREVIEW_SIDE)).decode()
            self._pace.end()
        of_job: dict[str, tuple[Job, list[Event]]] = {}
        for place in sorted(places):
            job, number = samples[place]
            picture = {"preview": shown[place]} if place in shown else {}
            of_job.setdefault(job.id, (job, []))[1].append({"number": number, **picture})
        for job, numbers in of_job.values():
            job.tell("step", step=step, steps=steps, samples=numbers)


class Pace:
    """Decides when a preview is due, so that all of them take at most a share of the time."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._begun = self._ended = -float("inf")

    def due(self) -> bool:
        if self.share == 0:
            return False
        pause = 0.0 if self._ended == -float("inf") else (self._ended - self._begun) * (1 / self.share - 1)
        return time.monotonic() >= self._ended + pause

    def begin(self) -> None:
        self._begun = time.monotonic()

    def end(self) -> None:
        self._ended = time.monotonic()


def _stopping() -> Refusal:
    return Refusal("the server stops", "a running server", "start train.serve again", status=503)


def _as_json(parts: Sequence[Part]) -> list[dict[str, str]]:
    """Return a sample's texts, and its pictures as PNG in base64."""
    return [
        {"picture": base64.b64encode(encode_png(part)).decode()} if isinstance(part, np.ndarray) else {"text": part}
        for part in parts
    ]
