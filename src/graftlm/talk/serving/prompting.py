"""From a checked request to what the model is asked: prompts of token ids, made by the one renderer.

Owns the context's arithmetic (refused with both numbers, nothing dropped in silence) and the bound on how much text
is encoded at all. Does not know HTTP or batches. Control tokens in what people write stay text, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from graftlm.errors import UserError
from graftlm.talk.prompts import conversation_of
from graftlm.talk.serving.requests import ChatRequest, CompletionRequest
from graftlm.talk.serving.speech import Ask
from graftlm.text.dialogue import Conversation, Message, Template, TemplateRefused, render
from graftlm.text.tokenizer import Tokenizer


class Refused(Exception):
    """A request that cannot be answered as it is: OpenAI's `message`, `param` and `code`."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


@dataclass(frozen=True)
class Voice:
    """What turns words into a model's ids: its tokenizer, its template, and how long a talk may be."""

    tokenizer: Tokenizer
    template: Template
    context_tokens: int

    @cached_property
    def _longest_piece_bytes(self) -> int:
        spell = self.tokenizer.token_bytes
        return max(len(spell(piece_id)) for piece_id in self.tokenizer.piece_ids)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template has a place for a system message: it neither refuses nor swallows one."""
        question = Message("user", "a")
        talks = (Conversation((question,)), Conversation((Message("system", "b"), question)))
        try:
            bare, led = (render(talk, self.tokenizer, self.template, for_reply=True).ids for talk in talks)
        except (TemplateRefused, UserError):
            return False
        return led != bare

    def asks_of_chat(self, request: ChatRequest) -> list[Ask]:
        """One ask a choice. Raises Refused."""
        roles = [("system" if m.role == "developer" else m.role, m.text) for m in request.messages]
        if roles[-1][0] != "user":
            raise Refused("The last message must be the user's: it is what will be answered.", "messages")
        self._check_size("".join(text for _, text in roles), "messages")
        try:
            conversation = conversation_of({"messages": [{"role": role, "content": text} for role, text in roles]})
            ids = render(conversation, self.tokenizer, self.template, for_reply=True).ids
        except ValueError as error:
            raise Refused(f"messages {error}.", "messages") from None
        except TemplateRefused as error:
            raise Refused(f"The model's chat template refuses these messages: {error}.", "messages") from None
        except UserError as error:
            raise Refused(error.problem, "messages") from None
        return self._asks(request, [ids], "messages")

    def asks_of_texts(self, request: CompletionRequest) -> list[Ask]:
        """Choices of each prompt, in order: the text as it is, behind the token that begins a text. Raises Refused."""
        begin = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        prompts = []
        for prompt in request.prompts:
            self._check_size(prompt, "prompt")
            try:
                prompts.append(begin + self.tokenizer.encode(prompt))
            except UserError as error:
                raise Refused(error.problem, "prompt") from None
        if not all(prompts):
            raise Refused("prompt is empty.", "prompt")
        return self._asks(request, prompts, "prompt")

    def _asks(self, request: ChatRequest | CompletionRequest, prompts: list[list[int]], param: str) -> list[Ask]:
        longest, context = request.longest, self.context_tokens
        for ids in prompts:
            if len(ids) + (longest or 1) > context:
                raise Refused(
                    f"This model's context is {context} tokens. You asked for {len(ids) + (longest or 1)}: "
                    f"{len(ids)} in the {param}, {longest or 1} for the answer. Shorten one of them.",
                    param, "context_length_exceeded",
                )  # fmt: skip
        asks = []
        for number, ids in enumerate(prompts):
            samplings = request.samplings(longest or context - len(ids), number * request.num_choices)
            asks += [Ask(ids, sampling, request.stops, request.num_top) for sampling in samplings]
        return asks

    def _check_size(self, text: str, param: str) -> None:
        """Refuse before encoding what cannot fit however it is encoded. A byte of surrogates counts as any."""
        least = len(text.encode("utf-8", "surrogatepass")) // self._longest_piece_bytes
        if least > self.context_tokens:
            raise Refused(
                f"This model's context is {self.context_tokens} tokens; the {param} take at least {least}.",
                param, "context_length_exceeded",
            )  # fmt: skip
