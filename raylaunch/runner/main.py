"""The runner: claims an attempt, which only one process can, runs it, and records how it ended."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from raylaunch import contract
from raylaunch.files import create_exclusive
from raylaunch.runner import wandb_env
from raylaunch.runner.attempt import Attempt, exit_facts, write_json
from raylaunch.runner.command import EntrypointProblem
from raylaunch.runner.control import Heartbeat, StopRequested
from raylaunch.runner.environments.build import EnvironmentProblem
from raylaunch.runner.processes import boot_id, started_ticks

if TYPE_CHECKING:
    from raylaunch.contract import AttemptSpec, Claim, Exit

_STATUS = {"environment": 78, "entrypoint_not_found": 127, "runner_error": 70, "stopped": 143, "timed_out": 124}


def main(arguments: Sequence[str]) -> int:
    """Run the attempt whose folder is the one argument; returns the status for Ray."""
    folder = Path(arguments[0]).resolve()
    spec = cast("AttemptSpec", json.loads((folder / contract.ATTEMPT).read_text(encoding="utf-8")))
    refusal = take_claim(folder, spec)
    if refusal:
        print_line(refusal)
        return 0
    heartbeat = Heartbeat(folder, grace_s=spec["grace_s"], environ=os.environ)
    heartbeat.beat()
    end = _run(folder, Attempt(folder, spec, heartbeat))
    write_json(folder / contract.EXIT, end)
    if end["message"]:
        print_line(f"raylaunch: {end['message']}")
    return exit_status(end)


def _run(folder: Path, attempt: Attempt) -> Exit:
    try:
        for name in (contract.CODE, contract.LOGS, contract.OUTPUTS, contract.CHECKPOINTS, contract.TMP):
            (folder / name).mkdir(parents=True, exist_ok=True)
        wandb_env.make_folders(folder)
        return attempt.run()
    except EnvironmentProblem as problem:
        return exit_facts("environment", str(problem))
    except EntrypointProblem as problem:
        return exit_facts("entrypoint_not_found", str(problem), exit_code=127)
    except StopRequested as stop:
        return exit_facts(stop.request.ended, "it was stopped before the training started", by_ray=stop.request.by_ray)
    except Exception as error:  # noqa: BLE001 -- the process's top: whatever happened must reach the exit file
        import traceback  # noqa: PLC0415 -- for a bug alone; each start would pay for it

        traceback.print_exc()
        return exit_facts("runner_error", f"raylaunch's runner failed: {type(error).__name__}: {error}")
    finally:
        attempt.end_everything()


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
    if create_exclusive(folder / contract.CLAIM, json.dumps(claim).encode()):
        return ""
    try:
        other = json.loads((folder / contract.CLAIM).read_text(encoding="utf-8"))
    except ValueError:
        other = {}
    if other.get("epoch") == contract.FENCED:
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


def exit_status(end: Exit) -> int:
    """Return the runner's own exit status, so that Ray's view of the job agrees: the training's, if it failed."""
    code = end["exit_code"]
    if end["ended"] == "completed":
        return 0
    if code is not None and code > 0:
        return min(code, 255)
    return _STATUS.get(end["ended"], 1)


def print_line(text: str) -> None:
    """Print a line into Ray's log of the job."""
    try:
        print(text, flush=True)  # noqa: T201 -- the runner's output is Ray's log of the job
    except OSError:
        sys.stdout = None  # the reader has closed it; Python must not fail at exit because of that
