"""Continuous batching: the same answers as alone, whoever joins or leaves; bounds; faults that stay one's own."""

import functools
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config

from graftlm.talk.generate import Answer, Chatbot, ask
from graftlm.talk.sampling import Sampling
from graftlm.talk.serving import batch
from graftlm.talk.serving.engine import Busy, Engine
from graftlm.talk.serving.slots import rounded_places
from graftlm.talk.serving.speech import Ask, Piece
from graftlm.text.dialogue import CARD

QUESTIONS = [
    "hello",
    "what is the capital of France?",
    "one two three " * 9,
    "你好",
    "今天天气很好吗",
    "x",
    "how are you?",
]


class Listener:
    """Collects the answers of one engine by number."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.text: dict[int, str] = {}
        self.last: dict[int, Piece | None] = {}
        self.is_done: dict[int, threading.Event] = {}

    def ask(self, number: int, ask: Ask) -> Any:
        self.text[number], self.is_done[number] = "", threading.Event()

        def sink(piece: Piece | None) -> None:
            self.last[number] = piece
            self.text[number] += piece.text if piece else ""
            if piece is None or piece.finish:
                self.is_done[number].set()

        return self.engine.submit([ask], sink)

    def wait(self) -> None:
        for done in self.is_done.values():
            assert done.wait(30)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Any:
    def start(chatbot: Chatbot, **limits: Any) -> Listener:
        engine = Engine(chatbot, **limits)
        request.addfinalizer(engine.close)
        engine.start()
        return Listener(engine)

    return start


@functools.cache
def alone(chatbot: Chatbot, question: str, sampling: Sampling) -> Answer:
    """What the plain chatbot says, asked nothing else."""
    return chatbot.answer(ask(question), sampling)


def check_parity(chatbot: Chatbot, listener: Listener, samplings: Sequence[Sampling]) -> None:
    """Ask everything twice, a little after each other, and compare with answers given alone."""
    asked = [(question, sampling) for sampling in samplings for question in QUESTIONS] * 2
    for number, (question, sampling) in enumerate(asked):
        listener.ask(number, Ask(chatbot.prompt(ask(question), sampling).ids, sampling))
        if number % 3 == 0:
            listener.is_done[max(0, number - 4)].wait(30)
    listener.wait()
    for number, (question, sampling) in enumerate(asked):
        single = alone(chatbot, question, sampling)
        last = listener.last[number]
        assert last is not None
        assert listener.text[number] == single.text
        assert (last.num_tokens, last.finish == "stop") == (single.answer_tokens, single.ending == "end")


DRAWN = (Sampling(max_tokens=12), Sampling(1.2, 0.9, 40, 1.3, 9, 5), Sampling(1.0, max_tokens=7, seed=2))


@pytest.mark.parametrize(
    "limits", [{}, {"max_rows": 3}, {"budget_tokens": 512}], ids=["roomy", "few rows", "little memory"]
)
def test_answers_equal_the_single_ones_whoever_joins(chatbot, run, limits) -> None:
    """S1: no cross-talk; memory bounded."""
    listener = run(chatbot, **limits)
    check_parity(chatbot, listener, DRAWN)
    engine = listener.engine
    assert engine.counts.finished == len(listener.text)
    assert engine.cache_bytes <= engine.budget_tokens * engine._slots.token_bytes
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_whoever_is_sent_back_for_want_of_memory_says_the_same(chatbot, run) -> None:
    """Rows grow beyond a step of places while three run: one must go and come back."""
    sampling, questions = Sampling(max_tokens=60), ["hello", "x", "how are you?", "hi"]
    listener = run(chatbot, budget_tokens=rounded_places(512))
    lengths = [len(chatbot.prompt(ask(question), sampling).ids) for question in questions]
    assert max(lengths) < rounded_places(1) < max(lengths) + 60
    for number, question in enumerate(questions):
        listener.ask(number, Ask(chatbot.prompt(ask(question), sampling).ids, sampling))
    listener.wait()
    assert [listener.text[n] for n in range(4)] == [alone(chatbot, q, sampling).text for q in questions]
    assert listener.engine.counts.preempted > 0


def test_long_prompts_are_read_in_parts(chatbot, run, monkeypatch) -> None:
    monkeypatch.setattr(batch, "READ_TOKENS", 24)
    check_parity(chatbot, run(chatbot), DRAWN[:1])


def test_what_others_have_read_is_not_read_again(chatbot, run) -> None:
    """The frame of the template, and a whole prompt where several answers to it are wanted."""
    sampling = Sampling(max_tokens=30)
    listener = run(chatbot)
    prompts = [chatbot.prompt(ask(question), sampling).ids for question in ("hello", "hello", "what is it?", "hello")]
    asks = [Ask(ids, sampling) for ids in prompts]
    texts, left = [""] * 4, threading.Semaphore(0)

    def sink(piece: Piece | None) -> None:
        assert piece is not None
        texts[piece.index] += piece.text
        if piece.finish:
            left.release()

    listener.engine.submit(asks, sink)
    assert all(left.acquire(timeout=30) for _ in asks)
    assert texts == [alone(chatbot, question, sampling).text for question in ("hello", "hello", "what is it?", "hello")]
    frame = next(i for i, pair in enumerate(zip(prompts[0], prompts[2], strict=False)) if pair[0] != pair[1])
    assert listener.engine.counts.prompt_tokens_shared == 2 * (len(prompts[0]) - 1) + frame
    assert listener.engine.counts.prompt_tokens == sum(map(len, prompts))


@pytest.mark.parametrize("config_class", [MistralConfig, Qwen2Config])
def test_sliding_windows_hide_what_is_far(tokenizer, run, config_class) -> None:
    more: dict[str, Any] = {} if config_class is MistralConfig else {"use_sliding_window": True, "max_window_layers": 1}
    config = config_class(
        vocab_size=tokenizer.num_pieces, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, max_position_embeddings=512, sliding_window=12, **more,
    )  # fmt: skip
    torch.manual_seed(1)
    chatbot = Chatbot(AutoModelForCausalLM.from_config(config).eval(), tokenizer, CARD)
    check_parity(chatbot, run(chatbot), DRAWN[:1])


def test_a_full_queue_refuses_with_a_time(endless, run) -> None:
    """S1: beyond the bound nothing is queued."""
    listener = run(endless, max_rows=1, max_waiting=2)
    forever = Ask([1, 5], Sampling(max_tokens=50_000))
    tickets = [listener.ask(0, forever)]
    while not listener.engine.num_running:
        time.sleep(0.002)
    tickets += [listener.ask(1, forever), listener.ask(2, forever)]
    with pytest.raises(Busy) as refused:
        listener.engine.submit([forever], lambda _: None)
    assert 1 <= refused.value.retry_seconds <= 60
    assert listener.engine.counts.refused == 1
    for ticket in tickets:
        listener.engine.cancel(ticket)


def test_whoever_leaves_costs_no_further_step(endless, run) -> None:
    """S3: after a cancel at most the step under way is finished."""
    listener = run(endless)
    ticket = listener.ask(0, Ask([1, 5], Sampling(max_tokens=50_000)))
    while listener.engine.counts.answer_tokens < 3:
        time.sleep(0.002)
    listener.engine.cancel(ticket)
    said = listener.engine.counts.answer_tokens
    while listener.engine.num_running:
        time.sleep(0.002)
    assert listener.engine.counts.answer_tokens <= said + 1
    assert listener.engine.counts.cancelled == 1


def test_a_failing_answer_leaves_the_others_alone(chatbot, run, capsys) -> None:
    """S12, S13: an error while reading one prompt; its message, which might quote the prompt, is not logged."""
    listener = run(chatbot)
    forward = listener.engine._slots.forward

    def fail(first: int, tokens: Any) -> Any:
        if any(7 in ids for ids in tokens):
            raise RuntimeError("quoting a secret")
        return forward(first, tokens)

    listener.engine._slots.forward = fail
    sampling = Sampling(max_tokens=40)
    listener.ask(0, Ask(chatbot.prompt(ask("hello"), sampling).ids, sampling))
    listener.ask(1, Ask([1, 7, 9], sampling))
    listener.ask(2, Ask(chatbot.prompt(ask("你好"), sampling).ids, sampling))
    listener.wait()
    assert listener.last[1] is None
    if listener.last[0] is None:  # read in the same step, and so lost with it
        listener.ask(0, Ask(chatbot.prompt(ask("hello"), sampling).ids, sampling))
        listener.wait()
    assert listener.text[0] == chatbot.answer(ask("hello"), sampling).text
    told = capsys.readouterr().err
    assert "An answer failed: RuntimeError" in told
    assert "secret" not in told


def test_numbers_that_are_none_reach_nobody_else(tokenizer, run, chatbot) -> None:
    """S12: one token's embedding is NaN; its row fails, and whoever gets its slot later hears nothing of it."""
    import copy

    sick = Chatbot(copy.deepcopy(chatbot.model), tokenizer, CARD)
    poison = tokenizer.encode_continuation("龘")[-1]
    with torch.no_grad():
        sick.model.model.embed_tokens.weight[poison] = torch.nan
    listener = run(sick, max_rows=4)
    sampling = Sampling(max_tokens=30)
    for number in range(6):
        prompt = chatbot.prompt(ask("how are you?"), sampling).ids
        listener.ask(number, Ask([*prompt, poison] * 3 if number in (1, 2) else prompt, sampling))
    listener.wait()
    assert [number for number in range(6) if listener.last[number] is None] == [1, 2]
    single = chatbot.answer(ask("how are you?"), sampling).text
    assert all(listener.text[number] == single for number in (0, 3, 4, 5))


def test_probabilities_are_the_model_s_own(chatbot, run) -> None:
    sampling = Sampling(temperature=0.7, repetition_penalty=1.5, max_tokens=6, seed=3)
    prompt = chatbot.prompt(ask("hello"), sampling).ids
    listener = run(chatbot)
    said = []
    done = threading.Event()

    def sink(piece: Piece | None) -> None:
        assert piece is not None
        said.extend(piece.tokens)
        if piece.finish:
            done.set()

    listener.engine.submit([Ask(prompt, sampling, num_top=3)], sink)
    assert done.wait(30)
    ids = [token for step in chatbot.decode([prompt], sampling) for _, token in step]
    with torch.no_grad():
        logits = chatbot.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logits[:, chatbot.forbidden_ids] = -torch.inf
    logprobs = logits.log_softmax(-1)
    assert len(said) == len(ids)
    for token_id, told, row in zip(ids, said, logprobs, strict=True):
        assert told.token.spelled == chatbot.tokenizer.token_bytes(token_id)
        assert told.token.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert [s.logprob for s in told.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_closing_tells_whoever_still_waits(endless) -> None:
    engine = Engine(endless, max_rows=1)
    engine.start()
    listener = Listener(engine)
    listener.ask(0, Ask([1, 5], Sampling(max_tokens=50_000)))
    listener.ask(1, Ask([1, 5], Sampling(max_tokens=50_000)))
    engine.close()
    assert listener.last[0] is None
    assert listener.last[1] is None
    with pytest.raises(Busy):
        engine.submit([Ask([1], Sampling())], lambda _: None)
