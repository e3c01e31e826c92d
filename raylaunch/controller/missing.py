"""Whether a file or module that a program did not find was left out of its package, and by which rule. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pathspec import GitIgnoreSpec

_MODULE = re.compile(r"No module named '?([\w.]+)'?")
_FILE = re.compile(r"(?:No such file or directory: |can't open file |did not find |the program )'([^'\n]{1,4096})'")
_IN_CODE = re.compile(r"^/.*/attempts/[^/]+/code/")
_TRIED = 20
"""How many names of a log's end are looked at; the last are tried first."""


def rule_against(text: str, rules: Sequence[str]) -> str:
    """Return a sentence that names the rule by which what `text` did not find was left out; empty when there is none.

    Args:
        text: what a program said at its end.
        rules: those that left something out of its package, as in `raylaunch.state.PackReport.ignored_by`.
    """
    for path in _missing(text):
        for rule in rules:
            if _matches(path, rule):
                return f"{path} is not sent: {rule}"
    return ""


def _missing(text: str) -> Iterator[str]:
    found = [(match.start(), tuple(_of_module(match[1]))) for match in _MODULE.finditer(text)]
    found += [(match.start(), (_relative(match[1]),)) for match in _FILE.finditer(text)]
    for _, paths in sorted(found, reverse=True)[:_TRIED]:
        yield from (path for path in paths if not path.startswith(("/", "../")))


def _relative(name: str) -> str:
    return _IN_CODE.sub("", name).removeprefix("./")


def _of_module(name: str) -> Iterator[str]:
    """Yield the files that a module may be: of ``utils.logging`` first ``utils/logging.py``, last ``utils/``."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        path = "/".join(parts[:depth])
        yield from (f"{path}.py", f"{path}/", f"src/{path}.py", f"src/{path}/")


def _matches(path: str, rule: str) -> bool:
    """Whether a rule, which is written as ``FILE: PATTERN``, leaves out `path`."""
    file, _, pattern = rule.partition(": ")
    if file == "built in":
        pattern = pattern.partition(" (")[0]
    folder = file.rpartition("/")[0]
    if folder.startswith(".."):
        return "/" not in pattern.rstrip("/") and GitIgnoreSpec.from_lines([pattern]).match_file(path)
    inside = path.removeprefix(f"{folder}/") if folder else path
    return (not folder or inside != path) and GitIgnoreSpec.from_lines([pattern]).match_file(inside)
