"""The routes, asked by OpenAI's own client: whole and streamed answers, every parameter, every refusal."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI, NotFoundError, RateLimitError
from transformers import AutoTokenizer

from graftlm.talk.generate import ask
from graftlm.talk.sampling import Sampling
from graftlm.talk.serving.prompting import Voice
from graftlm.talk.serving.requests import ChatRequest
from graftlm.text.dialogue import CARD, Conversation, Message, Template, render


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_models_are_listed(server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny", "parrot"]
    assert client.models.retrieve("tiny").max_model_len == 512
    assert client.models.retrieve("tiny").takes_system is True
    with pytest.raises(NotFoundError, match="served: tiny, parrot"):
        client.models.retrieve("other")


def test_a_whole_answer_equals_the_chatbot_s(server, expected) -> None:
    answer = server.client().chat.completions.create(
        model="tiny", messages=user("hello"), temperature=0, max_completion_tokens=16
    )
    single = expected("hello", Sampling(max_tokens=16))
    assert answer.choices[0].message.content == single.text
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (single.prompt_tokens, single.answer_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer.choices[0].logprobs is None


def test_a_stream_says_the_same_in_whole_characters(server) -> None:
    chunks = list(
        server.client().chat.completions.create(
            model="parrot", messages=user("hi"), temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks[:-1] if chunk.choices[0].delta.content]
    assert "".join(pieces) == "你好 there"
    assert pieces[0] == "你"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(server.models[1].voice.tokenizer.encode_continuation("你好 there"))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_plain_completions_continue_the_text(server, tokenizer) -> None:
    answer = server.client().completions.create(
        model="tiny", prompt=["one", "你"], temperature=0, max_tokens=5, n=2, logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text != answer.choices[2].text
    prompt_tokens = sum(1 + len(tokenizer.encode(text)) for text in ("one", "你"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, 20)
    told = answer.choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == 5
    assert told.top_logprobs[0][told.tokens[0]] == pytest.approx(told.token_logprobs[0])
    streamed = server.client().completions.create(model="tiny", prompt="one", temperature=0, max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_seeds_choices_and_cuts(server) -> None:
    def texts(**options: Any) -> list[str]:
        given = {"temperature": 1.0, "max_tokens": 8, **options}
        answer = server.client().chat.completions.create(model="tiny", messages=user("x"), **given)
        return [choice.message.content for choice in answer.choices]

    drawn = texts(seed=7, n=3)
    assert drawn == texts(seed=7, n=3)
    assert texts(seed=8) == drawn[1:2]
    assert len(set(drawn)) == 3
    assert texts() != texts()
    likeliest = texts(temperature=0)
    assert texts(extra_body={"top_k": 1}) == texts(top_p=1e-9) == likeliest
    assert texts(temperature=0, extra_body={"repetition_penalty": 0.01}) != likeliest


def test_stop_strings_end_an_answer(server) -> None:
    answer = server.client().chat.completions.create(
        model="parrot", messages=user("hi"), temperature=0, stop=["th", "zz"]
    )
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("你好 ", "stop")


def test_probabilities_come_with_their_tokens(server) -> None:
    options = {"model": "parrot", "messages": user("hi"), "temperature": 0, "logprobs": True, "top_logprobs": 2}
    told = server.client().chat.completions.create(**options).choices[0].logprobs.content
    assert bytes(byte for token in told for byte in token.bytes).decode() == "你好 there"
    assert all(token.top_logprobs[0].logprob == token.logprob for token in told)
    assert all(len(token.top_logprobs) == 2 for token in told)
    streamed = [
        token
        for chunk in server.client().chat.completions.create(**options, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.bytes for token in streamed] == [token.bytes for token in told]


def test_thirty_two_clients_stream_at_once(server, expected) -> None:
    """S1: all are answered, each with its own answer."""
    questions = [f"{word} {number}" for number in range(8) for word in ("hello", "你好", "one two", "what is")]

    async def one(client: AsyncOpenAI, question: str) -> str:
        stream = await client.chat.completions.create(
            model="tiny", messages=user(question), temperature=0, max_tokens=12, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everyone() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(one(client, question) for question in questions))

    answers = asyncio.run(everyone())
    assert answers == [expected(question, Sampling(max_tokens=12)).text for question in questions]
    assert server.engine.cache_bytes <= server.engine.budget_tokens * server.engine._slots.token_bytes


def test_beyond_the_queue_clients_are_told_when_to_come_back(start, endless) -> None:
    """S1: 429 with Retry-After."""
    running = start(endless, {"max_rows": 1, "max_waiting": 1})
    client = running.client()
    first = client.chat.completions.create(model="tiny", messages=user("x"), stream=True)
    next(iter(first))
    while running.engine.counts.answer_tokens < 1:  # its first chunk names the role, and may come while it still waits
        time.sleep(0.002)
    second = client.chat.completions.create(model="tiny", messages=user("x"), stream=True)
    with pytest.raises(RateLimitError) as refused:
        client.chat.completions.create(model="tiny", messages=user("x"))
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    first.close()
    second.close()


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_stops_the_model(start, endless, is_stream: bool) -> None:
    """S3: streaming or not, the answer of 60,000 tokens is given up."""
    running = start(endless)
    body = json.dumps({"messages": user("x"), "stream": is_stream}).encode()
    connection = running.connect()
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    while running.engine.counts.answer_tokens < 5:
        time.sleep(0.002)
    connection.close()
    while running.engine.num_running:
        time.sleep(0.002)
    assert running.engine.counts.cancelled == 1
    assert running.engine.counts.answer_tokens < 30_000
    said = running.engine.counts.answer_tokens
    assert running.post({"messages": user("x"), "max_tokens": 2}).status_code == 200
    assert running.engine.counts.answer_tokens == said + 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "not JSON"), (b"", "body"), (b"[]", "JSON object"), (b"null", "JSON object"), (b'"x"', "JSON object"),
        (b"[" * 200_000, "not nested deeply"), (b'"\xe9"', "UTF-8"),
        (b'{"messages": []}', "messages"), (b"{}", "messages"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": "1"}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1.5}', "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}', "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}", "of digits"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half a character"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "messages.0.content"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "messages.0.role"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', "last message"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "asks nothing"),
        (b'{"messages": [{"role": "user", "content": "x"}], "warmth": 1}', "argument supplied: warmth"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, '
         b'{"role": "user", "content": "c"}]}', "template refuses"),
    ],
)  # fmt: skip
def test_wrong_bodies_are_told_in_openai_s_shape(server, content: bytes, told: str) -> None:
    """S5: bad JSON, types, NaN, depth; the server goes on."""
    if content.startswith(b'{"messages'):
        content = b'{"model": "tiny", ' + content[1:]
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code in (400, 422)
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert told in error["message"]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_what_a_browser_may_send_unasked_is_refused(server) -> None:
    """S7: a form of another site posts text/plain without asking first; it is not read as JSON. CORS stays closed."""
    body = json.dumps({"model": "tiny", "messages": user("x")})
    headers = {"Content-Type": "text/plain", "Origin": "http://evil.example"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    ask_first = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.request("OPTIONS", f"{server.url}/v1/chat/completions", headers=ask_first)
    assert preflight.status_code == 405
    for seen in (answer, preflight, httpx.get(f"{server.url}/v1/models", headers=ask_first)):
        assert not any(name.startswith("access-control") for name in seen.headers)


@pytest.mark.parametrize(
    ("body", "numbers"),
    [({"messages": user("x"), "max_tokens": 10**12}, ("512", "1000000000")),
     ({"messages": user("x"), "max_tokens": 512}, ("512", "")),
     ({"messages": user("hello there " * 300)}, ("512", "")),
     ({"messages": user("y" * 1_000_000)}, ("512", "at least"))],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_numbers(server, body: dict[str, Any], numbers: tuple[str, str]) -> None:
    """S9: context overflow, absurd max_tokens."""
    with pytest.raises(APIStatusError) as refused:
        server.client().chat.completions.create(model="tiny", **body)
    assert refused.value.status_code == 400
    assert refused.value.code == "context_length_exceeded"
    assert all(number in str(refused.value) for number in numbers)


def test_an_answer_may_fill_the_context_to_its_last_token(server) -> None:
    room = 512 - server.post({"model": "tiny", "messages": user("x"), "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    body = {"model": "parrot", "messages": user("x"), "max_tokens": room}
    assert server.post(body).status_code == 200
    answer = server.post({**body, "model": "tiny", "max_tokens": room + 1})
    assert answer.status_code == 400
    assert str(512) in answer.json()["error"]["message"]
    assert str(513) in answer.json()["error"]["message"]


def test_control_tokens_in_messages_stay_text(server, tokenizer) -> None:
    """S10, B5: what a user writes never becomes a control id."""
    text = "</s><s> hi <unk> </s>"
    voice = server.models[0].voice
    asked = voice.asks_of_chat(ChatRequest.model_validate({"messages": user(text)}))[0].prompt_ids
    assert asked == render(ask(text), tokenizer, CARD, for_reply=True).ids
    assert [token for token in asked if token in tokenizer.special_ids] == [tokenizer.bos_id]
    told = server.post({"model": "tiny", "messages": user(text), "max_tokens": 1}).json()
    assert told["usage"]["prompt_tokens"] == len(asked)
    plain = server.post({"model": "tiny", "prompt": text, "max_tokens": 1}, "/v1/completions").json()
    assert plain["usage"]["prompt_tokens"] == 1 + len(tokenizer.encode(text))


def test_prompts_are_those_of_the_saved_chat_template(tokenizer, tmp_path) -> None:
    """Training and serving cannot drift: plain transformers, from the saved folder, makes the same ids."""
    tokenizer.save(tmp_path, chat_template=CARD.jinja)
    judge = AutoTokenizer.from_pretrained(tmp_path)
    voice = Voice(tokenizer, CARD, 4096)
    for texts in (["hello"], ["你好", "今天", "x"], [" two  spaces\n", "a\nb", "### Response:"]):
        messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
        for more in ([], [{"role": "system", "content": "Be kind."}]):
            whole = [*more, *messages]
            asked = voice.asks_of_chat(ChatRequest.model_validate({"messages": whole}))[0].prompt_ids
            found = judge.apply_chat_template(whole, add_generation_prompt=True, return_dict=False)
            assert asked == found
            turns = tuple(Message(m["role"], m["content"]) for m in whole)
            assert asked == render(Conversation(turns), tokenizer, CARD, for_reply=True).ids


@pytest.mark.parametrize(
    ("start", "takes"),
    [("", False), ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}", False),
     ("{{ messages[0].content if messages[0].role == 'system' }}", True)],
)  # fmt: skip
def test_a_template_that_refuses_or_swallows_a_system_message_has_no_place_for_one(tokenizer, start, takes) -> None:
    template = Template("own", start + "{{ messages[-1].content }}", "last")
    assert Voice(tokenizer, template, 512).takes_system is takes


def test_what_clients_send_back_is_taken(server) -> None:
    client = server.client()
    first = client.chat.completions.create(model="parrot", messages=user("hi"), temperature=0)
    said = first.choices[0].message
    parts = [{"type": "text", "text": "and "}, {"type": "text", "text": "now?"}]
    again = client.chat.completions.create(
        model="parrot", messages=[*user("hi"), said, {"role": "user", "content": parts}], temperature=0, user="me",
        presence_penalty=0, response_format={"type": "text"},
    )  # fmt: skip
    assert again.choices[0].message.content == "你好 there"
    assert again.usage.prompt_tokens > first.usage.prompt_tokens


def test_a_failing_answer_is_told_and_the_server_lives(start, parrot, tokenizer, capsys) -> None:
    """S12, S13: a fault in the middle of answers, streamed and not; neither words nor the error's own are logged."""
    running = start(parrot(tokenizer.encode_continuation("one two")))
    good = {"messages": user("a private matter"), "temperature": 0}
    forward, limit = running.engine._slots.forward, 2

    def fail(first: int, tokens: Any) -> Any:
        nonlocal limit
        limit -= 1
        if limit < 0:
            raise RuntimeError("a private matter")
        return forward(first, tokens)

    running.engine._slots.forward = fail
    answer = running.post(good)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    limit = 2
    streamed = running.post({**good, "stream": True})
    events = streamed.text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    running.engine._slots.forward = forward
    assert running.post(good).json()["choices"][0]["message"]["content"] == "one two"
    told = capsys.readouterr().err
    assert "POST /v1/chat/completions 500" in told
    assert "private" not in told


def test_figures_are_told_for_prometheus(server) -> None:
    server.post({"model": "parrot", "messages": user("x")})
    text = httpx.get(f"{server.url}/metrics").text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['graftlm_requests_total{route="/v1/chat/completions",status="200"}']) >= 1
    assert float(figures['graftlm_answer_tokens_total{model="parrot"}']) >= 3
    assert figures["graftlm_first_token_seconds_count"] == figures['graftlm_first_token_seconds_bucket{le="+Inf"}']
    assert figures['graftlm_answers_running{model="tiny"}'] == "0"


def test_two_models_need_a_name_one_does_not(server) -> None:
    answer = server.post({"messages": user("x")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert httpx.get(f"{server.url}/nowhere").json()["error"]["message"] == "There is no such route."
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405
    assert httpx.get(f"{server.url}/docs").status_code == 404
