"""The runner: claims an attempt, prepares its environment, starts its training, watches it, records how it ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raylaunch import contract
from raylaunch.runner import claim, wandb_env
from raylaunch.runner.attempt import Attempt
from raylaunch.runner.command import EntrypointProblem
from raylaunch.runner.control import Heartbeat, StopRequested
from raylaunch.runner.environments.build import EnvironmentProblem

if TYPE_CHECKING:
    from raylaunch.contract import Exit

_STATUS = {"environment": 78, "entrypoint_not_found": 127, "runner_error": 70, "stopped": 143, "timed_out": 124}


def main(arguments: Sequence[str]) -> int:
    """Run the attempt whose folder is the one argument; returns the status for Ray."""
    folder = Path(arguments[0]).resolve()
    spec = claim.read_attempt(folder)
    refusal = claim.take_claim(folder, spec)
    if refusal:
        print_line(refusal)
        return 0
    heartbeat = Heartbeat(folder, grace_s=spec["grace_s"], environ=os.environ)
    heartbeat.beat()
    end = _run(folder, Attempt(folder, spec, heartbeat))
    claim.write_json(folder / contract.EXIT, end)
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
        return not_started("environment", str(problem))
    except EntrypointProblem as problem:
        return not_started("entrypoint_not_found", str(problem), exit_code=127)
    except StopRequested as stop:
        ended: contract.Ended = "timed_out" if stop.request.why == "timed_out" else "stopped"
        return not_started(ended, "it was stopped before the training started", by_ray=stop.request.by_ray)
    except Exception as error:  # noqa: BLE001 -- the process's top: whatever happened must reach the exit file
        import traceback  # noqa: PLC0415 -- for a bug alone; each start would pay for it

        traceback.print_exc()
        return not_started("runner_error", f"raylaunch's runner failed: {type(error).__name__}: {error}")
    finally:
        attempt.end_everything()


def not_started(ended: contract.Ended, message: str, *, exit_code: int | None = None, by_ray: bool = False) -> Exit:
    """Return the facts of an attempt whose training was never started."""
    return {
        "ended": ended,
        "exit_code": exit_code,
        "signal": "",
        "message": message,
        "failed_rank": None,
        "at": time.time(),
        "by_ray": by_ray,
        "killed": 0,
        "oom": False,
    }


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
