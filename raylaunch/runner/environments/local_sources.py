"""Parts of an environment that are the job's own code: projects and archives in the working directory.

Neither lock files nor requirements describe their content, so shared environments never contain them: each attempt
installs them from its own package.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

COMMENT = re.compile(r"(?:^|\s)#.*$")


def option(*names: str, value: str = r"\S+") -> re.Pattern[str]:
    """Return the pattern of a line of a requirements file with one of these options; its only group is the value."""
    return re.compile(rf"(?:{'|'.join(names)})(?:\s+|\s*=\s*)({value})")


_DEEPEST = 5
_REQUIREMENT = option("-r", "--requirement")
_CONSTRAINT = option("-c", "--constraint")
_FOUND_IN = option("-f", "--find-links")
_EDITABLE = option("-e", "--editable", value=".+")
_NAMED = re.compile(r"[A-Za-z0-9][\w.-]*\s*(?:\[[^\]]*\])?\s*@\s*(?:file:(?://)?)?([^:;\s]+)")
_PLACE = re.compile(r"([^\[;]+?)(\[[^\]]*\])?\s*(;.*)?$")
_ARCHIVES = (".whl", ".tar.gz", ".zip", ".tar.bz2", ".tgz")
_OF_LOCK = re.compile(
    r'^name = "([^"]+)"\n(?:version = "[^"]*"\n)?source = \{ (editable|directory|path|virtual) = ', re.MULTILINE
)
_DYNAMIC = re.compile(r"^\s*dynamic\s*=\s*\[[^\]]*dependencies", re.MULTILINE)
_METADATA = ("pyproject.toml", "setup.py", "setup.cfg")
_NOT_CONTENT = frozenset({"__pycache__", ".git"})


class Requirements(NamedTuple):
    """A list of requirements, read.

    Args:
        lines: all of them, with files included and paths absolute; nothing is editable.
        key: what decides whether an environment made from `lines` can be used again.
        local: lines of the projects in the working directory, editable ones marked as such.
    """

    lines: tuple[str, ...]
    key: str
    local: tuple[str, ...]


def read_requirements(text: str, *, parent: Path, code: Path) -> Requirements:
    """Read a requirements file, or a list of requirements as lines.

    Args:
        text: its lines.
        parent: folder that other files it names are relative to.
        code: the working directory, which paths of projects and archives are relative to.
    """
    lines, keys, local = [], [], []
    for line in _flattened(text, parent):
        editable = _EDITABLE.fullmatch(line)
        local_path = _local_path(editable[1] if editable else line, code, is_path=editable is not None)
        keys.append(line)
        if local_path is None:
            keys.append(_digest_of_option(line, code))
            lines.append(line)
            continue
        path, rest = local_path
        keys.append(_digest(path))
        lines.append(f"{path}{rest}")
        if path.is_dir():
            local.append(f"{'-e ' if editable else ''}{path}{rest}")
    return Requirements(tuple(lines), "\n".join(keys), tuple(local))


def _flattened(text: str, parent: Path, depth: int = 0) -> Iterator[str]:
    for raw in re.sub(r"\\\r?\n", " ", text).splitlines():
        line = COMMENT.sub("", raw).strip()
        found, limits = _REQUIREMENT.fullmatch(line), _CONSTRAINT.fullmatch(line)
        other = parent / found[1] if found else None
        if other is not None and other.is_file() and depth < _DEEPEST:
            yield from _flattened(other.read_text(encoding="utf-8", errors="replace"), other.parent, depth + 1)
        elif limits:
            yield f"-c {parent / limits[1]}"
        elif line:
            yield line


def _local_path(text: str, code: Path, *, is_path: bool) -> tuple[Path, str] | None:
    """Return the folder or file below the working directory that a line names, and what follows it in the line."""
    named = _NAMED.fullmatch(text.partition(";")[0].strip())
    found = _PLACE.fullmatch(named[1] if named else text)
    if found is None or "://" in text.replace("file://", ""):
        return None
    words = re.sub(r"^file://", "", found[1].strip())  # Python 3.8
    looks_like = is_path or named or words.startswith((".", "/", "~")) or "/" in words or words.endswith(_ARCHIVES)
    path = Path(os.path.normpath(code / words))
    if not looks_like or not path.exists() or (path != code and code not in path.parents):
        return None
    return path, (found[2] or "") + (f" {found[3]}" if found[3] else "")


def _digest_of_option(line: str, code: Path) -> str:
    """Return what is in the files that an option names."""
    for pattern in (_CONSTRAINT, _FOUND_IN):
        found = pattern.fullmatch(line)
        if found and "://" not in found[1] and (code / found[1]).exists():
            return _content(code / found[1])
    return ""


def _digest(path: Path) -> str:
    """Return what decides which other packages a project or an archive needs."""
    if not path.is_dir():
        return _content(path)
    texts = {name: (path / name).read_bytes() for name in _METADATA if (path / name).is_file()}
    static = "pyproject.toml" in texts and b"\n[project]" in b"\n" + texts["pyproject.toml"]
    if not static or _DYNAMIC.search(texts["pyproject.toml"].decode("utf-8", "replace")):
        return _content(path)
    return hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()


def _content(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _files(path):
        digest.update(f"{file.relative_to(path)}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _files(path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    found = (file for file in path.rglob("*") if _NOT_CONTENT.isdisjoint(file.parts) and not file.is_symlink())
    return sorted(file for file in found if file.is_file())


def local_packages(lock: str) -> tuple[list[str], bool]:
    """Return the names of packages that a ``uv.lock`` takes from the working directory, and whether any is installed.

    A virtual one has no build system: its code is run from where it is.
    """
    found = _OF_LOCK.findall(lock)
    return [name for name, _ in found], any(kind != "virtual" for _, kind in found)


def local_exports(text: str, code: Path) -> tuple[str, ...]:
    """Return the lines of ``uv export`` that name something in the working directory."""
    lines = [line.strip() for line in text.splitlines()]
    return tuple(line for line in lines if line.startswith(("-e ", ".", str(code))))
