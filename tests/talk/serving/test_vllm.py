"""vLLM as a backend, played by a stand-in that speaks its server's protocol: ids in, ids and text back."""

import sys
import textwrap
import time
from pathlib import Path

import pytest

from graftlm.errors import UserError
from graftlm.model.causal import save_causal
from graftlm.talk.generate import ask
from graftlm.talk.serving.vllm import served_by_vllm
from graftlm.text.dialogue import CARD, render

# Says "<num prompt ids> <what was asked>" token by token; keeps what it was asked and whether a client left early.
STAND_IN = """
import argparse, json, os, http.server, pathlib, socketserver, time
parser = argparse.ArgumentParser()
for flag in ("--model", "--served-model-name", "--host", "--port", "--max-model-len"):
    parser.add_argument(flag)
given = parser.parse_args()
seen = pathlib.Path(os.environ["STAND_IN_LOG"])

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        assert self.headers["Authorization"] == "Bearer " + os.environ["VLLM_API_KEY"]
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with seen.open("a") as log: log.write(json.dumps({**asked, "path": self.path}) + "\\n")
        if asked["max_tokens"] == 13:
            self.send_response(500); self.end_headers(); return
        self.send_response(200); self.end_headers()
        endless = asked["max_tokens"] > 300
        try:
            for number in range(10**9 if endless else 3):
                last = number == 2 and not endless
                logprobs = {"tokens": ["token_id:5"], "token_logprobs": [-1.0], "top_logprobs": [{"token_id:6": -0.5}]}
                choice = {"index": 0, "text": f"{number} ", "finish_reason": "length" if last else None,
                          "logprobs": logprobs if "logprobs" in asked else None}
                event = {"choices": [choice], "usage": {"completion_tokens": number + 1}}
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n"); self.wfile.flush()
                if endless: time.sleep(0.01)
            self.wfile.write(b"data: [DONE]\\n\\n")
        except OSError:
            with seen.open("a") as log: log.write("left\\n")

class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
Server((given.host, int(given.port)), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package called vllm where children find it; returns the file of what it was asked."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    (package / "api_server.py").write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    log = tmp_path / "asked.jsonl"
    monkeypatch.setenv("STAND_IN_LOG", str(log))
    return log


@pytest.fixture
def folder(chatbot, tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save_causal(chatbot.model, path, also=lambda folder: tokenizer.save(folder, chat_template=CARD.jinja))
    return path


def test_without_vllm_the_next_command_is_told(folder: Path) -> None:
    if "vllm" in sys.modules:
        pytest.skip("vllm is installed")
    with pytest.raises(UserError, match="not installed") as told:
        served_by_vllm(str(folder), "model")
    assert "pip install vllm" in told.value.fix


def test_a_child_that_ends_at_once_is_told(folder: Path, stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "site" / "vllm" / "entrypoints" / "openai" / "api_server.py").write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match="vLLM ended"):
        served_by_vllm(str(folder), "model")


def test_the_same_routes_are_answered_through_it(folder: Path, stand_in: Path, serve_models, tokenizer) -> None:
    """S3, S10, S12, T2: our ids, our ends, nothing forbidden; leaving and failing reach it and come back."""
    import json

    model = served_by_vllm(str(folder), "big")
    running = serve_models([model])
    client = running.client()
    text = "</s> hi"
    options = {"model": "big", "messages": [{"role": "user", "content": text}], "max_tokens": 9}
    answer = client.chat.completions.create(
        **options, n=2, seed=4, stop=["x"], logprobs=True, top_logprobs=1, extra_body={"top_k": 3}
    )
    assert [choice.message.content for choice in answer.choices] == ["0 1 2 "] * 2
    assert answer.choices[0].finish_reason == "length"
    prompt = render(ask(text), tokenizer, CARD, for_reply=True).ids
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 6)
    told = answer.choices[0].logprobs.content[0]
    assert (bytes(told.bytes), told.logprob) == (tokenizer.token_bytes(5), -1.0)
    assert bytes(told.top_logprobs[0].bytes) == tokenizer.token_bytes(6)
    asked = [json.loads(line) for line in stand_in.read_text().splitlines()]
    assert {entry["seed"] for entry in asked} == {4, 5}
    first = asked[0]
    assert (first["path"], first["prompt"], first["stop"], first["top_k"]) == ("/v1/completions", prompt, ["x"], 3)
    assert first["stop_token_ids"] == [tokenizer.eos_id]
    padding = [str(i) for i in range(tokenizer.num_pieces, tokenizer.num_pieces + 20)]
    assert set(padding) < first["logit_bias"].keys()
    assert str(tokenizer.eos_id) not in first["logit_bias"]
    assert running.post({**options, "max_tokens": 13}).status_code == 500
    stream = client.chat.completions.create(**{**options, "max_tokens": 400}, stream=True)
    for _, chunk in zip(range(3), stream, strict=False):
        assert chunk.choices
    stream.close()
    while "left" not in stand_in.read_text():
        time.sleep(0.002)
    assert model.backend.figures() == {"answers_running": 0}
