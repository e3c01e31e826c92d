"""The API for training code in a job: `context` and `report`. Standard library only, Python 3.8 and newer.

If raylaunch is not installed in the job's environment, the runner provides this module from its archive.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsFloat

from raylaunch import contract

Number = SupportsFloat
"""Anything that `float` accepts: an int, a float, a numpy scalar, a tensor with one element."""


@dataclass(frozen=True)
class Context:
    """The job, attempt and rank of this process. Outside a job the folders are in the current one."""

    in_job: bool
    """Whether this process belongs to a job."""
    job: str
    """The job's id, the same for all its attempts; empty outside a job."""
    name: str
    """The job's name; empty outside a job."""
    attempt: int
    """1 for the first attempt, 2 for the first retry; 0 outside a job."""
    cluster: str
    """The cluster's name; empty outside a job."""
    output_dir: Path
    """Files in it are kept with the job (`raylaunch files`, `raylaunch get`)."""
    checkpoint_dir: Path
    """The same, for checkpoints."""
    rank: int
    """The number of this process in the training, from 0."""
    world_size: int
    """How many processes the training has; 1 unless a launcher starts more."""


def context() -> Context:
    """Return this job's ids, folders and rank; both folders are created."""
    environ = os.environ
    output_dir = Path(environ.get(contract.VAR_OUTPUT_DIR) or Path.cwd() / "outputs")
    checkpoint_dir = Path(environ.get(contract.VAR_CHECKPOINT_DIR) or output_dir / "checkpoints")
    for folder in (output_dir, checkpoint_dir):
        folder.mkdir(parents=True, exist_ok=True)
    return Context(
        in_job=contract.VAR_ATTEMPT in environ,
        job=environ.get(contract.VAR_JOB, ""),
        name=environ.get(contract.VAR_JOB_NAME, ""),
        attempt=_whole(environ.get(contract.VAR_ATTEMPT_N), 0),
        cluster=environ.get(contract.VAR_CLUSTER, ""),
        output_dir=output_dir,
        checkpoint_dir=checkpoint_dir,
        rank=_whole(environ.get("RANK"), 0),
        world_size=_whole(environ.get("WORLD_SIZE"), 1),
    )


def report(
    metrics: Mapping[str, Number] | None = None,
    /,
    *,
    step: Number | None = None,
    total: Number | None = None,
    **more: Number,
) -> None:
    """Report progress and metrics: ``report({"loss": 0.3}, step=7, total=100)``.

    It never raises, so that reporting cannot break the training. Outside a job, and in ranks other than 0, it does
    nothing.

    Args:
        metrics: name → number.
        step: the progress, in any unit (epochs, steps, samples).
        total: the end, in the same unit.
        **more: metrics as keywords.
    """
    path = os.environ.get(contract.VAR_PROGRESS)
    if not path or os.environ.get("RANK", "0") != "0":
        return
    try:
        line = json.dumps(
            {
                "at": time.time(),
                "step": None if step is None else float(step),
                "total": None if total is None else float(total),
                "metrics": _numbers({**(metrics or {}), **more}),
            }
        )
        _append(path, line.encode() + b"\n")
    except Exception:  # noqa: BLE001, S110 -- a failed report must not end the training
        pass


def _append(path: str, data: bytes) -> None:
    """Append with one write, so that lines of several processes do not mix."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _numbers(metrics: Mapping[str, Number]) -> dict[str, float]:
    numbers = {str(name): _number(value) for name, value in metrics.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def _number(value: Number) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None  # not a number: left out


def _whole(text: str | None, default: int) -> int:
    try:
        return int(text or default)
    except ValueError:
        return default
