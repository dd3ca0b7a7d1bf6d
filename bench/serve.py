"""Speed of talking: `graftlm serve` against transformers' generate and llama.cpp, one small model, one run.

    OMP_NUM_THREADS=1 python bench/serve.py MODEL [--rounds 3] [--tokens 64] [--out bench/results/DATE-cpu-serve.json]

Every engine answers the same questions greedily with one thread of computation. Servers run in processes of their own
and are asked over HTTP by the same client, streaming; `generate` is called directly. Figures are medians of the
rounds, in which the engines take turns. A machine with other work on it bends times on the clock: tokens per second
of the engine's own processor time are told beside them. llama.cpp holds its weights in f16, the others in fp32.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

CLIENTS = 32
TOPICS = ["the sea", "a garden", "bread", "music", "the moon", "a long walk", "friendship", "winter"]
FORMS = ["Write three sentences about {}.", "Give three tips about {}.", "Why do people like {}?", "Describe {}."]
QUESTIONS = [form.format(topic) for topic in TOPICS for form in FORMS]
ALONE = QUESTIONS[:8]


@dataclass
class Engine:
    """A server under measurement: its port and its process."""

    name: str
    port: int
    pid: int


@dataclass
class Told:
    """One answer: seconds until its first words, its tokens and words."""

    first_seconds: float
    tokens: int
    text: str


async def ask(port: int, question: str, max_tokens: int) -> Told:
    """One streamed answer, read by hand: a client library would take a good part of the second core."""
    body = json.dumps(
        {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": max_tokens,
         "stream": True, "stream_options": {"include_usage": True}}
    ).encode()  # fmt: skip
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    first, tokens, text = 0.0, 0, ""
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        for choice in event["choices"]:
            said = choice["delta"].get("content")
            first = first or (time.perf_counter() - began if said else 0.0)
            text += said or ""
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    writer.close()
    assert tokens, "the server told no usage"
    return Told(first, tokens, text)


def measure_server(engine: Engine, max_tokens: int) -> dict[str, Any]:
    """One client after another, then 32 at once."""

    async def alone() -> list[Told]:
        return [await ask(engine.port, question, max_tokens) for question in ALONE]

    async def together() -> list[Told]:
        return await asyncio.gather(*(ask(engine.port, question, max_tokens) for question in QUESTIONS))

    found: dict[str, Any] = {}
    for label, work in (("1", alone), (str(CLIENTS), together)):
        cpu, began = cpu_seconds(engine.pid), time.perf_counter()
        told = asyncio.run(work())
        seconds, cpu = time.perf_counter() - began, cpu_seconds(engine.pid) - cpu
        found[label] = figures(told, seconds, cpu)
    return found


def figures(told: list[Told], seconds: float, cpu: float) -> dict[str, float]:
    """Rates of some answers."""
    tokens = sum(answer.tokens for answer in told)
    return {
        "first_token_seconds": statistics.median(answer.first_seconds for answer in told),
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu,
        "tokens": tokens,
    }


def measure_generate(chatbot: Any, max_tokens: int) -> dict[str, Any]:
    """transformers' generate, one question after another; then all 32 as one padded batch that starts at once."""
    import torch
    from transformers import GenerationConfig

    from graftlm.talk.generate import ask as conversation
    from graftlm.talk.sampling import Sampling

    sampling = Sampling(max_tokens=max_tokens)
    chatbot.model.generation_config = GenerationConfig()
    prompts = [chatbot.prompt(conversation(question), sampling).ids for question in QUESTIONS]

    def generate(rows: list[list[int]], most: int) -> int:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        said = chatbot.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=most, pad_token_id=0,
            eos_token_id=sorted(chatbot.stop_ids),
        )[:, longest:]  # fmt: skip
        return int((said != 0).sum() - torch.isin(said, torch.tensor(sorted(chatbot.stop_ids))).sum())

    found: dict[str, Any] = {}
    for label, batches in (("1", [[row] for row in prompts[: len(ALONE)]]), (str(CLIENTS), [prompts])):
        firsts = []
        for batch in batches:
            began = time.perf_counter()
            generate(batch, 1)
            firsts.append(time.perf_counter() - began)
        began, cpu = time.perf_counter(), time.process_time()
        tokens = sum(generate(batch, max_tokens) for batch in batches)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        found[label] = {
            "first_token_seconds": statistics.median(firsts), "tokens_per_second": tokens / seconds,
            "tokens_per_cpu_second": tokens / cpu, "tokens": tokens,
        }  # fmt: skip
    return found


def cpu_seconds(pid: int) -> float:
    """Processor seconds a process has used, all threads. Source: proc(5), stat, fields 14 and 15."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def process(name: str, command: list[str], ready: str) -> Iterator[Engine]:
    """A server in a process of its own, once its log holds `ready` with the port."""
    with tempfile.NamedTemporaryFile("w+") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not (found := re.search(ready, Path(log.name).read_text(errors="replace"))):
                if child.poll() is not None:
                    raise SystemExit(f"{name} ended: {Path(log.name).read_text()[-2000:]}")
                time.sleep(0.1)
            yield Engine(name, int(found[1]), child.pid)
        finally:
            child.terminate()
            child.wait()


def run_llama_cpp(path: str) -> None:
    """This process becomes llama.cpp's server: one thread, 32 slots."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, 512 * CLIENTS, CLIENTS
    params.warmup, params.fit_params, params.cache_prompt = True, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print("listening", server.listening_address, flush=True)
    while True:
        time.sleep(3600)


def median_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every figure."""
    return {
        label: {name: round(statistics.median(r[label][name] for r in rounds), 4) for name in rounds[0][label]}
        for label in rounds[0]
    }


def measure(model: str, gguf: str | None, num_rounds: int, max_tokens: int) -> dict[str, Any]:
    """All engines, taking turns."""
    import torch

    from graftlm.model.causal import load_causal
    from graftlm.talk.generate import Chatbot, find_speaker

    torch.set_num_threads(1)
    folder, tokenizer, template = find_speaker(model)
    chatbot = Chatbot(load_causal(folder).eval(), tokenizer, template)  # as transformers loads it
    command = [sys.executable, "-c", "from graftlm.cli import main; main()", "serve", model, "--port", "0"]
    ours = process("graftlm", command, r"Ready: http://127\.0\.0\.1:(\d+)/")
    rounds: dict[str, list[dict[str, Any]]] = {"graftlm": [], "transformers": []}
    with ours as server:
        measure_server(server, max_tokens)  # once for nothing: buffers and caches grow
        if gguf:
            rounds["llama.cpp f16"] = []
            theirs = process("llama.cpp", [sys.executable, __file__, "--llama", gguf], r"listening http://[^:]+:(\d+)")
            with theirs as other:
                measure_server(other, max_tokens)
                for _ in range(num_rounds):
                    rounds["llama.cpp f16"].append(measure_server(other, max_tokens))
                    rounds["graftlm"].append(measure_server(server, max_tokens))
                    rounds["transformers"].append(measure_generate(chatbot, max_tokens))
        else:
            for _ in range(num_rounds):
                rounds["graftlm"].append(measure_server(server, max_tokens))
                rounds["transformers"].append(measure_generate(chatbot, max_tokens))
    return {name: median_of(found) for name, found in rounds.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(f"bench/results/{date.today()}-cpu-serve.json"))
    parser.add_argument("--llama", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.llama:
        run_llama_cpp(given.llama)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(given.model, gguf_of(given.model, Path(folder)), given.rounds, given.tokens)
    one, many = results["graftlm"]["1"], results["graftlm"][str(CLIENTS)]
    ratios = {"32 clients to 1, tokens_per_second": many["tokens_per_second"] / one["tokens_per_second"]}
    for name, found in results.items():
        for label in found:
            for figure in ("tokens_per_second", "tokens_per_cpu_second", "first_token_seconds"):
                if name != "graftlm":
                    ratio = results["graftlm"][label][figure] / found[label][figure]
                    ratios[f"graftlm to {name}, {label}, {figure}"] = ratio
    words = [Path(word).name if word in (given.model, str(given.out)) else word for word in sys.argv]
    report = {
        "command": " ".join(["OMP_NUM_THREADS=1 python", *words]), "date": str(date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, CPU only",
        "load_average_before_and_after": [load_before, os.getloadavg()], "rounds": given.rounds,
        "tokens_asked": given.tokens, "medians": results,
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def gguf_of(model: str, folder: Path) -> str | None:
    """The model as a GGUF file, where llama.cpp is installed."""
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        return None
    from graftlm.model.causal import find_model
    from graftlm.release.export import export_gguf_of_folder
    from graftlm.talk.generate import model_of_run

    export_gguf_of_folder(find_model(model_of_run(model)), folder / "gguf", "f16")
    return str(next((folder / "gguf").glob("*.gguf")))


if __name__ == "__main__":
    main()
