"""The listening socket: where it may be bound, how long a client may take, and how it stops.

Owns sockets, signals and connections' time limits. Does not know routes or models.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from graftlm.errors import UserError
from graftlm.run import say
from graftlm.talk.serving.guard import is_loopback

HEADER_SECONDS = 10
# A reader who takes nothing for so long is taken for gone.
WRITE_SECONDS = 60
# Longest wait for answers under way after TERM; a second TERM or Ctrl-C ends it at once.
DRAIN_SECONDS = 120
MAX_CONNECTIONS = 512
MIN_KEY_CHARACTERS = 16
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.IGNORECASE | re.ASCII)


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with limits uvicorn has none for: headers that trickle in, readers that never read."""

    header_seconds: float = HEADER_SECONDS
    write_seconds: float = WRITE_SECONDS
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has come: its first request must come too."""
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Bytes have come; while they end no header, time runs."""
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """The client does not take what we send."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def _watch_headers(self) -> None:
        is_waiting = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if is_waiting and self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_seconds, self.transport.abort)
        elif not is_waiting and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


class _Server(uvicorn.Server):
    """uvicorn's server, telling when it is ready, and returning after TERM instead of dying of it."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, then tell so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first TERM or Ctrl-C drains, the second ends at once; neither is raised again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        before = {name: signal.signal(name, self.handle_exit) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


def read_key(file: Path | None, host: str, names: Sequence[str] = ()) -> str | None:
    """The key in `file`. Raises UserError for a key that is none, and for a server others reach that asks for none.

    Others reach one that is bound to `host` beyond this machine, or known by `names` to a proxy.
    """
    if file is None:
        if is_loopback(host) and not names:
            return None
        flag, value = ("--host-name", names[0]) if is_loopback(host) else ("--host", host)
        raise UserError(
            f"{flag} {value} lets other machines in, and no key is asked for.",
            f"Add --api-key-file FILE, or leave {flag} out: then only this machine reaches the server.",
        )
    try:
        key = file.read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        raise UserError(f"{file} holds other characters than ASCII.", _NEW_KEY.format(file)) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.", _NEW_KEY.format(file)) from None
    if len(key) < MIN_KEY_CHARACTERS or any(character.isspace() for character in key):
        problem = f"{file} holds no key of at least {MIN_KEY_CHARACTERS} characters without spaces."
        raise UserError(problem, _NEW_KEY.format(file))
    return key


_NEW_KEY = 'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))" > {}'


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes any free one. Raises UserError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{host} port {port} cannot be listened on: {reason}.", "Give another --port or --host."
        ) from None
    return bound


def host_names(host: str, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Names under which a server bound to `host` may be asked for, beside the loopback's; `names` are the user's own.

    Raises UserError for one that is no name of a host.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"--host-name {name} is no host's name.",
                "Give the name alone, without http:// and port: --host-name chat.example.org",
            )
    return tuple(names) if is_loopback(host) else (*names, host.strip("[]"), socket.gethostname(), socket.getfqdn())


def shown_addresses(host: str, port: int) -> tuple[str, ...]:
    """Where a server bound to `host` can be asked: here, and where it differs, from other machines."""
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host)
    hosts = (here, socket.gethostname()) if here else (f"[{host}]" if ":" in host else host,)
    return tuple(f"http://{name}:{port}/" for name in hosts)


def make_server(app: Any, on_ready: Callable[[], None], drain_seconds: int = DRAIN_SECONDS) -> uvicorn.Server:
    """The server of an ASGI app; `on_ready` is called once it listens."""
    config = uvicorn.Config(
        app, http=PatientProtocol, ws="none", loop="asyncio", lifespan="on", access_log=False, log_level="warning",
        server_header=False, proxy_headers=False, limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=30,
        timeout_graceful_shutdown=drain_seconds,
    )  # fmt: skip
    return _Server(config, on_ready)


def run_server(app: Any, bound: socket.socket) -> None:
    """Serve until TERM or Ctrl-C, then let answers under way end. Raises UserError when a model cannot start."""
    here, *elsewhere = shown_addresses(*bound.getsockname()[:2])
    others = f" From other machines: {elsewhere[0]}." if elsewhere else ""

    def ready() -> None:
        say(f"Ready: {here} (page), {here}v1 (OpenAI's API).{others} Ctrl-C stops it.")

    server = make_server(app, ready)
    server.run(sockets=[bound])
    if not server.started:
        raise UserError("The server could not start.", "The lines above tell why.")
