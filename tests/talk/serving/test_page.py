"""The page's one file: what goes into it, and the policy it is shown under."""

import base64
import hashlib
import re
from pathlib import Path

from graftlm.talk.serving.page import WEB, read_page


def directives(policy: str) -> dict[str, str]:
    return dict(part.split(" ", 1) for part in policy.split("; "))


def test_inline_blocks_run_by_their_hash_and_nothing_else_does(tmp_path: Path) -> None:
    """S8: no 'unsafe-inline', no file of any host; other files of the folder do not come along."""
    script, style = "let a = 1 < 2;\n", "body { margin: 0 }"
    (tmp_path / "index.html").write_text(
        '<!doctype html><link rel="icon" href="icon.svg"><link rel="stylesheet" href="app.css">'
        f"<SCRIPT type='module'>{script}</SCRIPT><script src=\"app.js\"></script>"
    )
    for name, text in (("app.css", style), ("app.js", "go()"), ("icon.svg", "<svg/>"), ("notes.txt", "secret")):
        (tmp_path / name).write_text(text)
    page = read_page(tmp_path)
    assert page.content.decode() == (
        f'<!doctype html><link rel="icon" href="data:image/svg+xml;base64,PHN2Zy8+"><style>{style}</style>'
        f"<SCRIPT type='module'>{script}</SCRIPT><script>\ngo()</script>"
    )
    policy = page.headers["Content-Security-Policy"]
    found = directives(policy)
    hashed = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in (script, "\ngo()", style)]
    assert found["script-src"] == f"'sha256-{hashed[0]}' 'sha256-{hashed[1]}'"
    assert found["style-src"] == f"'sha256-{hashed[2]}'"
    assert (found["default-src"], found["connect-src"], found["img-src"]) == ("'none'", "'self'", "data:")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_our_page_is_one_file_that_asks_for_no_other() -> None:
    page = read_page()
    html = page.content.decode()
    assert re.findall(r"<(?:script|img|iframe)[^>]* src=|<link[^>]* href=(?!\"data:)|@import|url\(", html) == []
    rooms = {path.name: path.read_text(encoding="utf-8") for path in WEB.glob("*.*s")}  # scripts and styles
    assert len(rooms) >= 6
    for name, text in rooms.items():
        assert html.count(text) == 1, f"{name} is not in the page"
        assert "</script" not in text, name
    scripts = [name for name in rooms if name.endswith(".js")]
    allowed = directives(page.headers["Content-Security-Policy"])["script-src"].split()
    assert len(allowed) == len(scripts) + 1  # and the block of words
