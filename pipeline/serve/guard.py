"""Checked of every request before anything else: its host, its key, the size of its body and how fast it arrives."""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health",)
"""Paths that need no key."""


def is_local(host: str) -> bool:
    """Whether a name or an address always means this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Refused(Exception):
    """The body is too long or comes too slowly."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Guard:
    """ASGI middleware, the outermost one."""

    app: App
    key: str | None
    """The key that requests must bring; None on this machine alone, where only local host names are answered."""
    body: int
    """The most bytes of a request's body."""
    seconds: float
    """How long a request's body may take to arrive."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refused(scope["path"], headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        if (length := headers.get(b"content-length", b"0")).isdigit() and int(length) > self.body:
            await self._discard(receive)
            await _answer(send, 413, f"the body has {int(length):,} bytes; this server takes {self.body:,} at most")
            return
        try:
            body = await self._whole_body(receive)
        except _Refused as error:
            await _answer(send, error.status, error.message)
            return
        if body is not None:  # HEAD is answered as GET is, and the server below sends no body to it
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            await self.app({**scope, "method": method}, _given(body, receive), send)

    def _refused(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Why a request is refused before its body is read; None if it is not."""
        if path in OPEN:
            return None
        if self.key is not None:
            if not self._is_key(headers.get(b"authorization", b"")):
                return 401, "the key is missing or wrong; send it as `Authorization: Bearer KEY`"
            return None
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if not is_local(name):  # a page elsewhere must not reach this server by a name of its own (DNS rebinding)
            return 403, f"this server answers requests to localhost and loopback addresses, not to `{name}`"
        return None

    def _is_key(self, header: bytes) -> bool:
        """Compares in constant time. A browser asks for a password and sends it as `Basic`; its user name is free."""
        scheme, _, given = header.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                given = b""
        elif scheme.lower() != b"bearer":
            given = b""
        digests = [hashlib.sha256(text).digest() for text in (given.strip(), (self.key or "").encode())]
        return hmac.compare_digest(*digests)

    async def _discard(self, receive: Receive) -> None:
        """Read on, to 16 times the bound: a client that is still sending would not see why its body is refused."""
        left = 16 * self.body
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.seconds):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    async def _whole_body(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client left. Raises _Refused."""
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    if sum(map(len, parts)) > self.body:
                        if message.get("more_body", False):
                            await self._discard(receive)
                        raise _Refused(413, f"the body is too long; this server takes {self.body:,} bytes at most")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise _Refused(408, f"the body did not arrive within {self.seconds:g} s") from None


def _given(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the body once, then what comes after it: the client's leaving."""
    parts = [body]

    async def given() -> MutableMapping[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        return await receive()

    return given


async def _answer(send: Send, status: int, message: str) -> None:
    body = json.dumps(error_body(status, message), ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="stagewise", charset="UTF-8"'))
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
