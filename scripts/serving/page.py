"""The chat page: one HTML file with its style and script inside, which loads nothing and may run nothing else."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent


def page() -> tuple[str, str]:
    """The HTML, and the Content-Security-Policy that lets it run its own script and style and nothing else."""
    html, style, script = ((FOLDER / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    policy = (
        "default-src 'none'", f"script-src {_hash(script)}", f"style-src {_hash(style)}", "connect-src 'self'", "img-src data:",
        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    )  # fmt: skip
    return html.replace("{{style}}", style).replace("{{script}}", script), "; ".join(policy)


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
