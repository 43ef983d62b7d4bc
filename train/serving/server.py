"""uvicorn with this house's signals: the first one ends all requests and then the server, with 0 or 130 (Ctrl-C)."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

MOST_CONNECTIONS = 64
GRACE_S = 5  # for clients to read their last events
SILENT_S = 20  # that a connection may be open without a whole request: it counts among the most


class Server(uvicorn.Server):
    """Serves `app` on a bound socket; `begun` is called when it listens, `stop` at the first signal."""

    def __init__(self, app: ASGIApp, listener: socket.socket, begun: Callable[[], object], stop: Callable[[], object]):
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                http="h11",
                loop="asyncio",
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self.status = 0  # of the program
        self._silent_since: dict[Any, float] = {}  # by connection
        self._listener, self._begun, self._stop = listener, begun, stop

    async def until_signal(self) -> int:
        """Serve until SIGINT or SIGTERM; return the exit status. A second signal ends the process at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end, number)
        await self.serve(sockets=[self._listener])
        return self.status

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._begun()

    async def on_tick(self, counter: int) -> bool:
        self._close_silent(time.monotonic())
        return await super().on_tick(counter)

    def _close_silent(self, now: float) -> None:
        """Close connections whose next request does not come; while one is answered, its own rules hold."""
        connections: set[Any] = self.server_state.connections
        silent = [one for one in connections if one.cycle is None or one.cycle.response_complete]
        self._silent_since = {one: self._silent_since.get(one, now) for one in silent}
        for one, since in self._silent_since.items():
            if now - since > SILENT_S:
                one.transport.close()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # uvicorn would catch them and raise them again at its end

    def _end(self, number: int) -> None:
        asyncio.get_running_loop().remove_signal_handler(number)
        self.status = 130 if number == signal.SIGINT else 0
        self._stop()
        self.should_exit = True
