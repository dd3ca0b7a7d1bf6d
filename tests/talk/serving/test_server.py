"""The listening socket: headers that trickle in, readers that never read, where it may be bound, how it stops."""

import contextlib
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from child import in_background

from graftlm.cli import main
from graftlm.errors import UserError
from graftlm.model.causal import save_causal
from graftlm.talk.serving.serve import model_names, serve
from graftlm.talk.serving.server import PatientProtocol, bind, host_names, read_key, shown_addresses
from graftlm.text.dialogue import CARD


@pytest.mark.parametrize(
    "start_of_request", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "]
)
def test_headers_that_never_end_close_the_connection(start, endless, monkeypatch, start_of_request: bytes) -> None:
    """S2: nothing, half a line, or drop by drop."""
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.3)
    running = start(endless)
    connection = running.connect()
    connection.sendall(start_of_request)
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            if start_of_request.endswith(b"X: "):
                connection.sendall(b"x")
            if select.select([connection], [], [], 0.05)[0]:
                break
        assert connection.recv(100) == b""
    assert httpx.get(f"{running.url}/health").status_code == 200


def test_a_second_request_must_come_whole_too(start, endless, monkeypatch) -> None:
    """S2: on a connection kept alive, and a slow answer is not taken for slow headers."""
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.2)
    running = start(endless)
    connection = running.connect()
    body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 300}'
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    received = b""
    while not received.endswith(b'"total_tokens":') and b"total_tokens" not in received:
        received += connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 200 ")
    connection.sendall(b"GET /hea")
    assert connection.makefile("rb").read() == b""


def test_a_reader_who_takes_nothing_is_let_go(start, endless, monkeypatch) -> None:
    """S2, S3: a stream nobody reads is given up, and the model with it."""
    monkeypatch.setattr(PatientProtocol, "write_seconds", 0.3)
    running = start(endless, send_buffer_bytes=4096)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", running.port))
    body = b'{"messages": [{"role": "user", "content": "x"}], "stream": true, "logprobs": true, "top_logprobs": 20}'
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    while not running.engine.counts.cancelled:
        assert not running.engine.counts.finished
        time.sleep(0.02)
    connection.close()


def test_others_are_let_in_with_a_key_only(tmp_path: Path) -> None:
    """S6: told before any model is loaded."""
    for host in ("0.0.0.0", "::", "192.0.2.7"):
        with pytest.raises(UserError, match="no key is asked for") as told:
            serve(["/nowhere"], host, 0, None, "own")
        assert "--api-key-file" in told.value.fix
    with pytest.raises(UserError, match=r"--host-name chat\.example lets other machines in, and no key"):
        serve(["/nowhere"], "127.0.0.1", 0, None, "own", ["chat.example"])
    key = tmp_path / "key"
    key.write_text("correct-horse-battery-staple\n")
    assert read_key(key, "0.0.0.0") == "correct-horse-battery-staple"
    assert read_key(None, "127.0.0.1") is None
    for bad in ("", "short", "with a space in the middle of it"):
        key.write_text(bad)
        with pytest.raises(UserError, match="at least 16 characters"):
            read_key(key, "127.0.0.1")
    key.write_text("schlüssel-schlüssel")
    with pytest.raises(UserError, match="other characters than ASCII"):
        read_key(key, "127.0.0.1")
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "none", "127.0.0.1")


def test_addresses_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match="cannot be listened on"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="cannot be listened on"):
        bind("no.such.host.invalid", 8000)
    with pytest.raises(UserError, match="There is no model folder /nowhere/at/all"):
        serve(["/nowhere/at/all"], "127.0.0.1", 0, None, "own")
    with pytest.raises(UserError, match="3 models were named"):
        serve(["a", "b", "c"], "127.0.0.1", 0, None, "own")
    (tmp_path / "m").mkdir()
    assert model_names([str(tmp_path / "m"), str(tmp_path / "m"), "name/on-hub"]) == ["m", "m-2", "name/on-hub"]
    assert host_names("127.0.0.1") == ()
    assert "box.example" in host_names("box.example")


def test_a_name_of_the_user_s_is_answered_and_what_is_none_refused() -> None:
    assert host_names("127.0.0.1", ["chat.example"]) == ("chat.example",)
    assert host_names("0.0.0.0", ["chat.example", "box"])[:3] == ("chat.example", "box", "0.0.0.0")
    for wrong in ("https://chat.example", "chat.example:443", "", "a b", "chat.example/", "*.example"):
        with pytest.raises(UserError, match="is no host's name"):
            host_names("127.0.0.1", [wrong])


def test_the_address_told_can_be_opened() -> None:
    """Nobody can open 0.0.0.0: this machine's own address is told, and its name for others."""
    name = socket.gethostname()
    assert shown_addresses("0.0.0.0", 80) == ("http://127.0.0.1:80/", f"http://{name}:80/")
    assert shown_addresses("::", 80) == ("http://[::1]:80/", f"http://{name}:80/")
    assert shown_addresses("192.0.2.7", 80) == ("http://192.0.2.7:80/",)
    assert shown_addresses("2001:db8::1", 80) == ("http://[2001:db8::1]:80/",)


@pytest.fixture(scope="module")
def folder(tokenizer, endless, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("served") / "words"
    save_causal(endless.model, path, also=lambda folder: tokenizer.save(folder, chat_template=CARD.jinja))
    return path


def serve_words(folder: Path, key: Path, log: Path) -> None:
    """`graftlm serve` as people start it, in a child."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = ["graftlm", "serve", str(folder), "--port", "0", "--api-key-file", str(key)]
    main()


@pytest.fixture
def process(folder: Path, tmp_path: Path) -> Iterator[tuple[Any, str, Path]]:
    """A server in a process of its own, with its address and its log."""
    log, key = tmp_path / "log", tmp_path / "key"
    key.write_text("correct-horse-battery-staple")
    log.touch()
    started = in_background(serve_words, folder, key, log)
    deadline = time.monotonic() + 120
    while not (found := re.search(r"Ready: (http://127\.0\.0\.1:\d+)/", log.read_text())):
        assert started.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield started, found[1], log
    started.kill()
    started.join()


def is_refused(url: str) -> bool:
    """Whether nobody listens any more."""
    try:
        httpx.get(f"{url}/health", timeout=1)
    except httpx.TransportError:
        return True
    return False


def test_term_lets_answers_end_and_takes_no_new_ones(process) -> None:
    """S11, S13: TERM in the middle of a stream; the whole answer comes, the log holds neither words nor key."""
    child, url, log = process
    headers = {"Authorization": "Bearer correct-horse-battery-staple"}
    body = {"messages": [{"role": "user", "content": "a private matter"}], "stream": True, "max_tokens": 600}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60) as answer:
        lines = answer.iter_lines()
        received = [next(lines) for _ in range(20)]
        os.kill(child.pid, signal.SIGTERM)
        while not is_refused(url):
            time.sleep(0.01)
        received += lines
    events = [line for line in received if line]
    assert events[-1] == "data: [DONE]"
    assert len(events) > 600
    child.join(20)
    assert child.exitcode == 0
    told = log.read_text()
    assert "POST /v1/chat/completions 200" in told
    for secret in ("private", "correct-horse"):
        assert secret not in told
