"""The ``console`` blocks of a page, run in a shell as a person would type them, and compared with what the page shows.

What differs from run to run is made equal first: the six letters of a job's id, times, sizes, the width of columns. A
``…`` stands for any text within a line, and alone on a line for any lines.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from support.pages import Block, blocks

_MARK = "--- a command of the page has ended ---"
_SAVED = {"python": "train.py", "yaml": "job.yaml"}
_EQUAL = (
    (re.compile(r"\b([a-z]\w*)-[a-z0-9]{6}\b"), r"\1-ID"),
    (re.compile(r"\b[\d.]+ (?:ms|[smhd])(?: \d+ [smh])?\b"), "TIME"),
    (re.compile(r"\b[\d.]+ (?:[KMGT]i?)?B\b"), "SIZE"),
)


class Step(NamedTuple):
    """One command of a page, and what the page says it prints."""

    where: str
    typed: str
    shown: str


def steps(page: Path) -> list[Step]:
    """Return a page's commands in order; a program or a file that it shows is saved before what follows it."""
    found: list[Step] = []
    for block in blocks(page, "console", *_SAVED):
        found += _typed(block) if block.language == "console" else [_saving(block)]
    return found


def run(page: Path, folder: Path, environ: Mapping[str, str], *, limit_s: float = 240) -> list[str]:
    """Run a page's commands in one shell; return what differs from the page."""
    todo = steps(page)
    script = "".join(f"{{ {step.typed}\n}} 2>&1; st=$?; echo {shlex.quote(_MARK)}; (exit $st)\n" for step in todo)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**environ, "PATH": f"{Path(sys.executable).parent}:{environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
        check=False,
    )
    printed = done.stdout.split(f"{_MARK}\n")
    return [
        f"{step.where}: $ {step.typed}\nshown:\n{step.shown}\nprinted:\n{text}"
        for step, text in zip(todo, printed, strict=False)
        if step.shown and not fits(step.shown, text)
    ] + ([] if len(printed) > len(todo) else [f"the shell ended early:\n{done.stdout}"])


def fits(shown: str, printed: str) -> bool:
    """Whether a command printed what the page shows."""
    pattern = ""
    for line in _equal(shown):
        words = ".*".join(re.escape(part) for part in line.split("…"))
        pattern += r"(?:.*\n)*?" if line == "…" else f"{words}\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in _equal(printed))) is not None


def _equal(text: str) -> list[str]:
    for pattern, word in _EQUAL:
        text = pattern.sub(word, text)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def _typed(block: Block) -> list[Step]:
    found = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        typed, _, shown = part.partition("\n")
        found.append(Step(block.where, typed, shown))
    return found


def _saving(block: Block) -> Step:
    file = "cluster.yaml" if "\nhosts:" in block.text else _SAVED[block.language]
    return Step(block.where, f"printf %s {shlex.quote(block.text)} > {file}", "")
