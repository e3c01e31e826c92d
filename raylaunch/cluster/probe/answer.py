"""What the probe's script printed, in its sections. Everything else that came over the same stream is noise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    """What one part of the script printed, and its exit status: 124 when it did not end in time, None when cut off."""

    text: str = ""
    status: int | None = None
    rows: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    """Its lines, cut at tabs."""

    def all(self, name: str) -> list[tuple[str, ...]]:
        """Return what stands behind `name` in each line that begins with it."""
        return [row[1:] for row in self.rows if row[0] == name]

    def first(self, name: str, *, width: int = 1) -> tuple[str, ...]:
        """Return what stands behind `name` in the first such line: `width` texts, empty where there are none."""
        found = next(iter(self.all(name)), ())
        return (*found, *([""] * width))[: max(width, len(found))]

    def one(self, name: str) -> str:
        """Return the text behind `name`."""
        return self.first(name)[0].strip()


@dataclass(frozen=True)
class Answer:
    """All sections by name. `complete` when the script came to its end."""

    sections: Mapping[str, Section]
    complete: bool

    def __getitem__(self, name: str) -> Section:
        return self.sections.get(name, Section())

    @property
    def unanswered(self) -> tuple[str, ...]:
        """Sections that failed with no words, were ended by their limit, or cut off."""
        return tuple(
            name for name, one in self.sections.items() if one.status in {None, 124} or (one.status and not one.rows)
        )


def read_answer(output: bytes, mark: str) -> Answer:
    """Cut `output` into sections at the lines that bear `mark`."""
    text = output.decode("utf-8", errors="replace").replace("\r\n", "\n")
    marked = re.compile(rf"^@@{re.escape(mark)} (begin|end|complete) ?(\w*) ?(\d*)$", re.MULTILINE)
    sections: dict[str, Section] = {}
    complete = False
    begun: tuple[str, int] | None = None
    for found in marked.finditer(text):
        what, name, status = found.groups()
        if what == "begin":
            begun = (name, found.end() + 1)
            sections[name] = Section()
        elif what == "end" and begun and begun[0] == name:
            sections[name] = _section(text[begun[1] : found.start()], int(status or 0))
            begun = None
        elif what == "complete":
            complete = True
    return Answer(sections, complete)


def _section(text: str, status: int) -> Section:
    rows = tuple(tuple(line.split("\t")) for line in text.splitlines() if line.strip())
    return Section(text.strip("\n"), status, rows)
