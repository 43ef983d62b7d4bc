"""Who may ask: the door of the server, before any route.

On loopback every program of this machine may; a web page that the user happens to have open may not. Its requests are
known by their Host (a foreign name that resolves to 127.0.0.1: DNS rebinding) and their Origin, and JSON or a picture
cannot be posted across origins without a permission that this server never gives. Elsewhere, or wherever a token is
set, each request of the API carries it.
"""

import hmac
import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from train.serving.orders import Refusal

TOKEN = "TRANSFUSION_TOKEN"  # environment; no option, as command lines and printed configs are read by others (P11)
LEAST_TOKEN = 16  # characters
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; connect-src 'self'; "
POLICY += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def read_token(host: str) -> str | None:
    """Return the environment's token; raise ValueError for a weak one, or if `host` needs one and there is none."""
    token = os.environ.get(TOKEN)
    make = f"export {TOKEN}=$(openssl rand -hex 16)"
    if token is None and not is_loopback(host):
        raise ValueError(
            f"host={host}: others can reach it, and {TOKEN} is not set: expected a token there; {make}, or leave host "
            "out and use an SSH tunnel"
        )
    if token is not None and (len(token) < LEAST_TOKEN or not (token.isascii() and token.isprintable())):
        raise ValueError(f"{TOKEN} is weak: expected at least {LEAST_TOKEN} printable ASCII characters; {make}")
    return token


class Guard:
    """ASGI middleware: checks Host, Origin and token, and sets the headers of every answer."""

    def __init__(self, app: ASGIApp, host: str, token: str | None) -> None:
        self.app, self.host, self._token = app, host, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except Refusal as refusal:
            headers: dict[str, Any] = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
            answer = JSONResponse(refusal.as_json(), refusal.status, headers)
            return await answer(scope, receive, send_with_headers)
        return await self.app(scope, receive, send_with_headers)

    def _check(self, path: str, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if is_loopback(self.host) and not (is_loopback(name := _name(host)) or name == self.host):
            raise Refusal(f"Host: {host[:80]}", "this machine's own name", "use the address that was printed", 403)
        if origin is not None and origin.partition("://")[2] != host:
            raise Refusal(f"Origin: {origin[:80]}", "the server's own page", "open the page of this server", 403)
        if self._token is None or not path.startswith("/api/"):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self._token.encode()):
            found, remedy = "no token, or not the right one", "send Authorization: Bearer ..."
            raise Refusal(found, f"the server's {TOKEN}", remedy, 401)


def _name(host: str) -> str | None:
    """Return the name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
