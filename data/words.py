"""Values and errors as they stand in a sentence to a person: short, and on one line."""

from __future__ import annotations

LONGEST = 60  # characters


def short(value: object) -> str:
    """repr of `value`, cut to LONGEST characters."""
    try:
        return _cut(repr(value))
    except RecursionError:
        return f"a {type(value).__name__} nested very deep"


def short_name(name: object) -> str:
    """A file's name or path as it is; line breaks and the like escaped, and one of over 400 characters without its middle."""
    text = str(name)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 400 else f"{text[:100]}...{text[-100:]}"


def harmless(text: str) -> str:
    """`text` with everything escaped that a terminal would obey; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def listed(names: object) -> str:
    """`'a', 'b', 'c'` of names or columns; at most ten, then how many more. `none` where there is none."""
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(_cut(repr(name), 30) for name in names[:10]) + more or "none"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."
