"""What a request has to fulfil before anything of it is parsed: an ASGI middleware."""

from __future__ import annotations

import hmac
import json
from collections.abc import Collection, Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["MOST_BODY_BYTES", "Guard"]

MOST_BODY_BYTES = 1 << 20

HARMLESS = ("GET", "HEAD", "OPTIONS")


class Guard:
    """Refuses foreign hosts, changes without the token, and bodies that are too large, in this order.

    A page of another site can make its own name resolve to our address (DNS rebinding), and its scripts may then read
    what we answer. The browser still sends that name as the host. So the host has to be an address, localhost, or one
    of the given names.

    Args:
        app: What is guarded.
        token: What a client has to show before it may change anything.
        hosts: Names of this service.
        headers: Are added to every answer.
    """

    def __init__(
        self, app: ASGIApp, *, token: str, hosts: Collection[str] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        self._app = app
        self._added = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        self._token = token.encode()
        self._hosts = frozenset(hosts) | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, send = scope["headers"], self._adding(send)
        if not self._is_our_name([value for name, value in headers if name == b"host"]):
            await _refuse(send, 400, "this service does not go by that host name; --allow-host adds names")
            return
        if scope["method"] not in HARMLESS and not self._has_token(headers):
            text = "changing anything needs the token that the service printed when it started"
            await _refuse(send, 401, text, (b"www-authenticate", b"Bearer"))
            return
        body = await _read(headers, receive)
        if body is None:
            await _refuse(send, 413, f"a body has at most {MOST_BODY_BYTES} bytes", (b"connection", b"close"))
            return
        await self._app(scope, _replay(body, receive), send)

    def _adding(self, send: Send) -> Send:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._added]}
            await send(message)

        return with_headers

    def _is_our_name(self, given: list[bytes]) -> bool:
        try:
            (host,) = given
            name = urlsplit(f"//{host.decode('ascii')}").hostname or ""
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            ip_address(name)
        except ValueError:
            return False
        return True

    def _has_token(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = [value for name, value in headers if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


async def _read(headers: list[tuple[bytes, bytes]], receive: Receive) -> bytes | None:
    """Return the whole body; None if it is, or says that it is, too long."""
    for name, value in headers:
        if name == b"content-length" and (not value.isdigit() or len(value) > 12 or int(value) > MOST_BODY_BYTES):
            return None
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body
        body += message.get("body", b"")
        if len(body) > MOST_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body that has been read, and then waits for the client to leave."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Send, status: int, detail: str, *headers: tuple[bytes, bytes]) -> None:
    kind = (b"content-type", b"application/json")
    await send({"type": "http.response.start", "status": status, "headers": [kind, *headers]})
    await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})
