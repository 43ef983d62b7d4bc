"""The routes: a page, and JSON for programs.

    GET    /                    the page; /page.css, /entry.js, /page.js
    GET    /api/info            the model, its defaults, the limits
    POST   /api/draw            {"prompt": ..., "pictures": [base64], "seed": ...} -> a line of JSON per event
    POST   /api/complete        {"parts": [{"text": ...}, {"picture": base64}], ...} -> the same
    POST   /api/describe        a picture's bytes, options in the query; or {"pictures": [base64], "question": ...}
                                -> one object
    DELETE /api/requests/ID     cancel; so does hanging up

Events: queued (id), started (rows of its batch), step (with previews where they are due), and one of done, cancelled
and failed. Every refusal is {"error", "expectation", "remedy"} with a status of HTTP.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from data.strict_json import dumps, finite
from train.serving.batcher import Batcher, Event, Job
from train.serving.guard import Guard
from train.serving.orders import Order, Orders, Refusal

MOST_BYTES = 16 << 20  # of a body
BODY_S = 60  # that a body may take to come
MOST_UNREAD = 64  # events that a client may be behind; beyond, steps are left out
# path: kind of text
PAGE = {"/": "html", "/page.css": "css", "/entry.js": "javascript", "/page.js": "javascript"}
Read = Callable[[Mapping[str, Any]], Order]


def build_app(batcher: Batcher, orders: Orders, info: dict[str, Any], host: str, token: str | None) -> ASGIApp:
    """Return the ASGI application; see Guard for `host` and `token`."""
    decoding = asyncio.Lock()  # one picture at a time: the largest take 200 MB

    async def show_page(request: Request) -> Response:
        path = request.url.path
        file = Path(__file__).parent / (path.strip("/") or "page.html")
        return Response(file.read_bytes(), media_type=f"text/{PAGE[path]}")

    async def show_info(request: Request) -> Response:
        return JSONResponse(finite({**info, **batcher.load()}))

    async def read(request: Request, reader: Read) -> Order:
        given = await _read_body(request)
        async with decoding:
            return await asyncio.to_thread(reader, given)

    def streaming(reader: Read) -> Callable[[Request], Any]:
        async def stream(request: Request) -> Response:
            job, events = _submit(batcher, await read(request, reader))
            return StreamingResponse(_lines(job, events), media_type="application/x-ndjson")

        return stream

    async def describe(request: Request) -> Response:
        job, events = _submit(batcher, await read(request, orders.describe))
        answer = await _last(job, events, request)
        if answer["event"] != "done":
            raise Refusal(answer.get("error", "cancelled"), "an answer", answer.get("remedy", "ask again"), 500)
        text = "".join(part["text"] for part in answer["samples"][0] if "text" in part)
        return JSONResponse(finite({"text": text, **{name: answer[name] for name in ("id", "seconds", "settings")}}))

    async def cancel(request: Request) -> Response:
        name = request.path_params["name"]
        if not batcher.cancel(name):
            raise Refusal(f"request {name[:80]}", "the id of a request that waits or runs", "it may have ended", 404)
        return JSONResponse({"cancelled": name})

    routes = [
        *[Route(path, show_page) for path in PAGE],
        Route("/api/info", show_info),
        Route("/api/draw", streaming(orders.draw), methods=["POST"]),
        Route("/api/complete", streaming(orders.complete), methods=["POST"]),
        Route("/api/describe", describe, methods=["POST"]),
        Route("/api/requests/{name}", cancel, methods=["DELETE"]),
    ]
    handlers: dict[Any, Any] = dict.fromkeys((Refusal, HTTPException, Exception), _refuse)
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host, token)


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        found = f"{request.method} {request.url.path[:80]}"
        error = Refusal(found, "a route of this server", "see docs/sampling.md", error.status_code)
    if not isinstance(error, Refusal):  # a mistake of ours; uvicorn logs it
        error = Refusal(type(error).__name__, "an answer", "see the server's log", 500)
    return JSONResponse(error.as_json(), error.status, {"Retry-After": "5"} if error.status == 503 else None)


async def _read_body(request: Request) -> Mapping[str, Any]:
    """Return the fields of a JSON body; of a picture's bytes, {"picture": bytes} and the query's fields."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_picture = kind.startswith("image/") or kind == "application/octet-stream"
    if not is_picture and kind != "application/json":  # nor what a page of another origin may send unasked
        expectation = "application/json, image/png, image/jpeg or image/webp"
        raise Refusal(f"Content-Type: {kind[:80]}", expectation, "set this header", 415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MOST_BYTES:
                    most = f"at most {MOST_BYTES >> 20} MiB"
                    raise Refusal("a body that is too large", most, "send a smaller picture", 413)
    except (TimeoutError, ClientDisconnect):  # of the latter nobody reads the refusal
        raise Refusal("half a body", f"all of it within {BODY_S} s", "send it again", 408) from None
    if is_picture:
        return {**{name: _as_value(value) for name, value in request.query_params.items()}, "picture": bytes(body)}
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"a body that is not JSON ({str(error)[:80]})", "a JSON object", "correct the body") from None
    if not isinstance(given, dict):
        raise Refusal("a body that is not an object", '{"prompt": "..."}, or as the route wants', "correct the body")
    return given


def _as_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _submit(batcher: Batcher, order: Order) -> tuple[Job, "asyncio.Queue[tuple[Event, bool]]"]:
    """Queue an order; its events arrive in the queue that is returned, each with whether it is the last."""
    events: asyncio.Queue[tuple[Event, bool]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def put(event: Event, is_last: bool) -> None:
        if event["event"] != "step" or events.qsize() < MOST_UNREAD:
            events.put_nowait((event, is_last))

    def listen(event: Event, is_last: bool) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads any more
            loop.call_soon_threadsafe(put, event, is_last)

    return batcher.submit(order, listen), events


async def _lines(job: Job, events: "asyncio.Queue[tuple[Event, bool]]") -> AsyncIterator[str]:
    """Yield each event as a line of JSON; a client that hangs up cancels the job."""
    try:
        is_last = False
        while not is_last:
            event, is_last = await events.get()
            yield dumps(event) + "\n"
    finally:
        job.cancel()


async def _last(job: Job, events: "asyncio.Queue[tuple[Event, bool]]", request: Request) -> Event:
    """Return the last event; a client that hangs up cancels the job."""

    async def wait_for_hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    hang_up = asyncio.create_task(wait_for_hang_up())
    try:
        while True:
            event, is_last = await events.get()
            if is_last:
                return event
    finally:
        hang_up.cancel()
        job.cancel()
