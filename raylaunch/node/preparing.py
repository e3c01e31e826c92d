"""Making the folder of an attempt on its node, and deleting it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from raylaunch.errors import ConflictError
from raylaunch.node import job_folder
from raylaunch.node.folder import FENCED, attempt_folder, read_claim, write_file, write_json
from raylaunch.node.wheels import lay_out
from raylaunch.runner.contract import ATTEMPT, CODE, LOGS, RUNNER, SECRETS, TMP, WANDB, WHEELS, AttemptSpec

_FICLONE = 0x40049409


class Ready(TypedDict):
    """An attempt that can be submitted."""

    folder: str
    command: str


def prepare(  # noqa: PLR0913 -- what an attempt consists of
    root: Path, *, spec: AttemptSpec, package: Path | None, secrets: Mapping[str, str], runner: bytes, python: str
) -> Ready:
    """Make an attempt's folder. May be repeated; once a runner has claimed the attempt nothing is changed any more.

    Args:
        root: The node root.
        spec: Becomes ``attempt.json``, written last.
        package: The unpacked package, of which the attempt gets its own copy; None for no code.
        secrets: Values by name; become ``secrets.json``, which the runner deletes.
        runner: Bytes of the runner's zip.
        python: The interpreter that runs it.

    Raises:
        ConflictError: The attempt was fenced, or a newer one of its job is here.
        ClusterError: A process of an older attempt of its job cannot be ended.
        OSError: The disk is full.
    """
    folder = attempt_folder(root, spec["attempt"])
    ready = Ready(folder=str(folder), command=shlex.join([python, "-I", str(folder / RUNNER), str(folder)]))
    claim = read_claim(folder)
    if claim is not None and claim["epoch"] == FENCED:
        msg = f"the attempt {spec['attempt']} was ended on this node before it began"
        raise ConflictError(msg)
    if claim is not None:
        return ready
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    job_dir = str(job_folder.take(root, spec["attempt"], spec["tag"]))
    for name in (LOGS, WANDB, TMP):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    _copy_code(package, folder / CODE)
    lay_out(root / "packages", spec["wheels"], folder / WHEELS)
    write_file(folder / RUNNER, runner)
    write_json(folder / SECRETS, secrets)
    envs = spec["envs_dir"] or str(root / "envs")
    moved_from = spec["moved_from"] if spec["moved_from"] != job_dir else ""
    write_json(folder / ATTEMPT, {**spec, "envs_dir": envs, "job_dir": job_dir, "moved_from": moved_from})
    return ready


def forget(root: Path, attempt: str, *, again: bool = False) -> None:
    """Delete an attempt's folder. May be repeated.

    Args:
        root: The node root.
        attempt: Its id.
        again: Another attempt follows, which begins with the checkpoints and outputs of this one.
    """
    if not again:
        job_folder.drop(root, attempt)
    folder = attempt_folder(root, attempt)
    aside = folder.with_name(f".forgotten-{attempt}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _copy_code(package: Path | None, code: Path) -> None:
    if code.is_dir():
        return
    beside = code.with_name(f".{code.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    if package is None:
        beside.mkdir(mode=0o700)
    else:
        shutil.copytree(package, beside, symlinks=True, copy_function=_copy_file)
    beside.chmod(0o700)
    beside.rename(code)


def _copy_file(source: str, target: str) -> str:
    """Copy one file, sharing its blocks where the file system can; 0600, or 0700 for a program."""
    mode = 0o700 if os.access(source, os.X_OK) and os.lstat(source).st_mode & 0o100 else 0o600
    with (
        Path(source).open("rb") as reader,
        os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as writer,
    ):
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            shutil.copyfileobj(reader, writer, 1 << 20)
    os.utime(target, ns=(os.stat(source).st_atime_ns, os.stat(source).st_mtime_ns))  # noqa: PTH116 -- a string, as copytree gives it
    return target
