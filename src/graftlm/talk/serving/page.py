"""The page as it is sent: one file, made of the rooms in `talk/web`, and the policy under which a browser shows it.

Owns which files go into it and its headers. Does not know what the page does. Its blocks of script and style run by
their hash and nothing else runs, so a model's words can never become code.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

WEB = Path(__file__).parent.parent / "web"
_INLINE = re.compile(r"<(script|style)(?:\s[^>]*)?>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Page:
    """The page's bytes and the headers it is sent with."""

    content: bytes
    headers: dict[str, str]


def read_page(folder: Path = WEB) -> Page:
    """The page in `folder`: index.html, with the styles, scripts and icon it names put in their places."""

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    icon = base64.b64encode(read("icon.svg").encode()).decode()
    html = read("index.html").replace('href="icon.svg"', f'href="data:image/svg+xml;base64,{icon}"')
    html = re.sub(r'<link rel="stylesheet" href="(\w+\.css)">', lambda named: f"<style>{read(named[1])}</style>", html)
    html = re.sub(r'<script src="(\w+\.js)"></script>', lambda named: f"<script>\n{read(named[1])}</script>", html)
    return Page(html.encode(), _headers(html))


def _headers(html: str) -> dict[str, str]:
    """The strictest policy under which the page works. Source: W3C CSP level 3."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, block in _INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        hashes[kind.lower()].append(f"'sha256-{digest}'")
    policy = [
        "default-src 'none'", f"script-src {' '.join(hashes['script'])}", f"style-src {' '.join(hashes['style'])}",
        "img-src data:", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "require-trusted-types-for 'script'", "trusted-types 'none'",
    ]  # fmt: skip
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
