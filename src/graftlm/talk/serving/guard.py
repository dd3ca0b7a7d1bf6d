"""What stands before the routes: Host, key, size and time of a request, and one log line that tells nobody's words.

Owns the limits and the order in which they are checked. Does not know routes, bodies or models. A plain ASGI layer:
a body is read here, bounded in bytes and seconds, before anything is parsed or the framework holds it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import ipaddress
import json
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from graftlm.run import say
from graftlm.talk.serving.faults import tell_fault
from graftlm.talk.serving.metrics import Metrics

MAX_BODY_BYTES = 2 * 2**20
BODY_SECONDS = 30
# A client that is refused while still sending would lose our answer to a reset; so long its bytes are thrown away.
LINGER_SECONDS = 3
OPEN_ROUTES = ("/health",)
PAGE_ROUTES = ("/",)
QUIET_ROUTES = ("/health", "/metrics")

Message = MutableMapping[str, Any]
_NAMES = ("localhost", "127.0.0.1", "::1")


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """Wraps an ASGI app. `key` None asks for none; `hosts` are names allowed beside this machine's loopback ones.

    `any_address`: also allow every Host that is an IP address. No web page of another origin can be under it.
    """

    def __init__(
        self, app: Any, *, key: str | None, hosts: tuple[str, ...], any_address: bool, metrics: Metrics,
        max_body_bytes: int = MAX_BODY_BYTES, body_seconds: float = BODY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._app, self._metrics, self._clock = app, metrics, clock
        self._key = None if key is None else key.encode()
        self._hosts = frozenset({*_NAMES, *(host.lower() for host in hosts)})
        self._any_address = any_address
        self._max_body_bytes, self._body_seconds = max_body_bytes, body_seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Check a request, then let the app answer it; tell its status and time."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = self._clock(), 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._checked(scope, receive, noting_send)
        except Exception as error:  # told without its message, which may quote what people said
            tell_fault("A request", error)
            if not status:
                text = "A fault of the server, not yours. Its log tells where."
                await _refuse(noting_send, 500, error_body(text, "server_error"))
        finally:
            self._tell(scope, status, self._clock() - started)

    def _tell(self, scope: Any, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", None) or (scope["path"] if scope["path"] in OPEN_ROUTES + PAGE_ROUTES else "-")
        self._metrics.count_request(path, status)
        if path not in QUIET_ROUTES:
            tokens = scope.get("graftlm_tokens", "")
            say(f"{scope['method']} {path} {status or 'left'} {seconds:.2f} s{tokens}")

    async def _checked(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_allowed(host):
            fix = "use the address that `graftlm serve` printed, or start it with --host-name"
            text = f"This Host name is not served here: {fix}."
            await _refuse(send, 421, error_body(text, "invalid_request_error", None, "host_not_allowed"))
            return
        if scope["path"] not in OPEN_ROUTES and not self._has_key(headers.get(b"authorization", b"")):
            challenge = b"Basic" if scope["path"] in PAGE_ROUTES else b"Bearer"
            text = "Incorrect API key provided. Send it as Authorization: Bearer KEY."
            await _refuse(
                send, 401, error_body(text, "authentication_error", None, "invalid_api_key"),
                (b"www-authenticate", challenge + b' realm="graftlm"'),
            )  # fmt: skip
            return
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            await self._refuse_size(receive, send)
            return
        await self._with_body(scope, receive, send)

    async def _with_body(self, scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes or not message.get("more_body", False):
                        break
        except TimeoutError:
            text = f"The body did not come within {self._body_seconds:g} seconds."
            await _refuse(send, 408, error_body(text, "invalid_request_error"), (b"connection", b"close"))
            return
        if len(body) > self._max_body_bytes:
            body.clear()
            await self._refuse_size(receive, send)
            return
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            message, whole = whole, None
            return message if message is not None else await receive()

        await self._app(scope, replay, send)

    async def _refuse_size(self, receive: Any, send: Any) -> None:
        text = f"The body is larger than {self._max_body_bytes:,} bytes."
        answer = error_body(text, "invalid_request_error", None, "request_too_large")
        await _begin(send, 413, answer, (b"connection", b"close"))
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while (message := await receive())["type"] != "http.disconnect" and message.get("more_body", False):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _is_allowed(self, host: str) -> bool:
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        return name in self._hosts or (self._any_address and is_address(name))

    def _has_key(self, header: bytes) -> bool:
        """Whether `Authorization` carries the key; takes the same time however much of a wrong one is right."""
        if self._key is None:
            return True
        scheme, _, value = header.partition(b" ")
        given = value.strip()
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                given = b""
        elif scheme.lower() != b"bearer":
            given = b""
        return hmac.compare_digest(given, self._key)


def is_address(name: str) -> bool:
    """Whether a host is written as an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


async def _begin(send: Any, status: int, answer: dict[str, Any], *more: tuple[bytes, bytes]) -> None:
    body = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _refuse(send: Any, status: int, answer: dict[str, Any], *more: tuple[bytes, bytes]) -> None:
    await _begin(send, status, answer, *more)
    await send({"type": "http.response.body", "body": b"", "more_body": False})
