"""Answering: whole characters, what is never sampled, batches equal to single rows, the context's end."""

from pathlib import Path

import pytest
import torch

from graftlm.errors import UserError
from graftlm.model.causal import new_causal, save_causal
from graftlm.talk import generate
from graftlm.talk.generate import Chatbot, ask, load_chatbot
from graftlm.talk.sampling import Sampling
from graftlm.text.dialogue import CARD, Conversation, Message, Template, render

QUESTIONS = [
    "hello", "what is the capital of France?", "one two three four five " * 3, "你好", "how are you?", "今天天气很好吗",
    "x", "Below is an instruction", "hello there, how are you today? " * 2,
]  # fmt: skip


def test_streaming_yields_whole_characters_only(speaking, tokenizer) -> None:
    text = "鑫😀 ok 龘"
    ids = tokenizer.encode_continuation(text)
    assert any(len(tokenizer.token_bytes(i)) == 1 and tokenizer.token_bytes(i)[0] > 127 for i in ids)
    pieces = list(speaking(ids).stream(ask("hi")))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece and piece for piece in pieces)
    assert pieces[0] == "鑫"


def test_a_character_cut_by_the_token_limit_is_left_out(speaking, tokenizer) -> None:
    ids = tokenizer.encode_continuation("a鑫")
    answer = speaking(ids).answer(ask("hi"), Sampling(max_tokens=len(ids) - 1))
    assert (answer.text, answer.ending) == ("a", "length")


def test_padded_rows_and_control_tokens_are_never_said(speaking, tokenizer) -> None:
    """T2: their logits are the highest here, and yet the scripted ids come out."""
    ids = tokenizer.encode_continuation("hello")
    bot = speaking(ids, num_padded_rows=7)
    for sampling in (Sampling(), Sampling(temperature=0.3, seed=1)):
        assert bot.answer(ask("hi"), sampling).text == "hello"
        assert bot.answer_many([ask("hi")], sampling)[0].text == "hello"


def test_answers_stop_at_the_end_token_and_count(speaking, tokenizer) -> None:
    ids = tokenizer.encode_continuation("hello there")
    answer = speaking(ids).answer(ask("hi"))
    prompt = render(ask("hi"), tokenizer, CARD, for_reply=True).ids
    assert (answer.text, answer.ending) == ("hello there", "end")
    assert (answer.prompt_tokens, answer.answer_tokens) == (len(prompt), len(ids))


def test_batched_answers_equal_single_ones(chatbot) -> None:
    conversations = [ask(question) for question in QUESTIONS] + [ask("hello", "one two", "and three?")]
    drawn = Sampling(1.3, repetition_penalty=1.2, max_tokens=16, seed=6)
    for sampling in (Sampling(max_tokens=24), drawn):
        single = [chatbot.answer(conversation, sampling) for conversation in conversations]
        assert chatbot.answer_many(conversations, sampling) == single
        assert len({answer.text for answer in single}) > 3


def test_answers_equal_transformers(chatbot, tokenizer) -> None:
    """An outside judge: greedy `generate` of transformers, one row at a time."""
    for question in QUESTIONS[:4]:
        prompt = chatbot.prompt(ask(question), Sampling()).ids
        output = chatbot.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=12, pad_token_id=0,
            bad_words_ids=[[i] for i in (*range(tokenizer.num_pieces, tokenizer.num_pieces + 20), 0, 1)],
        )  # fmt: skip
        said = [token for step in chatbot.decode([prompt], Sampling(max_tokens=12)) for _, token in step]
        assert output[0, len(prompt) :].tolist() == said


def test_rows_leave_the_batch_as_they_finish(chatbot, monkeypatch) -> None:
    """Endings of all lengths: made by giving every row a limit of its own through the context."""
    prompts = [chatbot.prompt(ask(question), Sampling()).ids for question in QUESTIONS]
    monkeypatch.setattr(chatbot, "context_tokens", max(map(len, prompts)) + 3)
    together: dict[int, list[int]] = {}
    widths = []
    for step in chatbot.decode(prompts, Sampling(max_tokens=40)):
        widths.append(len(step))
        for row, token in step:
            together.setdefault(row, []).append(token)
    alone = [[t for step in chatbot.decode([p], Sampling(max_tokens=40)) for _, t in step] for p in prompts]
    assert [together[row] for row in range(len(prompts))] == alone
    assert widths[0] == len(prompts)
    assert widths[-1] < len(prompts) / 2


def test_batches_bound_their_tokens(monkeypatch) -> None:
    monkeypatch.setattr(generate, "BATCH_TOKENS", 100)
    groups = generate._batches([10, 30, 10, 80, 200], max_tokens=20)
    assert sorted(place for group in groups for place in group) == [0, 1, 2, 3, 4]
    assert groups == [[4], [3], [1, 0], [2]]


def test_oldest_turns_go_whole_and_are_counted(tokenizer, speaking) -> None:
    bot = speaking(tokenizer.encode_continuation("ok"), max_positions=260)
    turns = [Message("system", "Be kind.")]
    for number in range(12):
        turns += [Message("user", f"question {number}?"), Message("assistant", f"answer {number}.")]
    long = Conversation((*turns, Message("user", "last one?")))
    prompt = bot.prompt(long, Sampling(max_tokens=20))
    assert prompt.num_dropped_messages > 0
    assert prompt.num_dropped_messages % 2 == 0
    text = tokenizer.decode(prompt.ids)
    first_kept = prompt.num_dropped_messages // 2
    assert "Be kind." in text
    assert "last one?" in text
    assert f"question {first_kept}?" in text
    assert f"question {first_kept - 1}?" not in text
    assert f"answer {first_kept - 1}." not in text
    assert bot.answer(long, Sampling(max_tokens=20)).num_dropped_messages == prompt.num_dropped_messages


def test_a_question_beyond_the_context_is_refused_with_both_numbers(speaking) -> None:
    bot = speaking([5], max_positions=260)
    with pytest.raises(UserError, match=r"takes [\d,]+ tokens; of this model's 260 at most 250") as error:
        bot.prompt(ask("hello there " * 200), Sampling(max_tokens=10))
    assert error.value.fix == "Shorten it."
    question = ask("hello there")
    bot.context_tokens = len(bot.prompt(question, Sampling(max_tokens=10)).ids) + 4
    with pytest.raises(UserError) as error:
        bot.prompt(question, Sampling(max_tokens=10))
    assert error.value.fix == "Shorten it, or ask for at most 4 new tokens."
    bot.prompt(question, Sampling(max_tokens=4))


def test_a_conversation_the_template_refuses_is_told(speaking, tokenizer) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    template = Template("strict", strict + "{% for m in messages %}{{ m.content }}</s>{% endfor %}", "all")
    bot = Chatbot(speaking([5]).model, tokenizer, template)
    led = Conversation((Message("system", "Be kind."), Message("user", "hi")))
    with pytest.raises(UserError, match="does not take messages of system, user: no system here") as error:
        bot.answer(led)
    assert error.value.fix.startswith("Leave out what it refuses")


def test_generation_ends_where_the_context_ends(chatbot, monkeypatch) -> None:
    prompt = chatbot.prompt(ask("hello"), Sampling()).ids
    monkeypatch.setattr(chatbot, "context_tokens", len(prompt) + 5)
    said = [token for step in chatbot.decode([prompt], Sampling(max_tokens=400)) for _, token in step]
    assert len(said) <= 5


def test_leaving_a_stream_stops_the_model(speaking, tokenizer) -> None:
    """S3, here without a server: closing the reply ends generation."""
    bot = speaking(tokenizer.encode_continuation("one two three four five"))
    reply = bot.stream(ask("hi"))
    next(reply)
    steps = bot.model.num_steps_taken
    reply.close()
    assert list(reply) == []
    assert bot.model.num_steps_taken == steps


def test_the_template_s_own_end_of_turn_ends_an_answer(tokenizer, speaking) -> None:
    other = tokenizer.special_tokens["<unk>"]
    template = Template("unk-ends", "{{ bos_token }}{% for m in messages %}{{ m.content }}<unk>{% endfor %}", "all")
    bot = speaking([*tokenizer.encode_continuation("ok"), other, *tokenizer.encode_continuation("never")])
    bot = Chatbot(bot.model, tokenizer, template)
    assert bot.stop_ids == {tokenizer.eos_id, other}
    assert bot.answer(ask("hi")).text == "ok"


def test_a_folder_talks_as_the_model_it_was_saved_from(tmp_path: Path, tokenizer, chatbot) -> None:
    model = chatbot.model
    save_causal(model, tmp_path / "m", also=lambda folder: tokenizer.save(folder, chat_template=CARD.jinja))
    loaded = load_chatbot(tmp_path / "m", device="cpu")
    assert loaded.template == CARD
    sampling = Sampling(max_tokens=16)
    assert loaded.answer(ask("hello"), sampling) == chatbot.answer(ask("hello"), sampling)


def test_a_run_folder_stands_for_its_finished_model(tmp_path: Path, tokenizer, chatbot) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match="no finished model yet"):
        load_chatbot(tmp_path)
    save_causal(chatbot.model, tmp_path / "6-model", also=lambda f: tokenizer.save(f, chat_template=CARD.jinja))
    (tmp_path / "6-model" / "done.json").write_text("{}")
    assert load_chatbot(tmp_path, device="cpu").template == CARD


def test_what_is_not_in_a_run_folder_is_no_step_of_it(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match=r"There is no model folder .*nope"):
        load_chatbot(tmp_path / "nope")
    (tmp_path / "4-full").mkdir()
    with pytest.raises(UserError, match="a step of a run that is not finished"):
        load_chatbot(tmp_path / "4-full")


def test_more_ids_than_rows_is_told_before_weights_are_read(tmp_path: Path, tokenizer) -> None:
    """T1: a tokenizer of another size than the model, found without touching the weights."""
    small = new_causal(num_rows=100, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8)
    save_causal(small, tmp_path / "m", also=tokenizer.save)
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{tokenizer.num_pieces} ids, the model 100 rows"):
        load_chatbot(tmp_path / "m")


def test_a_base_without_template_gets_the_card_s_and_is_told(tmp_path: Path, tokenizer, chatbot, capsys) -> None:
    save_causal(chatbot.model, tmp_path / "m", also=tokenizer.save)
    assert load_chatbot(tmp_path / "m", device="cpu").template == CARD
    assert "no chat template" in capsys.readouterr().err
