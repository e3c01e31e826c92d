"""A shell command as its words, each with its place in the text. Pure; nothing is expanded or run.

Enough of POSIX's grammar to find the programs of a command line and to put words before them: quotes, operators,
redirections, comments. What stands inside ``$(…)`` or backticks is part of a word.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple, overload

_TOKEN = re.compile(
    r"""
    (?P<space>(?:[ \t]|\\\n)+)
  | (?P<comment>\#[^\n]*)
  | (?P<redirect>&>>?|\d*(?:<<<|<>|>>|>\||>&|<&|<(?!<)|>))
  | (?P<operator>\|\||&&|;;|\|&|<<|[;&|()\n])
  | (?P<word>(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|\$\((?:[^()]|\([^()]*\))*\)|`[^`]*`|[^\s'"\\|&;()<>`])+)
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_PIECE = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)|([^'"\\]+)""", re.DOTALL)
_IN_DOUBLE_QUOTES = re.compile(r'\\([$`"\\])|\\\n')


class Word(NamedTuple):
    """One word without its quotes; it stands at ``[start:end]`` of the text, or of the list."""

    text: str
    start: int
    end: int


class Line(NamedTuple):
    """A command line: its simple commands, and the operators that stand between them (``?`` for what is unclear)."""

    commands: list[list[Word]]
    operators: list[str]


def read(entrypoint: str | Sequence[str]) -> Line:
    """Return the simple commands of a shell command (text), or of a program with its arguments (a list)."""
    if not isinstance(entrypoint, str):
        return Line([[Word(word, at, at + 1) for at, word in enumerate(entrypoint)]], [])
    commands: list[list[Word]] = [[]]
    operators: list[str] = []
    to_file = False
    for match in _TOKEN.finditer(entrypoint):
        kind = match.lastgroup
        if kind == "word":
            if not to_file:
                commands[-1].append(Word(_unquoted(match.group()), match.start(), match.end()))
            to_file = False
        elif kind == "redirect":
            to_file = True
        elif kind in ("operator", "other"):
            operators.append(match.group() if kind == "operator" else "?")
            commands.append([])
            to_file = False
    return Line([command for command in commands if command], operators)


def _unquoted(raw: str) -> str:
    return "".join(
        single or _IN_DOUBLE_QUOTES.sub(r"\1", double) or escaped or bare
        for single, double, escaped, bare in _PIECE.findall(raw)
    )


@overload
def spliced(entrypoint: str, start: int, end: int, words: Sequence[str]) -> str: ...
@overload
def spliced(entrypoint: list[str], start: int, end: int, words: Sequence[str]) -> list[str]: ...
def spliced(entrypoint: str | list[str], start: int, end: int, words: Sequence[str]) -> str | list[str]:
    """Return the command with `words` in place of what stands at ``[start:end]``; all else stays as it was written."""
    if not isinstance(entrypoint, str):
        return [*entrypoint[:start], *words, *entrypoint[end:]]
    before, after = entrypoint[:start], entrypoint[end:]
    text = " ".join(shlex.quote(word) for word in words)
    left = " " if before and not before[-1].isspace() else ""
    right = " " if after and not after[0].isspace() else ""
    return f"{before}{left}{text}{right}{after}"
