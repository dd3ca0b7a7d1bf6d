"""Pieces of answers: stop strings across tokens, whole characters, tokens told with their text."""

import pytest

from graftlm.talk.serving.speech import Said, Scored, Speech


def spoken(tokenizer, text: str, *stop: str) -> tuple[list[str], bool]:
    """What is shown piece by piece of `text`, and whether a stop string ended it."""
    speech = Speech(tokenizer, stop)
    shown = []
    for token_id in tokenizer.encode_continuation(text):
        piece, _, is_stopped = speech.take(token_id)
        shown.append(piece)
        if is_stopped:
            return shown, True
    return [*shown, speech.rest()[0]], False


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [("one two three", ("two",), "one "), ("one two three", ("o t", "wo"), "one tw"), ("one two", ("\n",), "one two"),
     ("one twx", ("two",), "one twx"), ("one tw", ("two",), "one tw"), ("aaab", ("aab",), "a"),
     ("你好天", ("好天",), "你"), ("one two", ("one two",), "")],
)  # fmt: skip
def test_a_stop_string_ends_the_answer_and_is_not_shown(
    tokenizer, text: str, stop: tuple[str, ...], shown: str
) -> None:
    cut = min((text.find(s) for s in stop if s in text), default=len(text))
    pieces, is_stopped = spoken(tokenizer, text, *stop)
    assert "".join(pieces) == text[:cut]
    assert is_stopped == (cut < len(text) or any(text.startswith(s) for s in stop))
    if cut == text.find(stop[0]):
        assert text[:cut] == shown


def test_only_what_may_begin_a_stop_string_is_held_back(tokenizer) -> None:
    pieces, _ = spoken(tokenizer, "one two three", "###")
    assert pieces[0]
    assert pieces[-1] == ""


def test_tokens_are_told_with_their_text_and_not_beyond_a_stop(tokenizer) -> None:
    ids = tokenizer.encode_continuation("鑫 one two")
    speech = Speech(tokenizer, ("two",))
    told: list[Said] = []
    for token_id in ids:
        text, tokens, is_stopped = speech.take(token_id, Said(Scored(tokenizer.token_bytes(token_id), 0.0), ()))
        told += tokens
        assert bool(tokens) == bool(text) or not text
        if is_stopped:
            break
    assert b"".join(said.token.spelled for said in told).decode().startswith("鑫 one")
    assert b"two" not in b"".join(said.token.spelled for said in told)
