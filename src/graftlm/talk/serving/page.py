"""The page's files and the policy under which a browser shows them.

Owns which files of `talk/web` are served and their headers. Does not know what the page does. Inline blocks of the
page run by their hash, so the policy needs no 'unsafe-inline' and a model's words can never become code.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

WEB = Path(__file__).parent.parent / "web"
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_INLINE = re.compile(r"<(script|style)(?:\s[^>]*)?>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file as it is sent."""

    content: bytes
    content_type: str


def page_files(folder: Path = WEB) -> dict[str, PageFile]:
    """The files that are there, by route."""
    return {
        route: PageFile((folder / name).read_bytes(), content_type)
        for route, (name, content_type) in _FILES.items()
        if (folder / name).is_file()
    }


def page_headers(files: dict[str, PageFile]) -> dict[str, str]:
    """Headers of every page file: the strictest policy under which the page works. Source: W3C CSP level 3."""
    html = files["/"].content.decode() if "/" in files else ""
    hashes: dict[str, list[str]] = {"script": ["'self'"], "style": ["'self'"]}
    for kind, block in _INLINE.findall(html):
        if block.strip():
            digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
            hashes[kind.lower()].append(f"'sha256-{digest}'")
    policy = [
        "default-src 'none'", f"script-src {' '.join(hashes['script'])}", f"style-src {' '.join(hashes['style'])}",
        "img-src 'self' data:", "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "require-trusted-types-for 'script'", "trusted-types 'none'",
    ]  # fmt: skip
    return {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
