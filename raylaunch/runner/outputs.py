"""What a program leaves in its working directory: which of it is kept as outputs, and what of it stays on the node.

Kept by default (`AUTO`) is what is new or changed since the training started, small files first, up to a limit. Left
out are caches, W&B's own files, and what has a place of its own (`$RAYLAUNCH_CHECKPOINT_DIR`). What looks like a secret
is only named. What is over the limit stays on the node for some days, in the job's folder, where ``raylaunch get``
finds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from raylaunch.runner.contract import AUTO, CHECKPOINTS, COLLECTED, LEFT, NONE, OUTPUTS
from raylaunch.runner.secret_files import HEAD, holds_private_key, looks_secret

_CACHES = frozenset(
    {
        *("__pycache__", ".cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints", ".triton"),
        *(".git", ".raylaunch", ".venv", ".tox", ".nox", "node_modules"),
    }
)
_MARKS = ("CACHEDIR.TAG", "pyvenv.cfg")
"""A folder with one of these is a cache (https://bford.info/cachedir), or a virtual environment."""
_NEVER = re.compile(r".*\.py[co]|\.DS_Store|core\.\d+")
_OF_WANDB = re.compile(r"(?:offline-)?run-\d|latest-run$|debug(?:-internal)?\.log$")
_NAMED = 5

if TYPE_CHECKING:
    Snapshot = Mapping[str, tuple[int, int]]
    """Size and time of change of each file of a working directory."""


class Limits(NamedTuple):
    """How much is kept without being named: bytes, and files."""

    size: int
    files: int


class Kept(NamedTuple):
    """How it went, in words; and the sizes of the files that stay on the node, by path."""

    warnings: list[str]
    left: dict[str, int]


class _File(NamedTuple):
    path: str
    size: int
    changed_ns: int
    link: bool


def snapshot(code: Path) -> Snapshot:
    """Return what is in a working directory before its program starts."""
    return {file.path: (file.size, file.changed_ns) for file in _walk(code)}


def collect(code: Path, kept: Path, patterns: Sequence[str], limits: Limits, before: Snapshot) -> Kept:
    """Keep the outputs of a program that has ended, under their relative paths.

    Args:
        code: the working directory.
        kept: the folder that has the job's outputs and checkpoints.
        patterns: `AUTO`, `NONE`, or globs, whose files are kept whatever their size.
        limits: of what is kept by `AUTO`.
        before: the working directory as it was.
    """
    place = _Place(code, kept)
    warnings = [warning for pattern in patterns if pattern not in (AUTO, NONE) for warning in place.keep_all(pattern)]
    left: dict[str, int] = {}
    if AUTO in patterns:
        new = [file for file in _walk(code) if before.get(file.path) != (file.size, file.changed_ns)]
        left, more = place.keep_new(new, limits)
        warnings += more
    place.finish()
    return Kept(warnings, left)


class _Place:
    """Where outputs are kept. What an attempt before has collected is replaced, what its program wrote there never."""

    def __init__(self, code: Path, kept: Path) -> None:
        self._code = code
        self._kept = kept
        self._collected = kept / COLLECTED
        try:
            self._before = set(json.loads(self._collected.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            self._before = set()
        self._now: set[str] = set()
        self._has = {
            (found.st_dev, found.st_ino)
            for name in (CHECKPOINTS, OUTPUTS)
            for found in map(os.stat, _files_below(kept / name))
        }

    def keep_all(self, pattern: str) -> list[str]:
        """Keep what matches a glob; returns warnings."""
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            return [f"outputs: {pattern!r} leads out of the working directory and was not kept"]
        files = list(_matching(self._code, pattern))
        if not files:
            return [f"outputs: nothing matches {pattern!r} in the working directory"]
        return [warning for path in files for warning in self._keep(path.relative_to(self._code).as_posix())]

    def keep_new(self, new: Sequence[_File], limits: Limits) -> tuple[dict[str, int], list[str]]:
        """Keep new files up to the limits; returns those that stay on the node, and warnings."""
        left: dict[str, int] = {}
        secret: list[_File] = []
        warnings: list[str] = []
        room, count = limits.size, limits.files
        for file in sorted((file for file in new if not file.link), key=lambda file: (file.size, file.path)):
            if self._is_kept_anyway(file):
                continue
            if self._looks_secret(file):
                secret.append(file)
            elif count and file.size <= room:
                room, count = room - file.size, count - 1
                warnings += self._keep(file.path)
            else:
                left[file.path] = file.size
        for file in new:
            if file.link:
                self._keep_link(file.path)
        self._leave(left)
        if left:
            warnings.append(_words_of_left(left, limits))
        if secret:
            named = _named([(file.path, file.size) for file in secret])
            warnings.append(f"outputs: not kept, for they look like secrets: {named}")
        return left, warnings

    def finish(self) -> None:
        """Write down what was collected, for an attempt that may follow."""
        if self._now or self._before:
            self._collected.write_text(json.dumps(sorted(self._now | self._before)), encoding="utf-8")

    def _is_kept_anyway(self, file: _File) -> bool:
        found = os.lstat(self._code / file.path)
        return file.path in self._now or (found.st_dev, found.st_ino) in self._has

    def _looks_secret(self, file: _File) -> bool:
        if looks_secret(file.path):
            return True
        try:
            with (self._code / file.path).open("rb") as opened:
                return holds_private_key(opened.read(HEAD))
        except OSError:
            return False

    def _keep(self, path: str) -> list[str]:
        target = self._kept / OUTPUTS / path
        try:
            if os.path.lexists(target):
                if path not in self._before:
                    return []
                target.unlink()
            _link(self._code / path, target)
        except OSError as error:
            return [f"outputs: {path} could not be kept: {error.strerror or error}"]
        self._now.add(path)
        return []

    def _keep_link(self, path: str) -> None:
        """Keep a link to something that is kept."""
        source, target = self._code / path, self._kept / OUTPUTS / path
        leads = os.path.relpath(os.path.realpath(source), os.path.realpath(source.parent))
        with contextlib.suppress(OSError):  # it is there, or its folder is a file
            if (target.parent / leads).exists() and not os.path.lexists(target):
                target.symlink_to(leads)

    def _leave(self, left: Mapping[str, int]) -> None:
        """Let files stay on the node when the working directory goes."""
        shutil.rmtree(str(self._kept / LEFT), ignore_errors=True)
        for path in left:
            with contextlib.suppress(OSError):  # then it goes, as it was said
                _link(self._code / path, self._kept / LEFT / path)


def _words_of_left(left: Mapping[str, int], limits: Limits) -> str:
    count = "1 new file" if len(left) == 1 else f"{len(left)} new files"
    limit = f"{_size(limits.size)} or {limits.files} files (outputs_size, outputs_files)"
    return (
        f"outputs: {count} of the working directory ({_size(sum(left.values()))}) not kept, for more than {limit}: "
        f"{_named(list(left.items()))}; for 7 days raylaunch get fetches them by name from the node"
    )


def _named(files: Sequence[tuple[str, int]]) -> str:
    largest = sorted(files, key=lambda file: -file[1])
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    return ", ".join(f"{path} ({_size(size)})" for path, size in largest[:_NAMED]) + more


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:  # noqa: PLR2004 -- of the binary units
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _walk(code: Path) -> Iterator[_File]:
    for parent, folders, names in os.walk(str(code)):
        links = [name for name in folders if os.path.islink(f"{parent}/{name}")]  # noqa: PTH114 -- many files
        folders[:] = sorted(name for name in folders if name not in links and not _passed_over(parent, name))
        for name in sorted([*names, *links]):
            if _NEVER.fullmatch(name):
                continue
            try:
                found = os.lstat(f"{parent}/{name}")
            except OSError:
                continue
            link = os.path.islink(f"{parent}/{name}")  # noqa: PTH114 -- as above
            if link or os.path.isfile(f"{parent}/{name}"):  # noqa: PTH113 -- as above
                path = os.path.relpath(f"{parent}/{name}", str(code))
                yield _File(path, found.st_size, found.st_mtime_ns, link)


def _passed_over(parent: str, name: str) -> bool:
    folder = f"{parent}/{name}"
    if name in _CACHES or name.endswith(".egg-info") or any(os.path.lexists(f"{folder}/{mark}") for mark in _MARKS):
        return True
    return name == "wandb" and any(_OF_WANDB.match(entry) for entry in _entries(folder))


def _entries(folder: str) -> Sequence[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 -- names are enough
    except OSError:
        return []


def _files_below(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(str(folder)):
        for name in names:
            if os.path.isfile(f"{parent}/{name}"):  # noqa: PTH113 -- many files
                yield f"{parent}/{name}"


def _matching(code: Path, pattern: str) -> Iterator[Path]:
    inside = code.resolve()
    for path in sorted(code.glob(pattern)):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and inside in file.resolve().parents:
                yield file


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(str(source.resolve()), str(target))
    except OSError:  # another file system, or one without hard links
        shutil.copy2(str(source), str(target))
