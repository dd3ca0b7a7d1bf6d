"""What may be asked over HTTP: the bodies of the OpenAI routes, checked.

Owns every parameter: what it may be, what is taken only at the value that changes nothing, what is refused. A
parameter is either honoured or refused, never passed over. Does not know models; `prompting` makes asks of these.
"""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from graftlm.talk.sampling import HOTTEST, Sampling

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_TOP = 20

_SEED_BITS = 63
_Word = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[_Word], Field(max_length=MAX_STOPS)]
_Empty = Annotated[list[Any], Field(max_length=0)]
_Zero = Annotated[float, Field(ge=0, le=0)]


def _disagree(param: str, what: str) -> PydanticCustomError:
    """Two fields that do not go together: `complaints` tells it as it stands."""
    return PydanticCustomError("disagreeing", "{what}", {"param": param, "what": what})


class _Body(BaseModel):
    """OpenAI's own rule: a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(_Body):
    """`include_usage`: one more chunk at the end, with the counts."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextPart(_Body):
    """A part of a message; only text can be read here."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message. What clients send back along with an earlier answer may be there, empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: _Empty | None = None
    audio: None = None
    function_call: None = None
    tool_calls: _Empty | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(_Body):
    """Text is all there is."""

    type: Literal["text"]


class _Generation(_Body):
    """What both routes take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=HOTTEST)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    seed: Annotated[int, Field(ge=-(2**_SEED_BITS), lt=2**_SEED_BITS)] | None = None
    stop: _Word | Stops | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    # Told to OpenAI for its own book-keeping; an answer does not depend on them.
    user: str | None = None
    # Taken at the value that changes nothing.
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Any:
        if self.stream_options is not None and not self.stream:
            raise _disagree("stream_options", "stream_options belongs to stream: true")
        return self

    @property
    def num_choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def samplings(self, max_tokens: int, first: int = 0) -> list[Sampling]:
        """How each choice of a prompt is drawn: seeds count up from the one given plus `first`, or from a fresh one."""
        seed = random.getrandbits(_SEED_BITS) if self.seed is None else self.seed
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        return [
            Sampling(temperature, top_p, self.top_k or 0, penalty, max_tokens, (seed + i) % 2**64)
            for i in range(first, first + self.num_choices)
        ]


class ChatRequest(_Generation):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    response_format: ResponseFormat | None = None
    # Taken at the values that change nothing, as clients send them without having been asked.
    tools: _Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None  # of no tools
    functions: _Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Told to OpenAI for its own book-keeping; an answer does not depend on them.
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _disagree("top_logprobs", "top_logprobs belongs to logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            what = "max_tokens and max_completion_tokens are one thing by two names, and they differ"
            raise _disagree("max_tokens", what)
        return self

    @property
    def longest(self) -> int | None:
        """The most tokens an answer may have; None leaves it to the context."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top(self) -> int | None:
        """How many likeliest tokens to tell at every place; None tells no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Generation):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> CompletionRequest:
        if self.best_of not in (None, self.num_choices):
            raise _disagree("best_of", "best_of other than n is not done here")
        if len(self.prompts) * self.num_choices > MAX_CHOICES:
            raise _disagree("n", f"prompts times n may be at most {MAX_CHOICES}")
        return self

    @property
    def prompts(self) -> list[str]:
        """The prompts, however given."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def longest(self) -> int:
        """OpenAI's default for this route is 16 tokens."""
        return self.max_tokens or 16

    @property
    def num_top(self) -> int | None:
        """How many likeliest tokens to tell at every place; None tells no probabilities."""
        return self.logprobs
