"""Which files stay at home: the rules of ``.gitignore``, ``.raylaunchignore``, and those that are built in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from pathspec import GitIgnoreSpec

NEVER = (".git", ".raylaunch")
BUILT_IN = (
    "__pycache__/",
    "*.pyc",
    ".venv/",
    "node_modules/",
    "wandb/",
    ".mypy_cache/",
    ".pytest_cache/",
    ".ruff_cache/",
    ".ipynb_checkpoints/",
    ".tox/",
    ".nox/",
    ".DS_Store",
    ".netrc",
)
FILES = (".gitignore", ".raylaunchignore")
"""Read in this order; the later has the last word in a folder."""


class _RuleFile(NamedTuple):
    """One ignore file: its name for messages, the folder that it rules (relative to the root), and its lines."""

    shown: str
    base: str
    lines: tuple[str, ...]
    spec: GitIgnoreSpec

    def verdict(self, path: str) -> tuple[bool, str] | None:
        """Return whether `path` (relative to the working directory) is left out and by which rule; None when silent."""
        inside = path[len(self.base) :] if path.startswith(self.base) else ""
        found = self.spec.check_file(inside) if inside else None
        if found is None or found.include is None:
            return None
        line = self.lines[found.index] if found.index is not None else ""
        return found.include, f"{self.shown}: {line}"


def _rule_file(shown: str, base: str, lines: list[str]) -> _RuleFile:
    return _RuleFile(shown, base, tuple(line.strip() for line in lines), GitIgnoreSpec.from_lines(lines))


class IgnoreRules:
    """The rule files that apply in one folder, the strongest last."""

    def __init__(self, files: tuple[_RuleFile, ...]) -> None:
        self._files = files

    @classmethod
    def above(cls, root: Path) -> IgnoreRules:
        """Return what applies before the root's own files: the built-in rules, and git's from above the root.

        Rules from above that would leave out the working directory itself are not applied: who packs it wants it.
        """
        files = [_rule_file("built in", "", list(BUILT_IN))]
        for parent in _repository_parents(root):
            lines = _read_lines(parent / FILES[0])
            prefix = root.relative_to(parent).as_posix()
            spec = GitIgnoreSpec.from_lines(lines)
            if not lines or spec.match_file(f"{prefix}/"):
                continue
            shown = Path(os.path.relpath(parent / FILES[0], root)).as_posix()
            files.append(_AboveFile(shown, prefix, tuple(line.strip() for line in lines), spec))
        return cls(tuple(files))

    def entering(self, root: Path, folder: str) -> IgnoreRules:
        """Return the rules inside `folder`, a path relative to the root (empty for the root)."""
        base = f"{folder}/" if folder else ""
        found = [
            _rule_file(f"{base}{name}", base, lines) for name in FILES if (lines := _read_lines(root / folder / name))
        ]
        return IgnoreRules((*self._files, *found)) if found else self

    def rule_against(self, path: str, entry: os.DirEntry[str], *, is_dir: bool) -> str:
        """Return the rule that leaves `path` out, as written, or nothing when it is to be packed."""
        if entry.name in NEVER:
            return f"built in: {entry.name}{'/' if is_dir else ''}"
        asked = f"{path}/" if is_dir else path
        for file in reversed(self._files):
            verdict = file.verdict(asked)
            if verdict is not None:
                return verdict[1] if verdict[0] else ""
        if is_dir and os.path.lexists(os.path.join(entry.path, "pyvenv.cfg")):  # noqa: PTH118 -- once for every folder
            return f"built in: {entry.name}/ (a virtual environment)"
        return ""


class _AboveFile(_RuleFile):
    """An ignore file above the working directory: its paths begin with the working directory's own."""

    __slots__ = ()

    def verdict(self, path: str) -> tuple[bool, str] | None:
        found = self.spec.check_file(f"{self.base}/{path}")
        if found.include is None:
            return None
        line = self.lines[found.index] if found.index is not None else ""
        return found.include, f"{self.shown}: {line}"


def _repository_parents(root: Path) -> list[Path]:
    """Return the folders above `root` up to the git repository that holds it, outermost first."""
    if (root / ".git").exists():
        return []
    above = []
    for parent in root.parents:
        above.append(parent)
        if (parent / ".git").exists():
            return above[::-1]
    return []


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
        return []
