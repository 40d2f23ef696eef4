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


AS_ENTITIES = {ord(sign): f"&#{ord(sign)};" for sign in "|$*<[]"}
"""Signs that Markdown would read as a table's, a formula's, a link's or HTML's."""


def escaped(text: str) -> str:
    """A text on one line, with no sign that would be read as Markdown outside of its code."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))  # "a `b` c" → ["a ", "`b`", " c"]
    return "".join(p if p.startswith("`") else p.translate(AS_ENTITIES) for p in parts)
