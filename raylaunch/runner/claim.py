"""Reading an attempt's folder, and the claim that only one runner can make."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from raylaunch import contract
from raylaunch.files import write_atomic
from raylaunch.runner.processes import boot_id, started_ticks

if TYPE_CHECKING:
    from raylaunch.contract import AttemptSpec, Claim

FENCED = "fenced"
"""The epoch of a claim that the node agent makes so that no runner can start any more."""


def read_attempt(folder: Path) -> AttemptSpec:
    """Read ``attempt.json``."""
    return cast("AttemptSpec", json.loads((folder / contract.ATTEMPT).read_text(encoding="utf-8")))


def take_claim(folder: Path, spec: AttemptSpec) -> str:
    """Claim the attempt for this process. Returns an empty text, or a sentence with the reason why it may not run."""
    epoch, newest = spec["epoch"], _last_writer(spec)
    if newest > spec["n"]:
        return f"raylaunch: attempt {newest} of this job has replaced this one; exiting"
    claim: Claim = {
        "epoch": epoch,
        "pid": os.getpid(),
        "started_ticks": started_ticks(os.getpid()),
        "boot_id": boot_id(),
        "at": time.time(),
    }
    if _create_exclusive(folder / contract.CLAIM, json.dumps(claim).encode()):
        return ""
    try:
        other = json.loads((folder / contract.CLAIM).read_text(encoding="utf-8"))
    except ValueError:
        other = {}
    if other.get("epoch") == FENCED:
        return "raylaunch: this attempt was fenced off before it started; exiting"
    return f"raylaunch: this attempt is already claimed by process {other.get('pid', '?')}; exiting"


def _last_writer(spec: AttemptSpec) -> int:
    """Return the number of the attempt that may write into the job's folder."""
    if not spec["job_dir"]:
        return 0
    try:
        n = json.loads(Path(spec["job_dir"], contract.WRITER).read_text(encoding="utf-8"))["n"]
    except (OSError, ValueError, KeyError):
        return 0
    return int(n)


def _create_exclusive(path: Path, data: bytes) -> bool:
    """Make a file with its whole content, or return False when it is there. Nobody sees it half written.

    Other machines may have the folder too, and processes with the same id.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{os.urandom(8).hex()}")
    fd = os.open(str(temporary), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(str(temporary), str(path))  # as O_EXCL: fails when the name exists
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def take_secrets(folder: Path) -> dict[str, str]:
    """Read ``secrets.json`` and delete it; without the file there are none."""
    path = folder / contract.SECRETS
    try:
        secrets = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    path.unlink()
    return {str(name): str(value) for name, value in secrets.items()}


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file so that a reader sees all of it or nothing."""
    write_atomic(path, json.dumps(content))
