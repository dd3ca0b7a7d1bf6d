"""The length policy: what is cut, what is left out, and that no end token is ever lost."""

from dataclasses import replace

import pytest
from chat_templates import TEMPLATES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftlm.text.dialogue import Conversation, Message, Rendered, render, rows_of
from graftlm.text.fit import Fitted, Fitter, TooLong
from graftlm.text.templates import CARD
from graftlm.text.tokenizer import Tokenizer

CHATML = TEMPLATES["chatml"]


def dialogue(num_turns: int, words: int = 10, system: str = "") -> Conversation:
    messages = [Message("system", system)] if system else []
    for i in range(num_turns):
        messages += [Message("user", f"{i} " + "q" * words), Message("assistant", f"{i} " + "a" * words)]
    return Conversation(tuple(messages), f"file:{num_turns}")


def fit(fitter: Fitter, conversation: Conversation) -> Fitted:
    (found,) = fitter.fit([conversation])
    return found


def answers_of(row: Rendered, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([i for i, learned in zip(row.ids, row.is_target, strict=True) if learned])


def length(conversation: Conversation, tokenizer: Tokenizer, template: str = "card") -> int:
    return len(render(conversation, tokenizer, TEMPLATES[template]).ids)


def test_a_dialogue_of_k_answers_is_k_rows_under_the_cards_template(llama_tokenizer: Tokenizer) -> None:
    fitted = fit(Fitter(llama_tokenizer, CARD, 10_000), dialogue(3))
    assert [answers_of(row, llama_tokenizer)[0] for row in fitted.rows] == ["0", "1", "2"]
    assert (fitted.shown, fitted.is_cut, fitted.num_left_out, fitted.problem) == (dialogue(3), False, 0, "")


def test_the_oldest_turns_go_where_each_answer_is_a_row(llama_tokenizer: Tokenizer) -> None:
    conversation = dialogue(4, system="be kind")
    two_turns = replace(conversation, messages=(conversation.messages[0], *conversation.messages[-4:]))
    fitter = Fitter(llama_tokenizer, CARD, length(two_turns, llama_tokenizer))
    fitted = fit(fitter, conversation)
    assert fitted.is_cut
    assert (fitted.num_left_out, fitted.shown) == (0, None)
    assert fitted.rows[-1] == render(two_turns, llama_tokenizer, CARD)
    assert [answers_of(row, llama_tokenizer)[0] for row in fitted.rows] == ["0", "1", "2", "3"]


def test_the_longest_beginning_stays_where_all_answers_are_one_row(llama_tokenizer: Tokenizer) -> None:
    conversation = dialogue(4, system="be kind")
    beginning = replace(conversation, messages=conversation.messages[:5])
    fitter = Fitter(llama_tokenizer, CHATML, length(beginning, llama_tokenizer, "chatml"))
    fitted = fit(fitter, conversation)
    assert fitted.rows == [render(beginning, llama_tokenizer, CHATML)]
    assert (fitted.shown, fitted.is_cut, fitted.num_left_out) == (beginning, True, 2)


def test_held_out_rows_keep_a_beginning_that_can_be_shown(llama_tokenizer: Tokenizer) -> None:
    conversation = dialogue(4)
    fitter = Fitter(llama_tokenizer, CARD, length(dialogue(2), llama_tokenizer), keeps_beginning=True)
    fitted = fit(fitter, conversation)
    assert fitted.shown == replace(dialogue(2), source=conversation.source)
    assert fitted.rows == [render(row, llama_tokenizer, CARD) for row in rows_of(dialogue(2), CARD)]
    assert fitted.num_left_out == 2


@pytest.mark.parametrize("num_turns", [1, 3])
def test_too_long_may_mean_dropped(llama_tokenizer: Tokenizer, num_turns: int) -> None:
    limit = length(dialogue(num_turns), llama_tokenizer) - 1
    fitted = fit(Fitter(llama_tokenizer, CARD, limit, "drop"), dialogue(num_turns))
    assert (fitted.rows, fitted.problem) == ([], f"longer than {limit} tokens")


def test_a_prompt_longer_than_the_limit_is_told_apart(llama_tokenizer: Tokenizer) -> None:
    long_prompt = Conversation((Message("user", "q" * 200), Message("assistant", "a")))
    long_answer = Conversation((Message("user", "q"), Message("assistant", "a" * 200)))
    fitter = Fitter(llama_tokenizer, CARD, 150)
    assert [f.problem for f in fitter.fit([long_prompt, long_answer])] == [
        "its prompt alone is longer than 150 tokens",
        "longer than 150 tokens",
    ]


def test_an_answer_that_fits_with_no_turn_is_left_out_and_counted(llama_tokenizer: Tokenizer) -> None:
    messages = (*dialogue(1).messages, Message("user", "q"), Message("assistant", "a" * 500), *dialogue(1).messages)
    conversation = Conversation(messages)
    fitted = fit(Fitter(llama_tokenizer, CARD, length(dialogue(1), llama_tokenizer) + 20), conversation)
    assert (len(fitted.rows), fitted.num_left_out, fitted.is_cut) == (2, 1, True)


def test_nothing_that_fits_is_told(llama_tokenizer: Tokenizer) -> None:
    for template in (CARD, CHATML):
        fitted = fit(Fitter(llama_tokenizer, template, 12), dialogue(2))
        assert (fitted.rows, fitted.problem, fitted.is_cut) == ([], "longer than 12 tokens", False)


def test_what_the_template_refuses_is_told(llama_tokenizer: Tokenizer) -> None:
    fitted = fit(Fitter(llama_tokenizer, TEMPLATES["mistral"], 1000), dialogue(1, system="be kind"))
    assert fitted.rows == []
    assert fitted.problem == "refused by the template: no system message here"


@pytest.mark.parametrize("template", ["card", "chatml"])
def test_a_dialogue_of_500_turns_and_100_000_characters_is_cut_in_bounded_time(
    llama_tokenizer: Tokenizer, template: str
) -> None:
    """B4: rendering every answer's row whole would be 25 million characters here."""
    conversation = dialogue(500, words=95)
    fitter = Fitter(llama_tokenizer, TEMPLATES[template], 512)
    fitted = fit(fitter, conversation)
    assert len(conversation.text) > 95_000
    assert fitted.is_cut
    assert max(len(row.ids) for row in fitted.rows) <= 512
    assert template != "card" or (len(fitted.rows), fitted.num_left_out) == (500, 0)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5),
    max_tokens=st.integers(60, 300),
    template=st.sampled_from(["card", "chatml", "llama2"]),
    too_long=st.sampled_from(["drop", "cut_at_turn"]),
    keeps_beginning=st.booleans(),
)
def test_rows_fit_end_whole_and_every_answer_is_learned_or_counted(
    llama_tokenizer: Tokenizer,
    sizes: list[tuple[int, int]],
    max_tokens: int,
    template: str,
    too_long: TooLong,
    keeps_beginning: bool,
) -> None:
    """The law of lengths."""
    turns = [
        Message(role, f"{i}" + letter * size)
        for i, pair in enumerate(sizes)
        for role, letter, size in (("user", "q", pair[0]), ("assistant", "a", pair[1]))
    ]
    conversation = Conversation(tuple(turns))
    fitter = Fitter(llama_tokenizer, TEMPLATES[template], max_tokens, too_long, keeps_beginning)
    fitted = fit(fitter, conversation)
    ends = llama_tokenizer.special_ids
    num_ends = 0
    for row in fitted.rows:
        assert len(row.ids) <= max_tokens
        learned = [i for i, is_target in zip(row.ids, row.is_target, strict=True) if is_target]
        assert learned[-1] in ends
        num_ends += sum(i in ends for i in learned)
    assert bool(fitted.rows) != bool(fitted.problem)
    if fitted.rows:
        assert num_ends + fitted.num_left_out == len(sizes)
    if fitted.shown is not None:
        assert fitted.rows == [
            render(row, llama_tokenizer, TEMPLATES[template]) for row in rows_of(fitted.shown, TEMPLATES[template])
        ]
