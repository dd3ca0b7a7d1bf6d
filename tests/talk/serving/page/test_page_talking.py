"""The page in a real browser: talking, stopping, editing, keeping, comparing, and what is said when things go wrong."""

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftlm.talk.generate import ask
from graftlm.talk.prompts import load_conversation
from graftlm.talk.serving.backend import AnswerFailed
from graftlm.talk.serving.engine import Busy
from graftlm.talk.serving.prompting import Voice
from graftlm.text.corpus import read_conversations
from graftlm.text.dialogue import CARD, Template, render


def answers(page: Any) -> list[str]:
    return page.locator(".answer .body").all_inner_texts()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_conversation_streams_and_carries_its_history(visit, speaker, prompts, send) -> None:
    go = threading.Event()
    model = speaker(["你好", ", this", go, " is it."], ["second"])
    page = visit(model)
    assert page.locator("#examples button").count() == 3
    send(page, "What is  it?\nSay.", waits=False)
    page.get_by_text("你好, this", exact=True).wait_for()  # before the answer has ended
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    assert page.locator("#stop").is_visible()
    go.set()
    page.locator("#send:visible").wait_for()
    assert answers(page) == ["你好, this is it."]
    assert page.locator(".question .said").inner_text() == "What is  it?\nSay."
    assert "你好, this is it." in page.locator("#announce").inner_text()
    assert "answer 3 tokens" in page.locator(".figures").inner_text()
    assert "tokens/s" in page.locator(".figures").inner_text()
    send(page, "and?")
    assert answers(page)[1] == "second"
    assert "Human:What is  it?\nSay.\nAssistant:你好, this is it.\nHuman:and?" in prompts(model)[1]


def test_stop_ends_the_model_and_keeps_what_was_said(visit, speaker, prompts, send) -> None:
    """S3: the server is told within a step."""
    model = speaker(["half", threading.Event(), "never"], ["half", threading.Event()])
    page = visit(model)
    for key in (lambda: page.locator("#stop").click(), lambda: page.keyboard.press("Escape")):
        send(page, "go on", waits=False)
        page.locator(".turn:last-child .body").get_by_text("half").wait_for()
        key()
        page.locator("#send:visible").wait_for()
        assert page.locator(".turn:last-child .figures").inner_text() == "stopped"
    until(lambda: model.backend.num_left == 2)
    assert model.backend.num_pieces == 2
    send(page, "and?")
    assert answers(page) == ["half", "half", "ok"]
    assert "Assistant:half\nHuman:and?" in prompts(model)[2]


def test_reload_keeps_conversations_even_one_under_way(visit, speaker, send) -> None:
    page = visit(speaker(["first"], ["part", threading.Event()]))
    send(page, "one")
    page.locator("#new").click()
    send(page, "two", waits=False)
    page.get_by_text("part", exact=True).wait_for()
    page.locator("#talks .open", has_text="one").click()
    page.locator("#text").fill("and?")
    page.locator("#text").press("Enter")  # one at a time: told, and the text stays
    assert page.get_by_text("“two” is being answered. Wait for it, or stop it.").is_visible()
    assert page.locator("#text").input_value() == "and?"
    page.locator("#talks .open", has_text="two").click()
    page.reload()
    assert answers(page) == ["part"]
    assert page.locator(".figures").inner_text() == "stopped"
    assert page.locator("#talks .open").all_inner_texts() == ["two", "one"]
    page.locator("#talks .open", has_text="one").click()
    assert answers(page) == ["first"]
    page.reload()
    assert answers(page) == ["first"]


def test_a_question_is_edited_and_an_answer_drawn_anew(visit, speaker, prompts, send) -> None:
    model = speaker(["a"], ["b"], ["c"], ["d"])
    page = visit(model)
    send(page, "one")
    send(page, "two")
    page.get_by_role("button", name="Answer again").click()
    page.get_by_text("c", exact=True).wait_for()
    assert answers(page) == ["a", "c"]
    page.get_by_role("button", name="Edit").first.click()
    field = page.get_by_role("textbox", name="Edit")
    assert field.input_value() == "one"
    field.press("Escape")
    assert page.locator(".question .said").all_inner_texts() == ["one", "two"]
    page.get_by_role("button", name="Edit").first.click()
    field.fill("uno")
    page.get_by_role("button", name="Save and ask").click()
    page.get_by_text("d", exact=True).wait_for()
    assert (page.locator(".question .said").all_inner_texts(), answers(page)) == (["uno"], ["d"])
    assert prompts(model)[3].endswith("uno\n\n### Response:\n\n")
    assert "Human:" not in prompts(model)[3]


def test_conversations_are_renamed_exported_deleted_and_brought_back(visit, speaker, send, tmp_path: Path) -> None:
    page = visit(speaker(["eins"], ["zwei"]))
    send(page, "one")
    page.get_by_role("button", name="Rename").click()
    page.get_by_role("textbox", name="New name").fill("Zahlen / 数")
    page.keyboard.press("Enter")
    assert page.locator("#talks .open").inner_text() == "Zahlen / 数"
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    assert download.value.suggested_filename == "Zahlen-数.json"
    download.value.save_as(tmp_path / "one.json")
    row = json.loads((tmp_path / "one.json").read_text())
    assert (row["title"], row["model"]) == ("Zahlen / 数", "bot")
    assert row["messages"] == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "eins"}]
    assert [message.content for message in load_conversation(tmp_path / "one.json").messages] == ["one", "eins"]
    page.get_by_role("button", name="Delete").click()
    assert page.locator("#talks li").count() == 0
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('graftlm.talk.'))") == []
    page.get_by_role("button", name="Undo").click()
    assert answers(page) == ["eins"]
    page.locator("#new").click()
    send(page, "two")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    download.value.save_as(tmp_path / "all.jsonl")
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2


def test_parameters_and_system_message_reach_the_model(visit, speaker, prompts, send) -> None:
    model = speaker()
    page = visit(model)
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("System message", exact=True).is_hidden()  # until asked for
    page.locator("#system summary").click()
    given = {"Temperature": "0", "Top-p": "0.5", "Top-k": "7", "Repetition penalty": "1.25", "Seed": "42"}
    for name, value in {**given, "Longest answer, in tokens": "9", "System message": "Be kind."}.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_label("Top-p", exact=True).fill("3")
    assert page.get_by_label("Top-p", exact=True).get_attribute("aria-invalid") == "true"
    assert "Not taken." in page.locator("#h-top_p").inner_text()
    page.keyboard.press("Escape")
    page.reload()
    send(page, "hi")
    drawn = model.backend.asked[0].sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0, 0.5, 7)
    assert (drawn.repetition_penalty, drawn.max_tokens, drawn.seed) == (1.25, 9, 42)
    assert "Be kind.\n\nBelow is an instruction" in prompts(model)[0]


def test_a_system_message_is_offered_where_the_template_has_a_place_for_it(visit, speaker, prompts, send) -> None:
    """One kept from before is then not sent either: it would be refused."""
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    plain = Template("plain", refusing + "{{ messages[-1].content }}{{ eos_token }}", "last")
    model, other = speaker(name="plain"), speaker(name="other")
    model = replace(model, voice=Voice(model.voice.tokenizer, plain, 4096))
    page = visit(model, other)
    page.get_by_label("Model").select_option("other")
    page.get_by_role("button", name="Settings").click()
    page.locator("#system summary").click()
    page.get_by_label("System message", exact=True).fill("Be kind.")
    page.keyboard.press("Escape")
    page.get_by_label("Model").select_option("plain")
    page.get_by_role("button", name="Settings").click()
    assert page.locator("#system").is_hidden()
    page.keyboard.press("Escape")
    send(page, "hi")
    page.get_by_label("Model").select_option("other")
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("System message", exact=True).input_value() == "Be kind."
    page.keyboard.press("Escape")
    send(page, "and?")
    assert answers(page) == ["ok", "ok"]
    assert "Be kind." not in prompts(model)[0]
    assert "Be kind." in prompts(other)[0]


def test_two_models_answer_side_by_side(visit, speaker, prompts, send, tmp_path: Path) -> None:
    """Both get the question, each its own history; one can be asked anew, or alone.

    An export holds each one's talk as it was asked: up to its last answer, another's words where it had none.
    """
    left = speaker(["L1"], ["L2"], [AnswerFailed()], ["L3"], [threading.Event()], name="left")
    right = speaker(["R1"], ["R2"], ["R3"], ["R4"], name="right")
    page = visit(left, right, viewport={"width": 1200, "height": 800})
    send(page, "hi")
    assert page.locator(".answer h3").all_inner_texts() == ["left", "right"]
    boxes = [page.locator(".answer").nth(place).bounding_box() for place in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    send(page, "and?")
    assert answers(page) == ["L1", "R1", "L2", "R2"]
    assert "Assistant:L1\n" in prompts(left)[1]
    assert "Assistant:R1\n" in prompts(right)[1]
    page.get_by_role("button", name="Answer again").last.click()
    page.get_by_text("R3", exact=True).wait_for()
    assert answers(page) == ["L1", "R1", "L2", "R3"]
    page.get_by_label("Model").select_option("left")
    page.expected += ["500"]
    send(page, "fails")
    send(page, "alone")
    assert answers(page)[4:] == ["", "L3"]
    page.get_by_label("Model").select_option("right")
    send(page, "you")
    assert "Assistant:L3\n" in prompts(right)[3]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    download.value.save_as(tmp_path / "said.jsonl")
    found, dropped = read_conversations(tmp_path / "said.jsonl")
    assert dropped.counts == {}
    said = [[message.content for message in one.messages] for one in found]
    assert said == [
        ["hi", "L1", "and?", "L2", "alone", "L3"],
        ["hi", "R1", "and?", "R3", "alone", "L3", "you", "R4"],  # as it was asked: after the other's answer
    ]
    page.locator("#new").click()
    page.get_by_label("Model").select_option("left")
    send(page, "nothing", waits=False)
    page.get_by_role("button", name="Delete").wait_for()
    assert page.get_by_role("button", name="Export as JSON").count() == 0


def test_a_busy_server_is_asked_again_and_a_failing_one_told(visit, speaker, send) -> None:
    page = visit(speaker([Busy(1)], ["at last"], ["half", AnswerFailed()], ["good"]))
    page.expected += ["429"]
    send(page, "hi", waits=False)
    page.get_by_text("The server is busy. Trying again in 1 s.").wait_for()
    page.get_by_text("at last", exact=True).wait_for()
    send(page, "and?")
    assert page.locator(".problem").inner_text() == "The model failed while answering."
    assert answers(page)[1] == "half"
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("good", exact=True).wait_for()
    assert page.locator(".problem").count() == 0


def test_a_talk_beyond_the_context_is_told_and_can_go_on_without_its_oldest(
    visit, speaker, prompts, send, tokenizer
) -> None:
    """S9: both numbers; turns go only when the reader says so."""
    question = "one two three"
    context = len(render(ask(question), tokenizer, CARD, for_reply=True).ids) + 2
    model = speaker(["a"], ["b"], context_tokens=context)
    page = visit(model)
    page.expected += ["400"]
    send(page, "hi")
    send(page, question)
    told = page.locator(".problem").inner_text()
    assert re.search(rf"Too long: \d+ tokens are needed, this model can hold {context}.", told)
    page.get_by_role("button", name="Leave the oldest out").click()
    page.get_by_text("b", exact=True).wait_for()
    assert page.locator(".left-out .question .said").all_inner_texts() == ["hi"]
    assert page.get_by_text("no longer fit and are not sent").is_visible()
    assert "Human:" not in prompts(model)[1]
    send(page, "one two three four " * 9)
    assert page.locator(".problem").count() == 1
    page.get_by_role("button", name="Leave the oldest out").click()
    page.locator("#send:visible").wait_for()
    assert page.locator(".turn.left-out").count() == 1  # nothing helped: nothing more is left out
    send(page, "x" * 9000)  # so long that it is refused before it is counted
    assert re.search(
        rf"Too long: at least \d+ tokens .* can hold {context}.", page.locator(".problem").last.inner_text()
    )


def test_of_two_models_only_the_one_that_is_too_short_leaves_turns_out(
    visit, speaker, prompts, send, tokenizer
) -> None:
    """S9: each with its own history; the other's answer stays as it was, and so does what it is sent from then on."""
    question = "one two three"
    context = len(render(ask(question), tokenizer, CARD, for_reply=True).ids) + 2
    short, long = speaker(["s1"], ["s2"], name="short", context_tokens=context), speaker(["l1"], ["l2"], name="long")
    page = visit(short, long)
    page.expected += ["400"]
    send(page, "hi")
    send(page, question)
    assert page.locator(".problem").count() == 1
    page.get_by_role("button", name="Leave the oldest out").click()
    page.get_by_text("s2", exact=True).wait_for()
    assert answers(page) == ["s1", "l1", "s2", "l2"]
    assert page.get_by_text("no longer fit short and are not sent to it").is_visible()
    assert (page.locator(".turn.left-out").count(), page.locator(".answer.left-out").all_inner_texts()[0][:5]) == (
        0,
        "short",
    )
    page.reload()
    send(page, "4")
    assert "Human:" not in prompts(short)[-1]
    assert "Human:hi\nAssistant:l1\nHuman:one two three\nAssistant:l2\nHuman:4" in prompts(long)[-1]
    assert len(prompts(long)) == 3


def test_a_lost_server_and_a_wrong_key_are_told(visit, speaker, serve_models, send) -> None:
    key = "a-key-of-sixteen-letters"
    page = visit(speaker(), app={"key": key}, http_credentials={"username": "any", "password": key})
    send(page, "hi")
    assert answers(page) == ["ok"]
    page.expected += ["401", "Failed to load", "ERR_"]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("API key").fill("another")
    page.keyboard.press("Escape")
    page.get_by_text("The server asks for a key.").wait_for()
    assert page.evaluate("JSON.stringify(localStorage).includes('another')") is False
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Escape")
    page.get_by_text("The server asks for a key.").wait_for(state="hidden")
    page.context.set_offline(True)
    send(page, "and?")
    assert "No connection to the server." in page.locator(".problem").inner_text()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    page.get_by_text("ok", exact=True).nth(1).wait_for()
    assert page.locator(".problem").count() == 0
