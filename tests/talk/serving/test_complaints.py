"""What is wrong with a body is told in the API's own names, and what changes nothing is taken."""

from typing import Any

import pytest


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ({"n": 9}, "n: must be at most 8."),
        ({"temperature": "1"}, "temperature: must be a number."),
        ({"temperature": 2.5}, "temperature: must be at most 2."),
        ({"seed": 2**63}, "seed: must be below 9223372036854775808."),
        ({"max_tokens": 1.5}, "max_tokens: must be a whole number."),
        ({"stream": "yes"}, "stream: must be true or false."),
        ({"messages": 3}, "messages: must be a list."),
        ({"messages": []}, "messages: must not be empty."),
        ({"messages": [3]}, "messages.0: must be an object."),
        ({"messages": [{"role": "user"}]}, "messages.0.content: is missing."),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content: must be text or a list."),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
         "messages.0.content.0.type: must be 'text' (only text is read and written here)."),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
         "messages.0.tool_calls: must be empty (no tools can be called here)."),
        ({"stop": ["a"] * 5}, "stop: may hold 4 at most, not 5."),
        ({"stop": ["a", 3]}, "stop.1: must be text."),
        ({"stop": ["", "a"]}, "stop.0: must not be empty."),
        ({"stop": ""}, "stop: must not be empty."),
        ({"tools": [{}]}, "tools: must be empty (no tools can be called here)."),
        ({"tool_choice": "required"}, "tool_choice: must be 'none' or 'auto' (no tools can be called here)."),
        ({"presence_penalty": 1}, "presence_penalty: must be 0 (not done here; repetition_penalty is)."),
        ({"presence_penalty": -1}, "presence_penalty: must be 0 (not done here; repetition_penalty is)."),
        ({"logit_bias": {"3": 4.0}}, "logit_bias: must be empty (not done here)."),
        ({"store": True}, "store: must be false (answers are not kept here)."),
        ({"modalities": ["text", "audio"]}, "modalities.1: must be 'text' (only text is written here)."),
        ({"service_tier": "flex"}, "service_tier: must be 'auto' or 'default' (there is one tier here)."),
        ({"response_format": {"type": "json_object"}},
         "response_format.type: must be 'text' (only text is read and written here)."),
        ({"metadata": {"a": 1}}, "metadata.a: must be text."),
        ({"top_logprobs": 2}, "top_logprobs belongs to logprobs: true."),
        ({"stream_options": {}}, "stream_options belongs to stream: true."),
        ({"max_tokens": 1, "max_completion_tokens": 2},
         "max_tokens and max_completion_tokens are one thing by two names, and they differ."),
        ({"prompt": 3}, "prompt: must be text or a list."),
        ({"prompt": "x", "best_of": 3}, "best_of other than n is not done here."),
        ({"prompt": ["x"] * 9}, "prompt: may hold 8 at most, not 9."),
        ({"prompt": ["x"] * 5, "n": 2}, "prompts times n may be at most 8."),
        ({"prompt": "x", "echo": True}, "echo: must be false (not done here)."),
        ({"prompt": "x", "suffix": "y"}, "suffix: must be null (not done here)."),
    ],
)  # fmt: skip
def test_mistakes_are_told_by_the_names_of_the_api(server, field: dict[str, Any], told: str) -> None:
    """S5: no name of a library, no word about the body where one field of it is wrong; `param` names the field."""
    is_chat = "prompt" not in field
    body = {"model": "tiny", **({"messages": user("x")} if is_chat else {}), **field}
    answer = server.post(body, "/v1/chat/completions" if is_chat else "/v1/completions")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == told
    assert answer.json()["error"]["param"].split(".")[0] in body


def test_what_changes_nothing_is_taken(server) -> None:
    """Clients send these without having been asked to; the answer is that without them."""
    asked = {"model": "tiny", "messages": user("x"), "max_tokens": 6, "temperature": 0}
    harmless = {
        "parallel_tool_calls": True, "modalities": ["text"], "store": False, "metadata": {"a": "b"}, "user": "me",
        "service_tier": "auto", "tools": [], "tool_choice": "auto", "functions": [], "function_call": "none",
        "reasoning_effort": "none", "verbosity": "medium", "prediction": None, "audio": None, "logit_bias": {},
        "frequency_penalty": 0, "presence_penalty": 0.0, "response_format": {"type": "text"}, "top_p": 1, "n": 1,
        "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h", "web_search_options": None,
    }  # fmt: skip
    plain, with_all = server.post(asked), server.post({**asked, **harmless})
    assert with_all.status_code == 200, with_all.text
    assert with_all.json()["choices"] == plain.json()["choices"]
    # A share of 0 leaves the likeliest token alone, whatever the temperature.
    assert server.post({**asked, "temperature": 2, "top_p": 0}).json()["choices"] == plain.json()["choices"]
