"""Markdown, piece by piece: each function returns lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

WRITTEN = "<!-- Written by `make docs-reference` from {source}. Edit there. -->"


def page(title: str, source: str, lines: Iterable[str]) -> str:
    """Return a whole page that names what it was written from."""
    text = "\n".join([WRITTEN.format(source=source), "", f"# {title}", "", *lines])
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def heading(level: int, text: str) -> list[str]:
    """Return a heading."""
    return ["", f"{'#' * level} {text}", ""]


def fence(language: str, text: str) -> list[str]:
    """Return a block of code."""
    return ["", f"```{language}", *text.strip("\n").splitlines(), "```", ""]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table, and nothing when it has no rows."""
    body = [f"| {' | '.join(_cell(text) for text in row)} |" for row in rows]
    return ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body, ""] if body else []


def code(text: str) -> str:
    """Return text as inline code."""
    return f"``{text}``" if "`" in text else f"`{text}`"


def sentence(text: str) -> str:
    """Return text with a capital, which the product's name does not take, and a full stop."""
    text = " ".join(text.split())
    if not text.startswith("raylaunch"):
        text = text[:1].upper() + text[1:]
    return text + ("" if not text or text.endswith((".", ":", "?")) else ".")


def anchor(title: str) -> str:
    """Return what a link to a heading ends with, as code hosts make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
