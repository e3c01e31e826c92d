"""The git state of a working directory: commit, branch and diff. The only module that runs git.

A repository's configuration may name programs. None of them is run: reading a checkout executes nothing of it.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from raylaunch.models.job import GitFacts

DIFF_LIMIT = 1024 * 1024
_TIMEOUT_S = 20.0
_RUNS_NOTHING = (
    "core.fsmonitor=false",
    f"core.hooksPath={os.devnull}",
    "diff.external=",
    "protocol.allow=never",
    "submodule.recurse=false",
    "credential.helper=",
)
"""Settings with which git runs no program of the repository; filters are added by name (`_without_filters`)."""
_MOST_LEFT_OUT = 1000
_SUBMODULE = "160000"
"""The mode of a submodule in git's index."""


def git_facts(working_dir: Path, *, sent: Collection[str] | None = None) -> GitFacts | None:
    """Return the git state of a folder; None if there is no git, no repository, or git does not respond.

    The diff compares tracked files in the folder with the last commit, cut at 1 MiB. With `sent`, it has only files of
    these paths, and only the names of deleted ones.
    """
    inside = _git(working_dir, "rev-parse", "--is-inside-work-tree")
    if inside != "true":
        return None
    settings = _without_filters(working_dir)
    if settings is None:
        return None
    status = _git(working_dir, *settings, "status", "--porcelain", "--ignore-submodules=dirty", "--", ".")
    if status is None:
        return None
    diff, truncated = _diff(working_dir, settings, sent) if status else ("", False)
    return GitFacts(
        commit=_git(working_dir, "rev-parse", "--verify", "HEAD") or "",
        branch=_git(working_dir, "symbolic-ref", "--short", "-q", "HEAD") or "",
        dirty=bool(status),
        diff=diff,
        diff_truncated=truncated,
    )


def _environment() -> dict[str, str]:
    """Return variables with which git prompts nobody and takes no lock; a hook's variables are left out."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    quiet = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}
    return {**kept, **quiet}


def _argv(folder: Path, words: Collection[str]) -> list[str]:
    settings = [word for setting in _RUNS_NOTHING for word in ("-c", setting)]
    return ["git", "--no-pager", *settings, "-C", str(folder), *words]


def _without_filters(folder: Path) -> list[str] | None:
    """Return options that disable the repository's own filters, not the person's (LFS); None for git before 2.26."""
    words = ("config", "--null", "--show-scope", "--name-only", "--get-regexp", r"^filter\.")
    listed = _output(folder, *words, none_found=1)
    if listed is None:
        return None
    fields = os.fsdecode(listed).split("\0")
    keys = {key for scope, key in zip(fields[::2], fields[1::2], strict=False) if scope in {"local", "worktree"}}
    drivers = {key.rpartition(".")[0] for key in keys}
    values = (
        (driver, name) for driver in sorted(drivers) for name in ("clean=", "smudge=", "process=", "required=false")
    )
    return [word for driver, value in values for word in ("-c", f"{driver}.{value}")]


def tracked_files(working_dir: Path) -> frozenset[str]:
    """Return the files of a folder that git tracks, relative to it; none if `git_facts` returns None.

    This includes checked-out submodules. git runs in each, so that no program of their configuration is run.
    """
    found, folders = set[str](), [""]
    while folders:
        base = folders.pop()
        folder = working_dir / base
        if base and (folder.is_symlink() or not (folder / ".git").exists()):  # not checked out
            continue
        for mode, name in _staged(folder):
            (folders.append if mode == _SUBMODULE else found.add)(base + name + ("/" if mode == _SUBMODULE else ""))
    return frozenset(found)


def _staged(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield mode and name of each entry of the index below a folder."""
    for entry in (_output(folder, "ls-files", "-z", "--cached", "--stage", "--", ".") or b"").split(b"\0"):
        facts, tab, name = os.fsdecode(entry).partition("\t")
        if tab:
            yield facts.partition(" ")[0], name


def _git(folder: Path, *words: str) -> str | None:
    found = _output(folder, *words)
    return None if found is None else found.decode("utf-8", "replace").strip()


def _output(folder: Path, *words: str, none_found: int = 0) -> bytes | None:
    """Return git's output; None if it fails. `none_found` is the status for no results."""
    try:
        done = subprocess.run(  # noqa: S603 -- a fixed program with fixed words
            _argv(folder, words),
            capture_output=True,
            check=False,
            timeout=_TIMEOUT_S,
            env=_environment(),
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode in {0, none_found} else None


def _diff(folder: Path, settings: Collection[str], sent: Collection[str] | None) -> tuple[str, bool]:
    """Return the diff against HEAD and whether it was cut; it goes through a file because it may be of any size."""
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--ignore-submodules=dirty")
    words = [*settings, "diff", *plain]
    paths = ["."]
    if sent is not None:
        listed = _output(folder, *words, "--name-only", "--no-renames", "--relative", "-z", "HEAD", "--", ".")
        changed = {os.fsdecode(name) for name in (listed or b"").split(b"\0") if name}
        left_out = sorted(path for path in changed if path not in sent and os.path.lexists(folder / path))
        if len(left_out) > _MOST_LEFT_OUT:
            return "", True
        words += ["--no-renames", "--irreversible-delete"]
        paths += [f":(exclude,literal){path}" for path in left_out]
    words = _argv(folder, [*words, "HEAD", "--", *paths])
    with tempfile.TemporaryFile() as file:
        try:
            subprocess.run(  # noqa: S603 -- as above
                words,
                stdout=file,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                check=False,
                timeout=_TIMEOUT_S,
                env=_environment(),
            )
        except (OSError, subprocess.TimeoutExpired):
            return "", False
        file.seek(0)
        data = file.read(DIFF_LIMIT + 1)
    return data[:DIFF_LIMIT].decode("utf-8", "replace"), len(data) > DIFF_LIMIT
