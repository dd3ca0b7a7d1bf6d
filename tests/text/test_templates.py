"""The wording of the built-in templates, byte for byte, and how templates are found."""

from pathlib import Path

import pytest
from chat_templates import CHATML

from graftlm.errors import UserError
from graftlm.text.dialogue import Conversation, Message, render_text
from graftlm.text.templates import ALPACA, CARD, Template, find_template
from graftlm.text.tokenizer import Tokenizer

HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
HEAD_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


def said(*texts: str, given: str = "", system: str = "") -> Conversation:
    messages = [Message("system", system)] if system else []
    messages += [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    place = max(i for i, message in enumerate(messages) if message.role == "user")
    messages[place] = Message("user", messages[place].content, given)
    return Conversation(tuple(messages))


def text(template: Template, conversation: Conversation, *, for_reply: bool = False) -> str:
    return render_text(conversation, None, template, for_reply=for_reply)


def test_the_cards_prompt_for_one_turn() -> None:
    content = "给出保持健康的三个建议。"
    expected = f"{HEAD}\n\n### Instruction:\n\n{content}\n\n### Response:\n\n"
    assert text(CARD, said(content), for_reply=True) == f"<s>{expected}"
    assert text(CARD, said(content, "多睡。")) == f"<s>{expected}多睡。</s>"


def test_the_cards_prompt_with_history() -> None:
    expected = f"{HEAD}\n\n### Instruction:\n\nHuman:你好\nAssistant:你好！\nHuman:再见\n\n### Response:\n\n"
    assert text(CARD, said("你好", "你好！", "再见"), for_reply=True) == f"<s>{expected}"
    assert text(CARD, said("你好", "你好！", "再见", "再见！")) == f"<s>{expected}再见！</s>"


def test_the_cards_prompt_with_an_input_and_a_system_message() -> None:
    frame = f"{HEAD}\n\n### Instruction:\n\nadd these\n1 2\n\n### Response:\n\n"
    assert text(CARD, said("add these", given="1 2"), for_reply=True) == f"<s>{frame}"
    assert text(CARD, said("add these", given="1 2", system="Be kind."), for_reply=True) == f"<s>Be kind.\n\n{frame}"


def test_the_original_alpaca_prompts() -> None:
    assert text(ALPACA, said("add", "3")) == f"<s>{HEAD}\n\n### Instruction:\nadd\n\n### Response:3</s>"
    assert text(ALPACA, said("add", given="1 2"), for_reply=True) == (
        f"<s>{HEAD_WITH_INPUT}\n\n### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:"
    )


def test_templates_are_found_by_name_file_and_tokenizer(tmp_path: Path, llama_tokenizer: Tokenizer) -> None:
    assert find_template("card") is CARD
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML, encoding="utf-8")
    assert find_template(str(path)) == Template(str(path), CHATML, "all")
    path.write_text(CARD.jinja, encoding="utf-8")
    assert find_template(str(path)) is CARD
    llama_tokenizer.save(tmp_path, chat_template=ALPACA.jinja)
    from graftlm.text.tokenizer import load_tokenizer

    assert find_template("tokenizer", load_tokenizer(tmp_path)) is ALPACA


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("crad", "No template is called 'crad'"),
        ("none.jinja", "cannot be read: No such file"),
        ("tokenizer", "No tokenizer to take the template from"),
        ("gbk.jinja", "is not UTF-8"),
    ],
)
def test_a_template_that_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    """B1 B2: a missing file, a file of another encoding, a misspelt name."""
    monkeypatch.chdir(tmp_path)
    Path("gbk.jinja").write_bytes("你好".encode("gbk"))
    with pytest.raises(UserError) as told:
        find_template(name)
    assert problem in told.value.problem
    assert told.value.fix


def test_the_fingerprint_knows_wording_and_rows() -> None:
    same = Template("other name", CARD.jinja, "last")
    assert same.fingerprint == CARD.fingerprint
    assert Template("card", CARD.jinja, "all").fingerprint != CARD.fingerprint != ALPACA.fingerprint
