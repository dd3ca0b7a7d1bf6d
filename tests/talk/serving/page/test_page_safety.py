"""S8 in a real browser: whatever a person, a model, a model's name or the storage says stays text."""

import json
from typing import Any

import httpx

ATTACKS = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'><svg onload=window.ran=1>",
    "<iframe srcdoc='<script>parent.ran = 1</script>'></iframe>",
    "[link](javascript:window.ran=1) <a href=javascript:window.ran=1>x</a>",
    '```"><img src=x onerror=window.ran=1>\n</code></pre><script>window.ran = 1</script>\n```',
    "{{constructor.constructor('window.ran=1')()}} ${window.ran=1}",
]


def assert_nothing_ran(page: Any) -> None:
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    assert (
        page.locator("#turns :is(script, img, iframe, a, object, embed, form, input, style), #turns svg *").count() == 0
    )
    assert page.locator("#talks :is(script, img, iframe, a)").count() == 0


def test_questions_and_answers_stay_text(visit, speaker, send) -> None:
    """S8: in the question, in the answer cut at any place, as a title, and after a reload."""
    scripts = [[attack[place : place + 3] for place in range(0, len(attack), 3)] for attack in ATTACKS]
    page = visit(speaker(*scripts))
    for attack in ATTACKS:
        send(page, attack)
        assert page.locator(".question .said").last.inner_text() == attack
        assert_nothing_ran(page)
    page.reload()
    assert page.locator(".question .said").all_inner_texts() == ATTACKS
    assert page.locator(".body").first.inner_text() == ATTACKS[0]
    assert_nothing_ran(page)
    page.get_by_role("button", name="Rename").click()
    page.get_by_role("textbox", name="New name").fill(ATTACKS[1])
    page.keyboard.press("Enter")
    assert page.locator("#talks .current .open").inner_text() == ATTACKS[1]
    assert_nothing_ran(page)


def test_a_model_s_name_and_a_server_s_words_stay_text(visit, speaker, send) -> None:
    """S8: names stand in the header, in the choice and over answers; a refusal quotes the server."""
    names = ["<img src=x onerror=window.ran=1>", "<script>window.ran=1</script>"]
    page = visit(*(speaker(["fine"], name=name) for name in names))
    send(page, "hi")
    assert page.locator(".answer h3").all_inner_texts() == names
    assert_nothing_ran(page)
    refusal = {"error": {"message": "<img src=x onerror=window.ran=1>", "type": "x", "code": None}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json=refusal))
    page.expected += ["400"]
    send(page, "hi")
    assert page.locator(".problem").first.inner_text().endswith(refusal["error"]["message"])
    assert_nothing_ran(page)


def hostile_store() -> dict[str, str]:
    """What may stand in the storage after another program, an older page or an attacker wrote there."""
    bad = ATTACKS[1]
    answer = {"model": bad, "content": bad, "ending": bad, "answer_tokens": bad, "prompt_tokens": {}, "speed": [bad],
              "problem": {"kind": "__proto__", "details": [bad]}}  # fmt: skip
    whole = {"id": "0123456789abcdef", "title": bad, "created": bad, "from": 1e99, "system": {"x": 1},
             "turns": [{"question": bad, "answers": [answer, None, 3]}, {"question": 7}, None]}  # fmt: skip
    return {
        "graftlm.talk.0123456789abcdef": json.dumps(whole),
        "graftlm.talk.1": json.dumps({**whole, "id": bad}),
        "graftlm.talk.2": "{not json",
        "graftlm.talk.3": "null",
        "graftlm.talk.4": '{"__proto__": {"turns": []}, "id": "constructor"}',
        "graftlm.settings": json.dumps({"language": "__proto__", "theme": bad, "model": bad, "temperature": bad}),
    }


def test_a_hostile_storage_is_read_field_by_field(visit, speaker, send) -> None:
    """S8: what has the right form is shown as text, the rest is passed over, and the page works on."""
    page = visit(speaker(["fine"]))
    put = "(store) => Object.entries(store).forEach(([key, text]) => localStorage.setItem(key, text))"
    page.evaluate(put, hostile_store())
    page.reload()
    page.locator("#talks .open").click()
    assert page.locator(".question .said").inner_text() == ATTACKS[1]
    assert page.locator(".answer").count() == 1
    assert_nothing_ran(page)
    page.locator("#new").click()
    send(page, "hi")
    assert page.locator(".body").inner_text() == "fine"
    for settings in ("[]", "null", '"x"', "{broken", '{"temperature": 1e999, "seed": "7", "top_k": null}'):
        page.evaluate(put, {"graftlm.settings": settings})
        page.reload()
        page.locator("#send:enabled").wait_for()
        assert page.evaluate("settings.temperature") == 0.7


def test_the_policy_holds_against_code_that_got_in(visit, speaker) -> None:
    """S8: even a fault of ours could not run a model's words: no eval, no inline code, no HTML from strings."""
    page = visit(speaker())
    policy = httpx.get(page.root).headers["content-security-policy"]
    assert "unsafe" not in policy
    page.expected += ["Content Security Policy", "TrustedHTML", "TrustedScript", "Trusted"]
    tried = {
        "innerHTML": "document.body.innerHTML = '<b>x</b>'",
        "eval": "eval('window.ran = 1')",
        "string timer": "setTimeout('window.ran = 1')",
        "policy": "trustedTypes.createPolicy('mine', {createHTML: (text) => text})",
    }
    for name, code in tried.items():
        # Later, as code of the page itself: what Playwright evaluates at once may do more.
        tries = f"try {{ {code}; resolve('done') }} catch (error) {{ resolve(error.name) }}"
        assert page.evaluate(f"new Promise((resolve) => setTimeout(() => {{ {tries} }}))") != "done", name
    page.evaluate(
        "() => { const made = document.createElement('div'); made.setAttribute('style', 'color: red');"
        " document.body.append(made); const image = new Image(); image.src = 'http://example.invalid/x.png';"
        " document.body.append(image); }"
    )
    assert page.evaluate("fetch('http://example.invalid/').then(() => 'sent', () => 'held')") == "held"
    assert page.evaluate("document.body.lastElementChild.previousElementSibling.style.color") == ""
    assert page.evaluate("window.ran") is None
    assert sum("Content Security Policy" in text for text in page.said) >= 3
