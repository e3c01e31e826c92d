"""One rank of a training: ``runner.pyz --rank PROGRAM ARGUMENTS``. Prepares the rank and executes the program.

Rank 0 writes where the launcher writes, into the attempt's log of rank 0; every other has a log of its own. The job's
W&B run is rank 0's: another rank that calls `wandb.init` gets a run of its own in the job's group (`wandb_runs`).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from raylaunch import contract

OPTION = "--rank"
OF_PARENT = "@python"
"""In place of a program: the interpreter of the process that starts the rank."""
_NOT_FOUND = 127


def main(arguments: Sequence[str]) -> int:
    """Execute the program named after `OPTION`. Returns only when it cannot be executed."""
    program, *rest = arguments[1:]
    if program == OF_PARENT:
        program = python_of(os.getppid())
    rank = os.environ.get("RANK", "0")
    prepare(os.environ, rank)
    if rank != "0":
        _write_to(Path(sys.argv[0]).resolve().parent / contract.RANK_LOG.format(rank=rank))
    try:
        os.execvp(program, [program, *rest])  # noqa: S606 -- executing the user's program is the purpose
    except OSError as error:
        sys.stderr.write(f"raylaunch: rank {rank}: {program} cannot be started: {error.strerror}\n")
    return _NOT_FOUND


def prepare(env: MutableMapping[str, str], rank: str) -> None:
    """Adapt variables that are meant for the launcher, or for rank 0."""
    env.pop("PYTHON_EXEC", None)
    if rank != "0" and env.get("WANDB_NAME"):
        env["WANDB_NAME"] += f"-rank-{rank}"


def _write_to(log: Path) -> None:
    try:
        out = os.open(str(log), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        sys.stderr.write(f"raylaunch: {log.name} cannot be written ({error.strerror}); this rank's output is here\n")
        return
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)


def python_of(pid: int) -> str:
    """Return the interpreter that a process was started with, as Python itself finds ``sys.executable``."""
    try:
        word = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0", 1)[0])
    except OSError:
        word = ""
    name = word.rpartition("/")[2]
    found = shutil.which(word) if name.startswith("python") else None
    return found or shutil.which("python") or "python3"
