"""The folder of one attempt on its node, as `raylaunch.runner.contract` describes it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

from raylaunch.errors import ConflictError, NotFoundError
from raylaunch.node.processes import boot_id
from raylaunch.node.wheels import lay_out
from raylaunch.runner.contract import (
    ATTEMPT,
    CHECKPOINTS,
    CLAIM,
    CODE,
    HEARTBEAT,
    LOGS,
    OUTPUTS,
    RUNNER,
    SECRETS,
    STOP,
    TMP,
    WANDB,
    WHEELS,
    AttemptSpec,
    Claim,
    StopWish,
)

FENCED = "fenced"
"""Epoch of a claim that a fence made: no runner has it."""

_ATTEMPT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}-[0-9]{1,6}")
_LARGEST_JSON = 16 * 1024 * 1024
_FICLONE = 0x40049409
_HALF_WRITTEN_S = 1.0
_KEPT = "checkpoints"
"""Below the node root: checkpoints of jobs between two attempts."""
_KEPT_S = 7 * 24 * 3600


class Ready(TypedDict):
    """An attempt that can be submitted."""

    folder: str
    command: str


def attempt_folder(root: Path, attempt: str) -> Path:
    """Return where an attempt's folder is below a node root, or would be.

    Raises:
        NotFoundError: `attempt` is not an attempt's id.
    """
    if not _ATTEMPT_ID.fullmatch(attempt):
        msg = f"{attempt!r} is not an attempt's id"
        raise NotFoundError(msg)
    return root / "attempts" / attempt


def attempts_in(root: Path) -> list[str]:
    """Return the ids of the attempts that have a folder below a node root."""
    try:
        names = os.listdir(root / "attempts")  # noqa: PTH208 -- looked at many times a second
    except FileNotFoundError:
        return []
    return sorted(name for name in names if _ATTEMPT_ID.fullmatch(name))


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
        ConflictError: The attempt was fenced.
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
    _take_over_checkpoints(root, spec["job"], spec["n"], folder / CHECKPOINTS)
    for name in (LOGS, WANDB, OUTPUTS, CHECKPOINTS, TMP):
        (folder / name).mkdir(mode=0o700, exist_ok=True)
    _copy_code(package, folder / CODE)
    lay_out(root / "packages", spec["wheels"], folder / WHEELS)
    write_file(folder / RUNNER, runner)
    write_json(folder / SECRETS, secrets)
    envs = spec["envs_dir"] or str(root / "envs")
    write_json(folder / ATTEMPT, {**spec, "envs_dir": envs})
    return ready


def wish_stop(root: Path, attempt: str, wish: StopWish) -> None:
    """Write the wish to stop an attempt; a later one replaces it. Nothing happens when it has no folder."""
    folder = attempt_folder(root, attempt)
    if folder.is_dir():
        write_json(folder / STOP, wish)


def close(root: Path, attempt: str) -> Claim:
    """Make sure that no runner can start this attempt any more, and return its claim.

    When nobody has claimed it, the claim is taken with the epoch `FENCED`. Its secrets are deleted.

    Raises:
        OSError: The disk is full.
    """
    folder = attempt_folder(root, attempt)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mine = Claim(epoch=FENCED, pid=0, started_ticks=0, boot_id=boot_id(), at=time.time())
    beside = folder / f".{CLAIM}.{os.getpid()}"
    write_file(beside, json.dumps(mine).encode())
    try:
        os.link(beside, folder / CLAIM)
        claim = mine
    except FileExistsError:
        claim = _whole_claim(folder) or mine
    finally:
        beside.unlink(missing_ok=True)
    (folder / SECRETS).unlink(missing_ok=True)
    return claim


def beat_at(folder: Path) -> float | None:
    """Return when the attempt's runner touched its heartbeat last; None when it never did."""
    try:
        return (folder / HEARTBEAT).stat().st_mtime
    except OSError:
        return None


def forget(root: Path, attempt: str, *, again: bool = False) -> None:
    """Delete an attempt's folder. May be repeated.

    Args:
        root: The node root.
        attempt: Its id.
        again: Another attempt follows; if that is made here too, it begins with the checkpoints of this one.
    """
    folder = attempt_folder(root, attempt)
    kept = root / _KEPT / attempt.rpartition("-")[0]
    shutil.rmtree(kept, ignore_errors=True)
    if again and (folder / CHECKPOINTS).is_dir():
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / CHECKPOINTS).rename(kept)
        os.utime(kept)
    aside = folder.with_name(f".forgotten-{attempt}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _take_over_checkpoints(root: Path, job: str, n: int, checkpoints: Path) -> None:
    """Begin with the checkpoints that the attempt before has left on this node: a program goes on where they end."""
    for kept in (root / _KEPT).glob("*"):
        if time.time() - kept.stat().st_mtime > _KEPT_S:  # its job went on elsewhere
            shutil.rmtree(kept, ignore_errors=True)
    before = attempt_folder(root, f"{job}-{n - 1}") / CHECKPOINTS if n > 1 else None
    if checkpoints.exists() or before is None:
        return
    if (root / _KEPT / job).is_dir():
        (root / _KEPT / job).rename(checkpoints)
    elif before.is_dir() and not before.is_symlink():
        beside = checkpoints.with_name(f".{checkpoints.name}.new")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(before, beside, symlinks=True, copy_function=_copy_file)
        beside.rename(checkpoints)


def read_json(path: Path) -> dict[str, object] | None:
    """Return a JSON object, or None when there is no file or it is not whole. A link is not followed."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            value = json.loads(file.read(_LARGEST_JSON))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_claim(folder: Path) -> Claim | None:
    """Return who claimed an attempt; None when nobody has, or the claim is not whole yet."""
    value = read_json(folder / CLAIM)
    if value is None or not Claim.__required_keys__ <= value.keys():
        return None
    return cast("Claim", value)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object as a whole, 0600."""
    write_file(path, json.dumps(value).encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a file beside and rename it, 0600."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _whole_claim(folder: Path) -> Claim | None:
    """Read a claim that a runner may be writing just now."""
    deadline = time.monotonic() + _HALF_WRITTEN_S
    while (claim := read_claim(folder)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return claim


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
