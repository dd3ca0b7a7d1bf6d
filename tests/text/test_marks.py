"""Marks around what is said: always free characters, always taken away again."""

import pytest
from chat_templates import TEMPLATES
from hypothesis import given
from hypothesis import strategies as st

from graftlm.text.dialogue import Message
from graftlm.text.marks import Marked, control_of
from graftlm.text.tokenizer import Tokenizer

ECHO = TEMPLATES["chatml"]


@given(st.lists(st.text(st.sampled_from("ab \n</s>\U000f0000\U000f0001\U000ffffd\U0010fffd")), min_size=1, max_size=4))
def test_what_was_said_comes_back_and_no_mark_was_said(contents: list[str]) -> None:
    marked = Marked([Message("user", content) for content in contents], control_of(None), ECHO)
    rendered = marked.render(len(contents), False)
    assert marked.plain(rendered) == "".join(f"<|im_start|>user\n{content}<|im_end|>\n" for content in contents)
    for mark in (marked.close, *marked.open):
        assert not any(mark in content for content in contents)
    # A control token of the tokenizer never stands inside what a user said.
    assert "</s>" not in rendered


def test_control_tokens_are_the_tokenizers_own(llama_tokenizer: Tokenizer) -> None:
    control = control_of(llama_tokenizer)
    assert control.ids == llama_tokenizer.special_tokens
    assert control.names == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "<unk>"}
    # The longest name wins where one begins another.
    assert [found.group() for found in control.pattern.finditer("<|im_end|><s></s>")] == ["<|im_end|>", "<s>", "</s>"]


@pytest.mark.parametrize("content", ["", "  ", "\n"])
def test_an_empty_message_still_has_its_marks(content: str) -> None:
    marked = Marked([Message("user", content)], control_of(None), ECHO)
    rendered = marked.render(1, False)
    assert rendered.index(marked.open[0]) < rendered.index(marked.close)
    assert marked.plain(rendered) == f"<|im_start|>user\n{content}<|im_end|>\n"
