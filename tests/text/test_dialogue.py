"""Laws of rendering: the mask covers exactly the answers and their ends; user text is only ever text."""

from pathlib import Path
from typing import Any

import pytest
from chat_templates import CONTROL_TOKENS, TEMPLATES, WITHOUT_SYSTEM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftlm.errors import UserError
from graftlm.text.dialogue import (
    Conversation,
    Message,
    Rendered,
    Template,
    TemplateRefused,
    render,
    render_many,
    render_text,
    rows_of,
)
from graftlm.text.tokenizer import Tokenizer

HOSTILE = (
    *CONTROL_TOKENS, "### Response:", "\n\n### Response:\n\n", "### Instruction:", "\nHuman:", "\nAssistant:",
    "[/INST]", "<<SYS>>", "\U000f0000", "\U000f0001", "\U0010fffd", "{{ eos_token }}", "{% endfor %}", "你好", "é",
    "a b", "\n", " ", "\t",
)  # fmt: skip
PLAIN = (("What is it?", "A cat."), ("你好", "你好！再见。"), ("and\nthen", "line one\nline two"))

contents = st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=6).map("".join).filter(str.strip)
dialogues = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)


def conversation_of(turns: Any, system: str = "") -> Conversation:
    messages = [Message("system", system)] if system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(messages), "file:1")


def learned_runs(row: Rendered) -> list[list[int]]:
    """The stretches of learned tokens."""
    runs: list[list[int]] = []
    before = False
    for token_id, is_target in zip(row.ids, row.is_target, strict=True):
        if is_target and not before:
            runs.append([])
        if is_target:
            runs[-1].append(token_id)
        before = is_target
    return runs


def spelled(ids: list[int], tokenizer: Tokenizer) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def spelled_whole(row: Rendered, tokenizer: Tokenizer) -> str:
    return spelled([i for i in row.ids if i not in tokenizer.special_ids], tokenizer)


def check_mask(row: Rendered, answers: list[str], tokenizer: Tokenizer) -> None:
    """Each learned stretch is one answer and the one control token ending it, and nothing else is learned."""
    runs = learned_runs(row)
    assert [spelled(run[:-1], tokenizer).strip() for run in runs] == [answer.strip() for answer in answers]
    for run in runs:
        assert run[-1] in tokenizer.special_ids
        assert not set(run[:-1]) & tokenizer.special_ids
    assert not row.is_target[0]
    num_bytes = sum(len(spelled(run[:-1], tokenizer).encode()) for run in runs)
    assert row.num_target_bytes == num_bytes


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_covers_each_answer_and_its_end(name: str, tokenizer: Tokenizer) -> None:
    template = TEMPLATES[name]
    whole = conversation_of(PLAIN, "" if name in WITHOUT_SYSTEM else "Be kind.")
    rows = rows_of(whole, template)
    for number, row in enumerate(rows, start=1):
        answers = [answer for _, answer in PLAIN]
        check_mask(
            render(row, tokenizer, template), answers[number - 1 : number] if len(rows) > 1 else answers, tokenizer
        )


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=dialogues)
def test_nothing_anyone_writes_moves_the_mask_or_becomes_a_control_token(
    name: str, llama_tokenizer: Tokenizer, byte_tokenizer: Tokenizer, turns: list[tuple[str, str]]
) -> None:
    """B5 B6: control tokens, frames, marks and jinja in questions and answers stay text, in every turn."""
    template = TEMPLATES[name]
    harmless = conversation_of([("q", "a")] * len(turns))
    for tokenizer in (llama_tokenizer, byte_tokenizer):
        control = [i for i in render(harmless, tokenizer, template).ids if i in tokenizer.special_ids]
        row = render(conversation_of(turns), tokenizer, template)
        assert [i for i in row.ids if i in tokenizer.special_ids] == control
        check_mask(row, [a for _, a in turns] if template.answers_per_row == "all" else [turns[-1][1]], tokenizer)
        for question, _ in turns:
            assert question.strip() in spelled_whole(row, tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_training_saw_before_the_answer(name: str, tokenizer: Tokenizer) -> None:
    """Training and serving cannot drift apart: same ids up to the first learned token, in every turn."""
    template = TEMPLATES[name]
    for num_turns in range(1, len(PLAIN) + 1):
        asked = conversation_of(PLAIN[:num_turns])
        row = render(asked, tokenizer, template)
        last_start = max(i for i, learned in enumerate(row.is_target) if learned and not row.is_target[i - 1])
        for conversation in (asked, Conversation(asked.messages[:-1])):
            prompt = render(conversation, tokenizer, template, for_reply=True)
            assert prompt.ids == row.ids[:last_start]
            assert not any(prompt.is_target)


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_is_transformers_chat_template(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Parity: the exported folder's `apply_chat_template` gives our text, and our ids for prompts."""
    from transformers import AutoTokenizer

    template = TEMPLATES[name]
    tokenizer.save(tmp_path, chat_template=template.jinja)
    other = AutoTokenizer.from_pretrained(tmp_path)
    systems = ("",) if name in WITHOUT_SYSTEM else ("", "Be kind.\nBe brief.")
    hostile = [(" ".join(HOSTILE[:12]), "".join(HOSTILE[12:])), ("  spaces \n", "\u3000full width，")]
    for system in systems:
        for turns in (PLAIN[:1], PLAIN, hostile):
            conversation = conversation_of(turns, system)
            messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
            assert other.apply_chat_template(messages, tokenize=False) == render_text(conversation, tokenizer, template)
            asked, open_messages = Conversation(conversation.messages[:-1]), messages[:-1]
            assert other.apply_chat_template(open_messages, tokenize=False, add_generation_prompt=True) == render_text(
                asked, tokenizer, template, for_reply=True
            )
            if turns is not hostile:  # transformers makes control tokens of what a user writes
                ids = other.apply_chat_template(open_messages, add_generation_prompt=True, return_dict=False)
                assert ids == render(asked, tokenizer, template, for_reply=True).ids


@pytest.mark.parametrize("template", ["card", "alpaca"])
def test_an_instructions_input_reaches_transformers_too(template: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path, chat_template=TEMPLATES[template].jinja)
    other = AutoTokenizer.from_pretrained(tmp_path)
    conversation = Conversation((Message("user", "add", "1 2"), Message("assistant", "3")))
    messages = [{"role": "user", "content": "add", "input": "1 2"}, {"role": "assistant", "content": "3"}]
    expected = other.apply_chat_template(messages, tokenize=False)
    assert render_text(conversation, tokenizer, TEMPLATES[template]) == expected
    assert "1 2" in expected


def test_many_rows_are_rendered_as_one_by_one(tokenizer: Tokenizer) -> None:
    rows = [conversation_of(PLAIN[:n], "Be kind." if n == 2 else "") for n in (1, 2, 3)] * 2
    found = list(render_many(rows, tokenizer, TEMPLATES["mistral"]))
    assert [isinstance(row, TemplateRefused) for row in found] == [False, True, False] * 2
    assert found[2] == render(rows[2], tokenizer, TEMPLATES["mistral"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(questions=st.lists(st.text(st.sampled_from("ab \n\t你<s>0")), min_size=2, max_size=5))
def test_a_frame_encoded_once_changes_no_id(tokenizer: Tokenizer, questions: list[str]) -> None:
    """Rows that begin alike, also beyond the frame, give the ids they give alone."""
    rows = [conversation_of([(f"\n{question}", "a")]) for question in questions]
    for template in (TEMPLATES["card"], TEMPLATES["alpaca"]):
        assert list(render_many(rows, tokenizer, template)) == [render(row, tokenizer, template) for row in rows]


def test_pad_as_end_keeps_the_label(llama_tokenizer: Tokenizer) -> None:
    """T3: the end of an answer is learned whatever token pads: the mask comes from the text, not from ids."""
    row = render(conversation_of(PLAIN[:1]), llama_tokenizer, TEMPLATES["card"])
    assert (row.ids[-1], row.is_target[-1]) == (llama_tokenizer.eos_id, True)
    padded = Template("padded", TEMPLATES["card"].jinja.replace("eos_token", "pad_token"), "last")
    row = render(conversation_of(PLAIN[:1]), llama_tokenizer, padded)
    assert (row.ids[-1], row.is_target[-1]) == (llama_tokenizer.pad_id, True)


def test_a_template_that_never_ends_an_answer_is_refused(llama_tokenizer: Tokenizer) -> None:
    endless = Template(
        "endless", "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}", "all"
    )
    with pytest.raises(UserError, match="does not end an answer with a control token") as told:
        render(conversation_of(PLAIN), llama_tokenizer, endless)
    assert "eos_token" in told.value.fix


@pytest.mark.parametrize(
    ("jinja", "reason"),
    [
        ("{% for m in messages %}{{ m['content'] + m['content'] + eos_token }}{% endfor %}", "twice"),
        ("{% for m in messages %}{{ m['role'] + eos_token }}{% endfor %}", "never"),
        ("{% for m in messages %}{{ m['content'][:3] + eos_token }}{% endfor %}", "short"),
        ("{{ messages[7]['content'] }}", "object"),
    ],
)
def test_a_template_that_mangles_an_answer_is_refused(llama_tokenizer: Tokenizer, jinja: str, reason: str) -> None:
    with pytest.raises(TemplateRefused, match=reason):
        render(conversation_of(PLAIN), llama_tokenizer, Template("bad", jinja, "all"))


def test_plain_text_is_no_dialogue(llama_tokenizer: Tokenizer) -> None:
    document = Conversation((Message("text", "a document"),), "file:3")
    with pytest.raises(UserError, match="file:3 is a plain text") as told:
        render(document, llama_tokenizer, TEMPLATES["card"])
    assert "objective: text" in told.value.fix


def test_100_000_characters_are_rendered_in_bounded_time(llama_tokenizer: Tokenizer) -> None:
    """B4: one letter, blanks, newlines, control tokens, private-use characters, 100,000 and more of each."""
    for filling in ("a", "啊", " ", "\n", "</s>", "\U000f0000", "ab " * 5):
        conversation = conversation_of([("q" + filling * (100_000 // len(filling)), "a")])
        check_mask(render(conversation, llama_tokenizer, TEMPLATES["card"]), ["a"], llama_tokenizer)
    everything = "".join(map(chr, (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))))
    with pytest.raises(TemplateRefused, match="every private-use character"):
        render(conversation_of([(everything, "a")]), llama_tokenizer, TEMPLATES["card"])
