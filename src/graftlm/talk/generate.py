"""Answer a conversation: the renderer's prompt in, whole characters out.

Owns decoding with a key-value cache (one row streamed, or many batched by length), what may be sampled at all,
when an answer ends, and what happens to a conversation longer than the context. Does not know terminals, servers
or files. On the road: samples between stages, exact answers, chat and `generate` all speak through here.

Shapes: B rows of a batch, P padded prompt length, V rows of the output head.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from transformers import DynamicCache

from graftlm.device import pick_device
from graftlm.errors import UserError
from graftlm.model.causal import check_ids, empty_causal, find_model, head_weight, load_causal
from graftlm.run import DONE, RECIPE, ProgressShown, say
from graftlm.talk.layout import lay_out_for_talking
from graftlm.talk.sampling import GREEDY, Draw, Sampling, draw_ids
from graftlm.text.dialogue import CARD, Conversation, Message, Template, find_template, render_or_tell
from graftlm.text.tokenizer import Tokenizer, load_tokenizer

# What one batch may hold, prompts and room for answers together: 8 GiB of keys and values at 7B.
BATCH_TOKENS = 16_384
BATCH_ROWS = 64

Ending = Literal["end", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids up to where the answer starts, and how many of the oldest messages had to go to fit them in."""

    ids: list[int]
    num_dropped_messages: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said. `ending`: the model ended it ("end"), or the tokens ran out ("length")."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    num_dropped_messages: int = 0
    ending: Ending = "end"


def ask(*texts: str) -> Conversation:
    """A conversation from alternating questions and answers, the last one a question."""
    return Conversation(tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)))


class Characters:
    """Tokens to text, whole characters only: bytes of an unfinished character wait for the next token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))


class Reply(Iterator[str]):
    """An answer while it is being said: iterate for its text; the counts are those so far.

    Stop iterating, or `close`, and the model stops with you.
    """

    def __init__(self, chatbot: Chatbot, prompt: Prompt, sampling: Sampling) -> None:
        self.prompt_tokens = len(prompt.ids)
        self.num_dropped_messages = prompt.num_dropped_messages
        self.answer_tokens = 0
        self.ending: Ending = "length"
        self._pieces = self._say(chatbot, prompt, sampling)

    def _say(self, chatbot: Chatbot, prompt: Prompt, sampling: Sampling) -> Generator[str, None, None]:
        characters = Characters(chatbot.tokenizer)
        for step in chatbot.decode([prompt.ids], sampling):
            for _, token_id in step:
                if token_id in chatbot.stop_ids:
                    self.ending = "end"
                    return
                self.answer_tokens += 1
                if text := characters.take(token_id):
                    yield text

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()


class Chatbot:
    """A model, its tokenizer and the template it was trained with.

    Raises UserError when the tokenizer has more ids than the model has rows.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, template: Template) -> None:
        check_ids(model, tokenizer.num_pieces)
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.device = head_weight(model).device
        self.context_tokens: int = model.config.max_position_embeddings
        self.stop_ids = stop_ids_of(tokenizer, template)
        forbidden = forbidden_ids_of(tokenizer, template, len(head_weight(model)))
        self.forbidden_ids = torch.tensor(forbidden, dtype=torch.long, device=self.device)

    def prompt(self, conversation: Conversation, sampling: Sampling) -> Prompt:
        """Render for a reply; while it does not fit the context, the oldest turn goes, whole.

        A system message stays. Room is kept for the answer: `max_tokens`, or a quarter of the context if that
        is less. Raises UserError with both numbers when the last question alone does not fit, and with the template's
        reason when it does not take the conversation.
        """
        room = self.context_tokens - min(sampling.max_tokens, self.context_tokens // 4)
        num_dropped = 0
        while True:
            ids = render_or_tell(conversation, self.tokenizer, self.template, for_reply=True).ids
            if len(ids) <= room:
                return Prompt(ids, num_dropped)
            shorter = _without_oldest_turn(conversation)
            if shorter is None:
                left = self.context_tokens - len(ids)
                raise UserError(
                    f"The question takes {len(ids):,} tokens; of this model's {self.context_tokens:,} at most "
                    f"{room:,} may be question.",
                    f"Shorten it, or ask for at most {left:,} new tokens." if left > 0 else "Shorten it.",
                )
            num_dropped += len(conversation.messages) - len(shorter.messages)
            conversation = shorter

    def stream(self, conversation: Conversation, sampling: Sampling = GREEDY) -> Reply:
        """The answer, piece by piece, whole characters only. Raises UserError as `prompt`."""
        return Reply(self, self.prompt(conversation, sampling), sampling)

    def answer(self, conversation: Conversation, sampling: Sampling = GREEDY) -> Answer:
        """The whole answer. Raises UserError as `prompt`."""
        reply = self.stream(conversation, sampling)
        text = "".join(reply)
        return Answer(text, reply.prompt_tokens, reply.answer_tokens, reply.num_dropped_messages, reply.ending)

    def answer_many(
        self, conversations: Sequence[Conversation], sampling: Sampling = GREEDY, label: str = "answers"
    ) -> list[Answer]:
        """Answers in the order of `conversations`, decoded in batches of similar length; progress is shown as `label`.

        Raises UserError.
        """
        prompts = [self.prompt(conversation, sampling) for conversation in conversations]
        with ProgressShown(label, len(prompts)) as shown:
            return self.answer_prompts(prompts, sampling, shown.reach)

    def answer_prompts(
        self, prompts: Sequence[Prompt], sampling: Sampling, reach: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """Answers to prompts already rendered, in their order; `reach` is told how many have ended."""
        answers: dict[int, Answer] = {}
        for places in _batches([len(prompt.ids) for prompt in prompts], sampling.max_tokens):
            texts = dict.fromkeys(places, "")
            characters = {place: Characters(self.tokenizer) for place in places}
            counts = dict.fromkeys(places, 0)
            endings: dict[int, Ending] = dict.fromkeys(places, "length")
            for step in self.decode([prompts[place].ids for place in places], sampling):
                for row, token_id in step:
                    place = places[row]
                    if token_id in self.stop_ids:
                        endings[place] = "end"
                        continue
                    counts[place] += 1
                    texts[place] += characters[place].take(token_id)
                if reach is not None:
                    reach(len(answers) + sum(ending == "end" for ending in endings.values()))
            for place in places:
                prompt = prompts[place]
                answers[place] = Answer(
                    texts[place], len(prompt.ids), counts[place], prompt.num_dropped_messages, endings[place]
                )
        return [answers[place] for place in range(len(prompts))]

    def decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[tuple[int, int]]]:
        """Step by step the (row, token id) of every row still speaking; a row's stop token is its last.

        Prompts of one batch are padded on the left; finished rows leave the cache once they are half of it.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            yield from self._decode(prompts, sampling)
        finally:
            self.model.train(was_training)

    def _decode(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[tuple[int, int]]]:
        longest = max(map(len, prompts))
        limits = [min(sampling.max_tokens, self.context_tokens - len(prompt)) for prompt in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        draws = [Draw(sampling) for _ in prompts]
        cache = DynamicCache(config=self.model.config)
        held = list(range(len(prompts)))  # rows in the cache, in its order; some may have finished
        is_speaking = [limit > 0 for limit in limits]
        ids_BT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        is_real_BP = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts])
        ids_BT, is_real_BP = ids_BT.to(self.device), is_real_BP.to(self.device)
        positions_BT = (is_real_BP.cumsum(-1) - 1).clamp(min=0)
        while any(is_speaking):
            logits_BV = self._logits(ids_BT, is_real_BP, positions_BT, cache)
            next_ids = draw_ids(logits_BV, [draws[row] for row in held], [answers[row] for row in held])
            step = [(row, token_id) for row, token_id in zip(held, next_ids, strict=True) if is_speaking[row]]
            for row, token_id in step:
                answers[row].append(token_id)
                is_speaking[row] = token_id not in self.stop_ids and len(answers[row]) < limits[row]
            yield step
            ids_BT = torch.tensor(next_ids, device=self.device)[:, None]
            positions_BT = positions_BT[:, -1:] + 1
            is_real_BP = torch.cat([is_real_BP, is_real_BP.new_ones(len(held), 1)], dim=1)
            left = [place for place, row in enumerate(held) if is_speaking[row]]
            if left and len(left) <= len(held) // 2:
                kept = torch.tensor(left, device=self.device)
                cache.batch_select_indices(kept)
                ids_BT, positions_BT, is_real_BP = ids_BT[kept], positions_BT[kept], is_real_BP[kept]
                held = [held[place] for place in left]

    @torch.inference_mode()
    def _logits(
        self, ids_BT: torch.Tensor, is_real_BP: torch.Tensor, positions_BT: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Logits (B, V) after the last token; what may not be said is at minus infinity."""
        output = self.model(
            input_ids=ids_BT, attention_mask=is_real_BP.long(), position_ids=positions_BT, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1].index_fill(1, self.forbidden_ids, -torch.inf)


def load_chatbot(path_or_hub_id: str | Path, device: str = "auto", template: str | None = None) -> Chatbot:
    """The chatbot in a model folder, a run folder or on the hub; the template is the one stored with its tokenizer.

    A base without a template gets the card's, and that is told. Raises UserError on anything amiss, a tokenizer
    with more ids than the model has rows before any weight is read.
    """
    folder, tokenizer, chosen = find_speaker(path_or_hub_id, template)
    on = pick_device(device)
    return Chatbot(ready_for_talking(load_causal(folder, talking_dtype(on)), on), tokenizer, chosen)


def talking_dtype(device: torch.device) -> torch.dtype:
    """Of a model that talks: 16 bits on a GPU, 32 on a CPU."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16


def ready_for_talking(model: Any, device: torch.device) -> Any:
    """The model on `device`, in the dtype and the order of memory in which it talks there."""
    model = model.to(device=device, dtype=talking_dtype(device))
    if device.type == "cpu":
        lay_out_for_talking(model)
    return model


def find_speaker(path_or_hub_id: str | Path, template: str | None = None) -> tuple[Path, Tokenizer, Template]:
    """Folder, tokenizer and template of what `load_chatbot` would load, no weight read. Raises UserError as it does."""
    folder = find_model(model_of_run(path_or_hub_id))
    tokenizer = load_tokenizer(folder)
    check_ids(empty_causal(folder), tokenizer.num_pieces)
    if template is None and not tokenizer.chat_template:
        say(f"{folder} carries no chat template: the card's is used.")
    chosen = find_template(template or ("tokenizer" if tokenizer.chat_template else CARD.name), tokenizer)
    stop_ids_of(tokenizer, chosen)  # a template of no use is told before any weight is read
    return folder, tokenizer, chosen


def model_of_run(path: str | Path) -> str | Path:
    """The finished model inside a run folder; anything else as it is.

    Raises UserError for an unfinished run, a step's folder that holds no whole model, or a bare adapter.
    """
    folder = Path(path)
    if (folder / RECIPE).is_file():
        finished = [model for model in folder.glob("[0-9]*-model") if (model / DONE).is_file()]
        if not finished:
            raise UserError(f"The run in {folder} has no finished model yet.", "Run its recipe again to continue it.")
        return finished[0]
    if folder.is_dir() and (folder.absolute().parent / RECIPE).is_file() and not (folder / DONE).is_file():
        raise UserError(f"{folder} is a step of a run that is not finished.", "Run its recipe again to continue it.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder} is an adapter, not a whole model.", "Export the run with --to hf.")
        raise UserError(f"{folder} holds no model: there is no config.json.", "Give a run's folder, or its N-model.")
    return path


def stop_ids_of(tokenizer: Tokenizer, template: Template) -> frozenset[int]:
    """The tokens that end an answer: eos, and what the template puts behind one; not every chat format takes eos.

    Raises UserError for a template that takes no question and answer, or never ends one.
    """
    rendered = render_or_tell(Conversation((Message("user", "a"), Message("assistant", "b"))), tokenizer, template)
    targets = [token_id for token_id, is_target in zip(rendered.ids, rendered.is_target, strict=True) if is_target]
    return frozenset({tokenizer.eos_id, *(set(targets[-1:]) & tokenizer.special_ids)})


def forbidden_ids_of(tokenizer: Tokenizer, template: Template, num_rows: int) -> list[int]:
    """The ids no answer may hold: control tokens that end none, and the head's rows beyond the tokenizer.

    Those are padding that no training ever moved; they win a soft-max all the same.
    """
    control = sorted(tokenizer.special_ids - stop_ids_of(tokenizer, template))
    return [*control, *range(tokenizer.num_pieces, num_rows)]


def _without_oldest_turn(conversation: Conversation) -> Conversation | None:
    """The conversation from its second question on, system messages kept; None when there is no second one."""
    system = tuple(m for m in conversation.messages if m.role == "system")
    turns = [m for m in conversation.messages if m.role != "system"]
    later = [place for place, message in enumerate(turns) if message.role == "user" and place > 0]
    return replace(conversation, messages=system + tuple(turns[later[0] :])) if later else None


def _batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Places 0..len-1 in groups of similar length that fit `BATCH_TOKENS` with their answers."""
    groups: list[list[int]] = []
    # Longest first: what does not fit the memory fails at once, and the first bar of progress is the slowest.
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        room = max(1, BATCH_TOKENS // (lengths[groups[-1][0]] + max_tokens)) if groups else 0
        if groups and len(groups[-1]) < min(BATCH_ROWS, room):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
