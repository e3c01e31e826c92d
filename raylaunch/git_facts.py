"""The git state of a working directory: commit, branch, and what differs from it. The one module that knows git."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from raylaunch.state import GitFacts

DIFF_LIMIT = 1024 * 1024
_TIMEOUT_S = 20.0


def git_facts(working_dir: Path) -> GitFacts | None:
    """Return the git state of a folder; None where there is no git, no repository, or git does not answer.

    The diff is of tracked files in the folder against the last commit, cut at 1 MiB.
    """
    inside = _git(working_dir, "rev-parse", "--is-inside-work-tree")
    if inside != "true":
        return None
    status = _git(working_dir, "status", "--porcelain", "--", ".")
    if status is None:
        return None
    diff, truncated = _diff(working_dir) if status else ("", False)
    return GitFacts(
        commit=_git(working_dir, "rev-parse", "--verify", "HEAD") or "",
        branch=_git(working_dir, "symbolic-ref", "--short", "-q", "HEAD") or "",
        dirty=bool(status),
        diff=diff,
        diff_truncated=truncated,
    )


def _environment() -> dict[str, str]:
    """Git asks nobody, takes no lock, and is not told by a hook's variables which repository it is in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {**kept, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def tracked_files(working_dir: Path) -> frozenset[str]:
    """Return the files of a folder that git tracks, relative to it; none where `git_facts` returns None."""
    listed = _output(working_dir, "ls-files", "-z", "--cached", "--", ".")
    return frozenset(os.fsdecode(name) for name in listed.split(b"\0") if name) if listed else frozenset()


def _git(folder: Path, *words: str) -> str | None:
    found = _output(folder, *words)
    return None if found is None else found.decode("utf-8", "replace").strip()


def _output(folder: Path, *words: str) -> bytes | None:
    try:
        done = subprocess.run(  # noqa: S603 -- a fixed program with fixed words
            ["git", "-C", str(folder), *words],  # noqa: S607 -- the person's own git
            capture_output=True,
            check=False,
            timeout=_TIMEOUT_S,
            env=_environment(),
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _diff(folder: Path) -> tuple[str, bool]:
    """Return the diff against HEAD and whether it was cut. It passes through a file: it may be of any size."""
    words = ["git", "-C", str(folder), "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", "--", "."]
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
