"""A real Chromium before a real server, whose models say what a test tells them to, when it tells them to."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest

from graftlm.talk.serving.app import Served
from graftlm.talk.serving.prompting import Voice
from graftlm.talk.serving.speech import Ask, Piece
from graftlm.text.dialogue import CARD
from graftlm.text.tokenizer import Tokenizer

Script = list[str | threading.Event | Exception]


class Speaker:
    """A backend: each request takes the next script. Text is a piece, an event is waited for, an exception raised."""

    is_alive = True

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.asked: list[Ask] = []
        self.num_pieces = 0
        self.num_left = 0

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def figures(self) -> dict[str, float]:
        return {}

    async def answer(self, asks: Sequence[Ask]) -> Any:
        self.asked += asks
        script = self.scripts.pop(0) if self.scripts else ["ok"]
        if script and isinstance(script[0], Exception):
            raise script[0]
        return self._say(script)

    async def _say(self, script: Script) -> AsyncIterator[Piece]:
        is_whole, count = False, 0
        try:
            for item in script:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, threading.Event):
                    while not item.is_set():
                        await asyncio.sleep(0.005)
                else:
                    count += 1
                    self.num_pieces += 1
                    yield Piece(0, item, count)
            is_whole = True
            yield Piece(0, "", count, "stop")
        finally:
            self.num_left += not is_whole


@pytest.fixture
def speaker(tokenizer: Tokenizer) -> Callable[..., Served]:
    """A served model that says these scripts: `speaker(script, …, name="bot", context_tokens=4096)`."""

    def make(*scripts: Script, name: str = "bot", context_tokens: int = 4096) -> Served:
        return Served(name, Voice(tokenizer, CARD, context_tokens), Speaker(*scripts))

    return make


@pytest.fixture
def prompts(tokenizer: Tokenizer) -> Callable[[Served], list[str]]:
    """The prompts a served model was asked, as text."""

    def read(model: Served) -> list[str]:
        backend: Any = model.backend
        return [b"".join(map(tokenizer.token_bytes, ask.prompt_ids)).decode() for ask in backend.asked]

    return read


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The system's browser, driven by Playwright; stopped with the module, for its event loop fills the thread."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program)


@pytest.fixture
def visit(chromium: Any, serve_models: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Open the page of these models: `visit(model, …, locale="en-US", **context_options)`. Faults in it fail the test.

    `page.expected` holds words of console errors that belong to the test, `page.said` everything the console got.
    """
    contexts: list[Any] = []
    pages: list[Any] = []

    def begin(*models: Served, app: dict[str, Any] | None = None, url: str = "", **options: Any) -> Any:
        url = url or serve_models(list(models), **(app or {})).url
        context = chromium.new_context(**{"locale": "en-US", "accept_downloads": True, **options})
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.expected, page.said, page.root = [], [], url
        page.on("pageerror", lambda error: page.said.append(f"error {error}"))
        page.on("console", lambda message: page.said.append(f"{message.type} {message.text}"))
        page.on("dialog", lambda dialog: (page.said.append("error a dialog opened"), dialog.dismiss()))
        pages.append(page)
        page.goto(url)
        return page

    yield begin
    for context in contexts:
        context.close()
    faults = [
        text
        for page in pages
        for text in page.said
        if text.startswith("error") and not any(words in text for words in page.expected)
    ]
    assert faults == []


@pytest.fixture
def send() -> Callable[..., None]:
    """Type a message and press Enter; unless told not to, wait until the answer has ended."""

    def type_in(page: Any, text: str, *, waits: bool = True) -> None:
        page.locator("#send:enabled").wait_for()
        page.locator("#text").fill(text)
        page.locator("#text").press("Enter")
        if waits:
            page.locator("#send:visible").wait_for()

    return type_in
