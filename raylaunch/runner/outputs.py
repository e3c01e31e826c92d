"""Collecting the outputs of a program from its working directory, without caches and secrets.

By default (`AUTO`), new and changed files are kept, small ones first, up to a limit. Caches, W&B's own files, and what
is in `$RAYLAUNCH_CHECKPOINT_DIR` are skipped. Files over the limit, and files that look like secrets, are listed in a
warning and stay on the node for some days, in the job's folder, where ``raylaunch get`` finds them by name; those that
look like secrets only for the job's owner.
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from raylaunch.contract import APART, AUTO, CHECKPOINTS, COLLECTED, LEFT, LEFT_S, NONE, OUTPUTS
from raylaunch.files import link_or_copy

if TYPE_CHECKING:
    Snapshot = Mapping[str, tuple[int, int]]
    """Size and time of change of each file of a working directory."""

HEAD = 64 * 1024
"""Bytes of a file's beginning that are searched for a private key."""
_NAMES = frozenset(
    {
        *(".env", ".envrc", ".netrc", "_netrc", ".pypirc", ".git-credentials", ".pgpass", ".htpasswd"),
        *("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "id_ecdsa_sk", "id_ed25519_sk"),
        *("kubeconfig", "credentials.json", "application_default_credentials.json", "client_secret.json"),
    }
)
_PATHS = (".aws/credentials", ".kube/config", ".docker/config.json", ".config/gh/hosts.yml")
_FOLDERS = frozenset({".ssh", ".gnupg"})
_SUFFIXES = (".p12", ".pfx", ".kdbx")
_EXAMPLES = ("example", "sample", "template", "dist", "defaults", "schema")
"""``.env.example`` and the like are made to be shared."""
_PRIVATE_KEY = re.compile(
    rb"^-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----\s*$"
    rb'|\A\s*\{[^\0]*"private_key"\s*:\s*"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----'
    rb"|^PuTTY-User-Key-File-\d|^AGE-SECRET-KEY-1",
    re.MULTILINE,
)
_KEY_MARKS = (b"PRIVATE KEY", b"PuTTY-User-Key-File-", b"AGE-SECRET-KEY-1")
"""Each match contains one of them; searching for these costs a tenth of the expression."""
_CACHES = frozenset(
    {
        *("__pycache__", ".cache", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints", ".triton"),
        *(".hypothesis", ".eggs", ".nv", ".jax_cache", ".numba_cache", ".uv_cache"),
        *(".git", ".raylaunch", ".venv", ".tox", ".nox", "node_modules"),
    }
)
_MARKS = ("CACHEDIR.TAG", "pyvenv.cfg")
"""A folder with one of these is a cache (https://bford.info/cachedir), or a virtual environment."""
_NEVER = re.compile(r".*\.py[co]|\.DS_Store|core\.\d+")
_WANDB_ENTRY = re.compile(r"(?:offline-)?run-\d|latest-run$|debug(?:-internal)?\.log$")
_NAMED = 5
_DAYS = LEFT_S // 86400


def snapshot(code: Path) -> Snapshot:
    """Return what is in a working directory before its program starts."""
    return {file.path: (file.size, file.changed_ns) for file in _walk(code)}


def collect(code: Path, kept: Path, patterns: Sequence[str], limits: OutputLimits, before: Snapshot) -> KeptOutputs:
    """Keep the outputs of a program that has ended, under their relative paths.

    Args:
        code: the working directory.
        kept: the folder that has the job's outputs and checkpoints.
        patterns: `AUTO`, `NONE`, or globs, whose files are kept regardless of their size.
        limits: of what is kept by `AUTO`.
        before: the working directory as it was.
    """
    collector = _Collector(code, kept)
    for pattern in patterns:
        if pattern not in (AUTO, NONE):
            collector.keep_matching(pattern)
    if AUTO in patterns:
        collector.keep_new(
            [file for file in _walk(code) if before.get(file.path) != (file.size, file.changed_ns)], limits
        )
    return collector.finish()


class OutputLimits(NamedTuple):
    """How much `AUTO` keeps: bytes, and files."""

    size: int
    files: int


class KeptOutputs(NamedTuple):
    """Warnings, and the files that stay on the node."""

    warnings: list[str]
    left: dict[str, int]
    """Their sizes, by path."""
    withheld: list[str]
    """Those of them that look like secrets."""


def looks_secret(path: str) -> bool:
    """Return whether a file's name, or the folder that it is in, suggests that it holds secrets."""
    *folders, name = path.split("/")
    if name in _NAMES or name.endswith(_SUFFIXES) or not _FOLDERS.isdisjoint(folders):
        return True
    if name.startswith(".env."):
        return not name.endswith(_EXAMPLES)
    return any(path == one or path.endswith(f"/{one}") for one in _PATHS)


def holds_private_key(head: bytes) -> bool:
    """Return whether the beginning of a file is, or has in it, a private key."""
    return any(mark in head for mark in _KEY_MARKS) and _PRIVATE_KEY.search(head) is not None


class _File(NamedTuple):
    path: str
    size: int
    changed_ns: int
    link: bool


class _Collector:
    """Collects outputs. Replaces what an earlier attempt collected, but never what a program wrote there itself."""

    def __init__(self, code: Path, kept: Path) -> None:
        self._code = code
        self._kept = kept
        self._collected = kept / COLLECTED
        try:
            self._before = set(json.loads(self._collected.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            self._before = set()
        self._now: set[str] = set()
        self._warnings: list[str] = []
        self._left: dict[str, int] = {}
        self._withheld: list[str] = []
        self._known_inodes = {
            (found.st_dev, found.st_ino)
            for name in (CHECKPOINTS, OUTPUTS)
            for found in map(os.stat, _files_below(kept / name))
        }

    def keep_matching(self, pattern: str) -> None:
        """Keep what matches a glob."""
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            self._warnings.append(f"outputs: {pattern!r} is outside the working directory and was not kept")
            return
        files = list(_matching(self._code, pattern))
        if not files:
            self._warnings.append(f"outputs: nothing matches {pattern!r} in the working directory")
        for path in files:
            self._keep(path.relative_to(self._code).as_posix())

    def keep_new(self, new: Sequence[_File], limits: OutputLimits) -> None:
        """Keep new files up to the limits."""
        over: dict[str, int] = {}
        secret: dict[str, int] = {}
        free_bytes, count = limits.size, limits.files
        for file in sorted((file for file in new if not file.link), key=lambda file: (file.size, file.path)):
            if self._is_already_kept(file):
                continue
            if self._looks_secret(file):
                secret[file.path] = file.size
            elif count and file.size <= free_bytes:
                free_bytes, count = free_bytes - file.size, count - 1
                self._keep(file.path)
            else:
                over[file.path] = file.size
        for file in new:
            if file.link:
                self._keep_link(file.path)
        if over:
            self._warnings.append(_left_warning(over, limits))
        if secret:
            self._warnings.append(
                f"outputs: not kept, because they look like secrets: {_list_files(secret)}; for {_DAYS} days the job's "
                "owner can fetch each with raylaunch get and its full name"
            )
        self._left.update({**over, **secret})
        self._withheld += secret

    def finish(self) -> KeptOutputs:
        """Leave the other files on the node, and record what was collected, for a later attempt."""
        lost = self._leave_rest()
        if lost:
            self._warnings.append(f"outputs: deleted, because the node could not keep them: {_list_files(lost)}")
        if self._now or self._before:
            self._collected.write_text(json.dumps(sorted(self._now | self._before)), encoding="utf-8")
        return KeptOutputs(self._warnings, self._left, [path for path in self._withheld if path in self._left])

    def _is_already_kept(self, file: _File) -> bool:
        found = os.lstat(self._code / file.path)
        return file.path in self._now or (found.st_dev, found.st_ino) in self._known_inodes

    def _looks_secret(self, file: _File) -> bool:
        if looks_secret(file.path):
            return True
        try:
            with (self._code / file.path).open("rb") as opened:
                return holds_private_key(opened.read(HEAD))
        except OSError:
            return False

    def _keep(self, path: str) -> None:
        source, target = self._code / path, self._kept / OUTPUTS / path
        try:
            if os.path.lexists(str(target)):
                if path not in self._before:
                    self._keep_apart(path)
                    return
                target.unlink()
            _link(source, target)
        except OSError as error:
            self._warnings.append(f"outputs: {path} could not be kept: {error.strerror or error}")
            self._left[path] = source.stat().st_size
            return
        self._now.add(path)

    def _keep_apart(self, path: str) -> None:
        """Keep a file under `APART`, because the program itself wrote another one of that name to its outputs."""
        source, target, apart = self._code / path, self._kept / OUTPUTS / path, f"{APART}/{path}"
        if path.startswith(f"{APART}/") or (target.is_file() and filecmp.cmp(source, target, shallow=False)):
            return
        _link(source, self._kept / OUTPUTS / apart, replace=True)
        self._now.add(apart)
        self._warnings.append(
            f"outputs: {path} is kept as {apart}: $RAYLAUNCH_OUTPUT_DIR has another file of that name"
        )

    def _keep_link(self, path: str) -> None:
        """Keep a link to something that is kept."""
        source, target = self._code / path, self._kept / OUTPUTS / path
        leads = os.path.relpath(os.path.realpath(source), os.path.realpath(source.parent))
        with contextlib.suppress(OSError):  # it is there, or its folder is a file
            if (target.parent / leads).exists() and not os.path.lexists(target):
                target.symlink_to(leads)

    def _leave_rest(self) -> dict[str, int]:
        """Keep files on the node when the working directory is deleted; return those that cannot be kept."""
        shutil.rmtree(str(self._kept / LEFT), ignore_errors=True)
        return {path: self._left.pop(path) for path in list(self._left) if not self._leave_file(path)}

    def _leave_file(self, path: str) -> bool:
        try:
            _link(self._code / path, self._kept / LEFT / path)
        except OSError:
            return False
        return True


def _left_warning(left: Mapping[str, int], limits: OutputLimits) -> str:
    count = "1 new file" if len(left) == 1 else f"{len(left)} new files"
    limit = f"{_size(limits.size)} or {limits.files} files (outputs_size, outputs_files)"
    return (
        f"outputs: {count} of the working directory ({_size(sum(left.values()))}) not kept, over the limit of {limit}: "
        f"{_list_files(left)}; for {_DAYS} days raylaunch get fetches them from the node by name"
    )


def _list_files(files: Mapping[str, int]) -> str:
    largest = sorted(files.items(), key=lambda file: -file[1])
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
        folders[:] = sorted(name for name in folders if name not in links and not _is_ignored(parent, name))
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


def _is_ignored(parent: str, name: str) -> bool:
    folder = f"{parent}/{name}"
    if name in _CACHES or name.endswith(".egg-info") or any(os.path.lexists(f"{folder}/{mark}") for mark in _MARKS):
        return True
    return name == "wandb" and any(_WANDB_ENTRY.match(entry.name) for entry in Path(folder).glob("*"))


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


def _link(source: Path, target: Path, *, replace: bool = False) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if replace and os.path.lexists(str(target)):
        target.unlink()
    link_or_copy(source.resolve(), target)
