"""The page in a real browser: languages, colours, phone width, keyboard and what a screen reader is told."""

import json
import re
from typing import Any

from graftlm.talk.serving.backend import AnswerFailed
from graftlm.talk.serving.page import WEB, read_page

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
LONG = "word " * 60 + "\n" + "x" * 300 + "\n\n```python\n" + "y = 1  # " + "z" * 200 + "\n    kept   spaces\n```\nend"


def words() -> dict[str, dict[str, str]]:
    html = (WEB / "index.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="words">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_both_languages_have_every_word_and_no_other() -> None:
    told = words()
    assert told["en"].keys() == told["zh"].keys()
    source = read_page().content.decode()
    for key in told["en"]:
        stem = re.sub(r"(?<=^problem_).*|(?<=^theme_).*|(?<=^example_).*|(_hint)$", "", key)
        assert re.search(rf"""["`]{stem}""", source.replace(f'"{key}": "', "")), f"{key} is used nowhere"
        places = [sorted(set(re.findall(r"\{\d\}", told[language][key]))) for language in told]
        assert places[0] == places[1], key


def test_the_browser_s_language_is_spoken_and_can_be_switched(visit, speaker) -> None:
    page = visit(speaker(), locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.locator("#new").inner_text() == "新对话"
    assert page.locator("#examples button").all_inner_texts() == [words()["zh"][f"example_{n}"] for n in (1, 2, 3)]
    assert page.get_by_role("textbox", name="消息").is_visible()
    page.get_by_role("button", name="Switch to English").click()
    page.reload()
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("#new").inner_text() == "New conversation"


def luminance(page: Any, selector: str, name: str) -> float:
    """Relative luminance of an element's colour, its own or the nearest background behind it. Source: WCAG 2.2."""
    rgb = page.locator(selector).first.evaluate(
        """(element, name) => {
          let found = getComputedStyle(element)[name];
          while (name === "backgroundColor" && found === "rgba(0, 0, 0, 0)") {
            element = element.parentElement;
            found = getComputedStyle(element)[name];
          }
          return found.match(/[0-9.]+/g).slice(0, 3).map(Number);
        }""",
        name,
    )
    parts = [value / 255 for value in rgb]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_day_and_night_follow_the_system_and_can_be_switched(visit, speaker, send) -> None:
    """Text stands out by 4.5 : 1 or more in both."""
    page = visit(speaker(["```\nx\n```\nok", AnswerFailed()]), color_scheme="dark")
    send(page, "hi")
    shown = (
        ".question .said",
        ".said",
        ".answer pre",
        "figcaption",
        "#hint",
        ".quiet",
        "#send",
        ".problem",
        ".side-foot p",
    )
    for scheme in ("dark", "light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert (luminance(page, "body", "backgroundColor") < 0.1) is (scheme == "dark")
        for selector in shown:
            pair = sorted(luminance(page, selector, name) for name in ("color", "backgroundColor"))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (selector, scheme)
    page.get_by_role("button", name="Colours: as the system").click()
    assert luminance(page, "body", "backgroundColor") > 0.9
    page.reload()
    assert luminance(page, "body", "backgroundColor") > 0.9
    page.get_by_role("button", name="Colours: light").click()
    page.emulate_media(color_scheme="light")
    assert luminance(page, "body", "backgroundColor") < 0.1


def test_a_phone_never_scrolls_sideways(visit, speaker, send, tmp_path) -> None:
    page = visit(speaker([LONG], name="a-model-with-a-rather-long-name" * 2), speaker([LONG], name="b"), **PHONE)

    def fits() -> bool:
        return page.evaluate(
            "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth,"
            " document.getElementById('scroll').scrollWidth) <= innerWidth && innerWidth === 390"
        )

    assert fits()
    page.locator("#text").fill("go")
    page.locator("#send").click()
    page.locator("#send:visible").wait_for()
    assert fits()
    assert page.locator("pre").first.evaluate("(element) => element.scrollWidth > element.clientWidth")
    boxes = [page.locator(".answer").nth(place).bounding_box() for place in (0, 1)]
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
    picture = page.screenshot(path=tmp_path / "phone.png")
    assert len(picture) > 10_000
    page.get_by_role("button", name="Show conversations").click()
    page.locator("#talks .open").wait_for()
    assert page.locator("#side-close").evaluate("(element) => element === document.activeElement")
    page.keyboard.press("Escape")
    assert page.locator("#menu").evaluate("(element) => element === document.activeElement")
    page.get_by_role("button", name="Settings").click()
    assert fits()
    assert page.locator("#settings").bounding_box()["width"] <= 390


def test_whitespace_is_kept_and_fences_are_code(visit, speaker, send) -> None:
    page = visit(speaker(["a   b\n  c\n\n```", "py", "\nx = 1\n\n  y\n```\n\nafter `t`\n~~~\nopen"]))
    send(page, "hi")
    assert page.locator(".body > .said").all_inner_texts() == ["a   b\n  c", "after `t`"]
    assert page.locator(".body code").all_inner_texts() == ["x = 1\n\n  y", "open"]
    assert page.locator("figcaption").first.inner_text().startswith("py")
    assert "mono" in page.locator(".body pre").first.evaluate("(element) => getComputedStyle(element).fontFamily")


def test_everything_is_reached_and_named_without_a_mouse(visit, speaker, send) -> None:
    """Every control has a name and a visible focus; an input method's Enter sends nothing."""
    page = visit(speaker(), speaker(name="other"))
    page.locator("#send:enabled").wait_for()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select")].filter((element) => {
          const labels = [...(element.labels ?? [])].map((label) => label.textContent).join("");
          return !(element.getAttribute("aria-label") || labels || element.textContent).trim();
        }).map((element) => element.id)"""
    )
    assert nameless == []
    reached = []
    while page.evaluate("document.activeElement !== document.body") or not reached:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if reached[-1] == "BODY":
            break
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none" or reached[-1] == "text"
    assert {"new", "model", "language", "theme", "settings-open", "text", "send"} <= set(reached)
    page.locator("#text").fill("nihao")
    page.evaluate(
        "document.getElementById('text').dispatchEvent(new KeyboardEvent('keydown',"
        " {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert page.locator(".turn").count() == 0
    page.locator("#text").press("Shift+Enter")
    assert page.locator("#text").input_value() == "nihao\n"
    send(page, "hi")
    assert page.locator("#announce").get_attribute("aria-live") == "polite"
    assert "Answer of bot: ok" in page.locator("#announce").inner_text()
    assert page.locator("#text").evaluate("(element) => element === document.activeElement")
