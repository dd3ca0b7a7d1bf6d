"""The runtime tokenizer: loading, encoding, decoding, saving; bad files told in two lines."""

from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from graftlm.errors import UserError
from graftlm.text.tokenizer import Tokenizer, load_tokenizer, train_base_tokenizer

TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "Hello world 1234",
    "a\tb\nc\r\n\n d",
    "中文 mixed with English，标点。",
    "</s> and <s> and <unk> and <0x0A>",
    "emoji 👩‍👩‍👧‍👦 and NUL \0 end",
    "Ωmega çedilla ÉÈ",
    "\ufeffBOM",
]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    lines = [
        f"The {a} {b} sat on the mat number {n}, and said hello."
        for n, (a, b) in enumerate(
            (a, b) for a in ("old", "young", "happy", "sad") for b in ("cat", "dog", "hen", "farmer")
        )
    ]
    train_base_tokenizer(lines, 330, folder)
    return folder


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Tokenizer:
    return load_tokenizer(base_folder)


def test_engines_agree(base: Tokenizer, base_folder: Path) -> None:
    """T5: tokenizer.json = sentencepiece = AutoTokenizer on mixed text."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(base_folder / "tokenizer.model"))
    auto = AutoTokenizer.from_pretrained(base_folder)
    for text, ids in zip(TEXTS, base.encode_batch(TEXTS), strict=True):
        assert ids == base.encode(text) == reference.encode(text)
        assert ids == auto(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert auto(text, split_special_tokens=True).input_ids == [1, *ids]


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_the_text_back(base: Tokenizer, text: str) -> None:
    assert base.decode(base.encode(text)) == text
    assert base.decode_continuation(base.encode_continuation(text)) == text
    assert b"".join(map(base.token_bytes, base.encode_continuation(text))) == text.encode()


def test_continuation_is_what_follows_a_newline(base: Tokenizer) -> None:
    after_newline = base.encode("\n")
    for text in TEXTS:
        assert after_newline + base.encode_continuation(text) == base.encode("\n" + text)


def test_control_tokens_in_text_stay_text(base: Tokenizer) -> None:
    """B5: `</s>`, `<s>`, `[PAD]` in a user's text stay text."""
    for text in ("</s>", "<s>hi</s>", "[PAD]", "<unk>"):
        for ids in (base.encode(text), base.encode_continuation(text), base.encode_batch([text])[0]):
            assert not base.special_ids & set(ids)
        assert base.decode(base.encode(text)) == text


def test_specials_are_left_out_of_decoding(base: Tokenizer) -> None:
    assert base.decode([1, *base.encode("hello"), 2]) == "hello"
    assert base.token_bytes(base.eos_id) == b""


def test_lone_surrogate_is_told(base: Tokenizer) -> None:
    """B1: lone surrogates are told with their place."""
    for encode in (base.encode, base.encode_continuation, lambda text: base.encode_batch(["fine", text])):
        with pytest.raises(UserError, match=r"lone surrogate '\\ud800' at character 2"):
            encode("ab\ud800")


def test_save_and_load_keep_everything(base: Tokenizer, tmp_path: Path) -> None:
    base.save(tmp_path, chat_template="{{ messages[0].content }}")
    found = load_tokenizer(tmp_path)
    assert (found.fingerprint, found.special_tokens) == (base.fingerprint, base.special_tokens)
    assert found.chat_template == "{{ messages[0].content }}"
    auto = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "hello"}]
    assert auto.apply_chat_template(messages, tokenize=False) == "hello"
    assert (auto.bos_token, auto.eos_token, auto.unk_token) == ("<s>", "</s>", "<unk>")


def test_other_pieces_give_another_fingerprint(base: Tokenizer) -> None:
    assert train_base_tokenizer(["hello there, how are you"] * 4, 280).fingerprint != base.fingerprint
