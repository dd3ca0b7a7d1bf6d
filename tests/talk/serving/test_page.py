"""The page's files: which are served, and the policy they are shown under."""

import base64
import hashlib
from pathlib import Path

from graftlm.talk.serving.page import page_files, page_headers


def test_inline_blocks_run_by_their_hash_and_nothing_else_does(tmp_path: Path) -> None:
    """S8: no 'unsafe-inline', no foreign host; other files of the folder are not served."""
    script, style = "let a = 1 < 2;\n", "body { margin: 0 }"
    html = (
        f"<!doctype html><style>{style}</style><SCRIPT type='module'>{script}</SCRIPT><script src='/app.js'></script>"
    )
    (tmp_path / "index.html").write_text(html)
    (tmp_path / "app.js").write_text("1")
    (tmp_path / "notes.txt").write_text("x")
    files = page_files(tmp_path)
    assert files.keys() == {"/", "/app.js"}
    policy = page_headers(files)["Content-Security-Policy"]
    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    hashed = {text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)}
    assert directives["script-src"] == f"'self' 'sha256-{hashed[script]}'"
    assert directives["style-src"] == f"'self' 'sha256-{hashed[style]}'"
    assert directives["default-src"] == "'none'"
    assert directives["connect-src"] == "'self'"
    assert "unsafe" not in policy
    assert "http" not in policy


def test_without_a_page_there_are_no_files(tmp_path: Path) -> None:
    assert page_files(tmp_path) == {}
