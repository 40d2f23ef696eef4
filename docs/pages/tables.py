"""Markdown tables of texts."""

import re
from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join("| " + " | ".join(map(escaped, line)) + " |\n" for line in lines)


def code(text: str) -> str:
    """A text as code; "" stays empty."""
    return f"`{text}`" if text else ""


def escaped(text: str) -> str:
    """A text on one line, with no | $ * or < that would be read as Markdown outside of its code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))  # "a `b` c" → ["a ", "`b`", " c"]
    return "".join(p if p.startswith("`") else re.sub(r"([|$*<\[\]])", r"\\\1", p) for p in parts)
