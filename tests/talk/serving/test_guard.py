"""What stands before the routes: keys, Host, sizes and times, and what is logged."""

import base64
import hmac
import json
import time
from pathlib import Path

import httpx
import pytest

from graftlm.talk.serving.guard import is_loopback

KEY = "correct-horse-battery-staple"


def test_every_route_but_health_wants_the_key(start, parrot, tokenizer, monkeypatch, capsys) -> None:
    """S6, S13: wrong keys are compared whole, in constant time, and none is logged."""
    running = start(parrot(tokenizer.encode_continuation("ok")), key=KEY)
    compared: list[bytes] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: bool(compared.append(a)) or compare(a, b))
    body = {"messages": [{"role": "user", "content": "x"}]}
    routes = [
        "/",
        "/v1/models",
        "/v1/models/tiny",
        "/metrics",
        "/v1/chat/completions",
        "/nowhere",
        "//health",
    ]
    wrong = [{}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Bearer {KEY[:-1]}"}, {"Authorization": KEY},
             {"Authorization": "Bearer \xff"}, {"Authorization": "Basic !"},
             {"Authorization": f"Token {KEY}"}]  # fmt: skip
    for route in routes:
        for headers in wrong if route == "/v1/models" else wrong[:1]:
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            answer = httpx.get(running.url + route, headers=encoded)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            challenge = answer.headers["www-authenticate"]
            assert challenge.startswith("Basic" if route == "/" else "Bearer")
    assert running.post(body).status_code == 401
    assert f"{KEY}x".encode() in compared
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    basic = base64.b64encode(f"me:{KEY}".encode()).decode()
    for scheme in (f"Bearer {KEY}", f"bearer {KEY}", f"Basic {basic}"):
        assert running.post(body, headers={"Authorization": scheme}).status_code == 200
    told = capsys.readouterr().err
    assert "GET - 401" in told
    assert KEY[:-1] not in told


@pytest.mark.parametrize(
    ("host", "is_served"),
    [("localhost", True), ("127.0.0.1:8000", True), ("[::1]:8000", True), ("LOCALHOST:1", True),
     ("evil.example", False), ("127.0.0.1.evil.example", False), ("192.0.2.7", False),
     ("", False), ("localhost@evil.example", False)],
)  # fmt: skip
def test_only_this_machine_s_names_are_answered(server, host: str, is_served: bool) -> None:
    """S7: a page elsewhere whose name points here (DNS rebinding) gets nothing, health included."""
    for route in ("/v1/models", "/health"):
        answer = httpx.get(server.url + route, headers={"Host": host})
        assert answer.status_code == (200 if is_served else 421)


def test_a_server_for_others_is_asked_by_address_or_its_own_name(start, parrot, tokenizer) -> None:
    """S7: beyond loopback, any IP address and the machine's names."""
    bot = parrot(tokenizer.encode_continuation("ok"))
    running = start(bot, key=KEY, hosts=("box.example",), any_address=True)
    for host, status in (("192.0.2.7:8000", 200), ("[2001:db8::1]", 200), ("box.example", 200), ("evil.example", 421)):
        assert httpx.get(f"{running.url}/health", headers={"Host": host}).status_code == status
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "0.0.0.0", "::", "box")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_huge_body_is_refused_before_it_comes(server) -> None:
    """S4: by its declared length, with nothing of it read."""
    connection = server.connect()
    connection.sendall(HEAD + b"Content-Length: 200000000\r\n\r\n")
    answer = b""
    while b"}}" not in answer:
        answer += connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"2,097,152 bytes" in answer
    connection.close()


def test_a_huge_body_without_a_length_is_cut_off_early_and_memory_stays_flat(server) -> None:
    """S4: 200 MB in chunks: refused after 2 MiB, the rest thrown away as it comes."""
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("memory is read from /proc")
    connection = server.connect()
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    before = int(resident.read_text().split()[1])
    sent, answer = 0, b""
    connection.setblocking(True)
    while sent < 190:
        try:
            connection.sendall(chunk)
        except ConnectionError:
            break
        sent += 1
        if sent == 40:
            answer = connection.recv(4096)  # long before the end
            assert answer.startswith(b"HTTP/1.1 413 ")
    grown_bytes = (int(resident.read_text().split()[1]) - before) * 4096
    connection.close()
    assert answer
    assert grown_bytes < 30 * 2**20


def test_a_body_that_trickles_in_is_given_up(start, parrot, tokenizer) -> None:
    """S2: the time for a whole body is bounded, however steadily it drips."""
    running = start(parrot(tokenizer.encode_continuation("ok")), body_seconds=0.5)
    connection = running.connect()
    connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
    started = time.monotonic()
    connection.setblocking(False)
    received = b""
    while time.monotonic() - started < 10 and not received:
        try:
            connection.sendall(b" ")
            time.sleep(0.05)
            received = connection.recv(4096)
        except BlockingIOError:
            continue
    connection.settimeout(10)
    while more := connection.recv(4096):
        received += more
    assert received.startswith(b"HTTP/1.1 408 ")
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_faults_of_ours_are_told_without_words(start, parrot, tokenizer, monkeypatch, capsys) -> None:
    """S12, S13: an error nobody foresaw is a 500 in OpenAI's shape; its message stays out of the log."""
    running = start(parrot(tokenizer.encode_continuation("ok")))

    def fail() -> dict[str, float]:
        raise RuntimeError("a private matter")

    monkeypatch.setattr(running.models[0].backend, "figures", fail)
    answer = httpx.get(f"{running.url}/metrics?key=private")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    told, until = "", time.monotonic() + 10
    while "RuntimeError" not in told and time.monotonic() < until:  # the log may come after the answer
        time.sleep(0.01)
        told += capsys.readouterr().err
    assert "A request failed: RuntimeError" in told
    assert "private" not in told
    assert httpx.get(f"{running.url}/health").status_code == 200
