"""Which files of a folder are sent: the rules of ``.gitignore`` and ``.raylaunchignore``, and built-in ones.

Files that git tracks are sent, as in a clone: only ``.raylaunchignore`` leaves them out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pathspec import GitIgnoreSpec

from raylaunch.client.sensitive import FETCHED, Stamp, fetched_in
from raylaunch.errors import StorageError
from raylaunch.files import Directory
from raylaunch.paths import raylaunch_home

NEVER = (".git", ".raylaunch")
_OWN_HOME = "built in: RAYLAUNCH_HOME, with the keys to clusters"
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
"""Read in this order; in a folder, the later file takes precedence."""


class LeftOut(NamedTuple):
    """The rule that leaves a path out, as written; `final` if it applies to tracked files too."""

    rule: str
    final: bool


class TrackedFiles(NamedTuple):
    """The files of a folder that git tracks, and the folders that contain them."""

    files: frozenset[str]
    folders: frozenset[str]

    @classmethod
    def of(cls, files: frozenset[str]) -> TrackedFiles:
        """Add the folders of `files`."""
        folders = set[str]()
        for file in files:
            folder = file.rpartition("/")[0]
            while folder and folder not in folders:
                folders.add(folder)
                folder = folder.rpartition("/")[0]
        return cls(files, frozenset(folders))


class FoundPath(NamedTuple):
    """A path to send, relative to the working directory, its entry, and its folder, which is open for now."""

    path: str
    entry: os.DirEntry[str]
    folder: Directory


def walk(
    root: Directory, tracked: TrackedFiles, *, on_left_out: Callable[[str, LeftOut, int], None]
) -> Iterator[FoundPath]:
    """Yield the paths to send, each folder before its contents, in the order of names.

    Each folder is opened name by name, so that links that were created meanwhile are not followed.

    Args:
        root: the working directory, open.
        tracked: the files in it that git tracks.
        on_left_out: called with each path that is left out, its rule, and its size in bytes (0 for a folder).

    Raises:
        StorageError: a folder cannot be read, or has become a link.
    """
    stack = [_Folder("", IgnoreRules.above(root.path), None, {})]
    home = raylaunch_home().resolve()
    while stack:
        folder = stack.pop()
        rules = folder.rules.entering(root.path, folder.path)
        base = f"{folder.path}/" if folder.path else ""
        fetched = {**folder.fetched, **{base + name: stamp for name, stamp in _fetched(root, folder.path)}}
        deeper = []
        with _opened(root, folder.path) as here:
            for entry in _entries(here, folder.path or "."):
                path = base + entry.name
                is_dir = entry.is_dir(follow_symlinks=False)
                left = rules.rule_against(path, entry, is_dir=is_dir, folder=here) or folder.left
                if is_dir and (root.path / path).resolve() == home:
                    left = LeftOut(_OWN_HOME, final=True)
                if left is None and path in fetched and fetched[path].is_still(entry):
                    left = LeftOut(FETCHED, final=False)
                if left and (left.final or path not in (tracked.folders if is_dir else tracked.files)):
                    on_left_out(path, left, 0 if is_dir else entry.stat(follow_symlinks=False).st_size)
                    continue
                yield FoundPath(path, entry, here)
                if is_dir:
                    deeper.append(_Folder(path, rules, left, fetched))
        stack.extend(reversed(deeper))


def _fetched(root: Directory, folder: str) -> Iterable[tuple[str, Stamp]]:
    return fetched_in(root.path / folder).items()


def _opened(root: Directory, folder: str) -> Directory:
    try:
        return root.below(folder.split("/") if folder else ())
    except OSError as error:
        raise unreadable(folder or ".", error) from None


class _Folder(NamedTuple):
    """A folder to walk; `left` is the rule that leaves out its untracked files."""

    path: str
    rules: IgnoreRules
    left: LeftOut | None
    fetched: Mapping[str, Stamp]


def _entries(folder: Directory, shown: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder.descriptor) as entries:
            return sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise unreadable(shown, error) from None


def unreadable(path: str, error: OSError) -> StorageError:
    """Return the error for a file or folder of the working directory that cannot be read."""
    return StorageError(
        f"{printable(path)} in the working directory cannot be read: {error.strerror}",
        hint=f"make it readable, or leave it out with a line in .raylaunchignore: /{printable(path)}",
    )


def printable(path: str) -> str:
    """Return a file name as text: names that are not UTF-8 cannot be sent as JSON."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class _RuleFile(NamedTuple):
    """One ignore file: its name for messages, its folder (relative to the root), and its lines.

    `above` is the path of the root from the file's folder, if the file is above the root.
    """

    shown: str
    base: str
    lines: tuple[str, ...]
    spec: GitIgnoreSpec
    above: str = ""

    def verdict(self, path: str) -> tuple[bool, LeftOut] | None:
        """Return whether `path` (relative to the root) is left out, and the rule; None without a match."""
        if not path.startswith(self.base) or path == self.base:
            return None
        found = self.spec.check_file(printable(self.above + path[len(self.base) :]))  # RE2 takes no surrogates
        if found.include is None:
            return None
        line = self.lines[found.index] if found.index is not None else ""
        return found.include, LeftOut(f"{self.shown}: {line}", final=self.shown.endswith(FILES[1]))


def _rule_file(shown: str, base: str, lines: list[str]) -> _RuleFile:
    return _RuleFile(shown, base, tuple(line.strip() for line in lines), GitIgnoreSpec.from_lines(lines))


class IgnoreRules:
    """The rule files that apply in one folder; later ones take precedence."""

    def __init__(self, files: tuple[_RuleFile, ...]) -> None:
        self._files = files

    @classmethod
    def above(cls, root: Path) -> IgnoreRules:
        """Return the rules from outside the root: built-in ones, and git's from the folders above.

        Rule files above that leave out the working directory itself are not applied.
        """
        files = [_rule_file("built in", "", list(BUILT_IN))]
        for parent in _repository_parents(root):
            lines = _read_lines(parent / FILES[0])
            prefix = f"{root.relative_to(parent).as_posix()}/"
            shown = Path(os.path.relpath(parent / FILES[0], root)).as_posix()
            file = _rule_file(shown, "", lines)
            if lines and not file.spec.match_file(prefix):
                files.append(file._replace(above=prefix))
        return cls(tuple(files))

    def entering(self, root: Path, folder: str) -> IgnoreRules:
        """Return the rules inside `folder`, a path relative to the root (empty for the root)."""
        base = f"{folder}/" if folder else ""
        found = [
            _rule_file(f"{base}{name}", base, lines) for name in FILES if (lines := _read_lines(root / folder / name))
        ]
        return IgnoreRules((*self._files, *found)) if found else self

    def rule_against(self, path: str, entry: os.DirEntry[str], *, is_dir: bool, folder: Directory) -> LeftOut | None:
        """Return the rule that leaves out `path`, which is in `folder`; None if it is sent."""
        if entry.name in NEVER:
            return LeftOut(f"built in: {entry.name}{'/' if is_dir else ''}", final=True)
        asked = f"{path}/" if is_dir else path
        for file in reversed(self._files):
            verdict = file.verdict(asked)
            if verdict is not None:
                return verdict[1] if verdict[0] else None
        if is_dir and folder.has(f"{entry.name}/pyvenv.cfg"):
            return LeftOut(f"built in: {entry.name}/ (a virtual environment)", final=False)
        return None


def _repository_parents(root: Path) -> list[Path]:
    """Return the folders above `root` up to its git repository, outermost first."""
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
