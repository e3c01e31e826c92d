"""The documentation as a reader meets it: pages, their headings, their blocks of code, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.cluster import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
_INLINE = re.compile(r"`((?:raylaunch|make|ray) [^`]+)`")
_INNER = re.compile(r"\$\(([^()]*)\)")
_ENDS = frozenset({"|", "||", "&&", "&", ";", ">", ">>", "<", "(", ")"})
_FILES = frozenset({">", ">>", "<"})


class Block(NamedTuple):
    """One block of code in a page."""

    where: str
    """The page and the line, for messages."""
    language: str
    text: str


class Command(NamedTuple):
    """One command in a page."""

    where: str
    words: tuple[str, ...]
    whole: bool
    """Whether it may be typed as it stands; what stands inside a sentence may leave out values."""

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """Return all pages that people read."""
    patterns = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "examples/**/README.md")
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def name(page: Path) -> str:
    """Return a page's path, as the repository has it."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return the blocks of code in some languages."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(f"{name(page)}:{text.count(chr(10), 0, found.start()) + 1}", found[1], found[2])
        for found in FENCE.finditer(text)
        if found[1] in languages
    ]


def anchors(page: Path) -> set[str]:
    """Return what links to the page's headings end with, as code hosts make it."""
    found: set[str] = set()
    for title in _HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        number = 1
        while anchor in found:
            anchor, number = f"{anchor.removesuffix(f'-{number - 1}')}-{number}", number + 1
        found.add(anchor)
    return found


def commands(page: Path, *programs: str) -> list[Command]:
    """Return every command of some programs in the page's blocks for shells, and inside its sentences.

    Not those of a ``console``, which are run.
    """
    found = []
    for block in blocks(page, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            found += [Command(block.where, words, whole=True) for words in _split(line)]
    prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"))
    for match in _INLINE.finditer(prose):
        where = f"{name(page)}:{prose.count(chr(10), 0, match.start()) + 1}"
        found += [Command(where, words, whole=False) for words in _split(match[1])]
    return [command for command in found if command.words[0] in programs]


def _split(line: str) -> Iterator[tuple[str, ...]]:
    """Yield the words of each simple command of a line; those inside ``$(…)`` first."""
    for inner in _INNER.findall(line):
        yield from _split(inner)
    lexer = shlex.shlex(_INNER.sub("X", line), posix=True, punctuation_chars=True)
    lexer.commenters, lexer.whitespace_split = "#", True
    words: list[str] = []
    skip = False
    for word in lexer:
        if skip:
            skip = False
        elif word in _ENDS:
            skip = word in _FILES
            if not skip and words:
                yield tuple(words)
                words = []
        elif words or not re.fullmatch(r"\w+=.*", word):
            words.append(word)
    if words:
        yield tuple(words)
