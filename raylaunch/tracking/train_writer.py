"""``python -m raylaunch.tracking.train_writer FILE``: logs to W&B what `raylaunch.tracking.train_callback` records.

It is started by the runner in the job's environment, detaches itself, and runs until the runner has sent on stdin how
the training ended (``{"exit_code": 0}``); the end of stdin without a message means that the runner was killed. So a run
is finished with the right status, even if the training's driver and Ray's processes were killed.

Its process is named like W&B's own helpers, which are given a moment to write when an attempt's processes are ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wandb

_POLL_S = 0.1
_PR_SET_NAME = 15
_COMM = b"wandb-reports"
_RUNNER_KILLED = 1


class EventFile:
    """The growing file of events, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the events in complete lines since the last read."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                while (line := file.readline()).endswith(b"\n"):
                    self._at += len(line)
                    yield json.loads(line)
        except FileNotFoundError:
            return


class TrainRuns:
    """The W&B runs of one attempt. A run is opened with its first report."""

    def __init__(self) -> None:
        self._started: dict[str, Mapping[str, Any]] = {}
        self._open: dict[str, wandb.Run] = {}
        self._shift: dict[str, int] = {}

    def apply(self, event: Mapping[str, Any]) -> None:
        """Apply one event."""
        run_id = str(event["run"])
        match event["event"]:
            case "start":
                self._started[run_id] = event
            case "report":
                if run_id not in self._shift:
                    self._open_run(run_id, event["step"])
                run, step = self._open.get(run_id), event["step"] + self._shift[run_id]
                if run is not None and step >= run.starting_step:  # else an earlier attempt has logged it
                    run.log(dict(event["row"]), step=step, commit=True)
            case "end" if run_id in self._open:
                self._open.pop(run_id).finish(exit_code=event["exit_code"])
            case _:
                return

    def finish(self, exit_code: int) -> None:
        """Finish the open runs."""
        for run in self._open.values():
            run.finish(exit_code=exit_code)
        self._open.clear()

    def _open_run(self, run_id: str, step: int) -> None:
        """Open a run. If the training restarted from step 0, its steps continue after those of the earlier attempt."""
        self._shift[run_id] = 0
        run = self._init_with_fallback(run_id, self._started.get(run_id, {}))
        if run is None:
            return
        if not run.offline and run.url:
            _report(f"View run at {run.url}")
        self._open[run_id] = run
        self._shift[run_id] = 0 if step else run.starting_step

    def _init_with_fallback(self, run_id: str, started: Mapping[str, Any]) -> wandb.Run | None:
        """Open a run, offline if necessary. None if that fails too: the metrics are in ``progress.jsonl``."""
        import wandb  # noqa: PLC0415 -- it starts threads, and this process forks first

        try:
            return _init(run_id, started, mode=None)
        except Exception as error:  # noqa: BLE001 -- wandb raises many kinds; the reports are to be kept all the same
            _report(f"wandb.init failed ({_line(error)}); the training's reports are tracked offline")
        try:
            if not self._open:
                wandb.teardown()  # else its core considers the run in use
            return _init(run_id, started, mode="offline")
        except Exception as error:  # noqa: BLE001 -- as above
            _report(f"wandb.init failed offline too ({_line(error)}); the training's reports are not in W&B")
            return None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _init(run_id: str, started: Mapping[str, Any], *, mode: Any) -> wandb.Run:  # noqa: ANN401 -- wandb's own literals
    import wandb  # noqa: PLC0415 -- as above

    return wandb.init(
        id=run_id,
        name=started.get("name") or None,
        config=dict(started.get("config") or {}),
        mode=mode,
        resume="allow",
        reinit="create_new",
        settings=wandb.Settings(console="off", silent=True),
    )


def _report(text: str) -> None:
    sys.stderr.write(f"raylaunch: {text}\n")
    sys.stderr.flush()


def follow(path: Path, control: int) -> None:
    """Log what is written to `path`, until `control` reports how the training ended."""
    file, runs = EventFile(path), TrainRuns()
    status = b""
    while not status.endswith(b"\n"):
        for event in file.new():
            runs.apply(event)
        if select.select([control], [], [], _POLL_S)[0]:
            data = os.read(control, 4096)
            if not data:
                break
            status += data
    for event in file.new():
        runs.apply(event)
    runs.finish(int(json.loads(status)["exit_code"]) if status.endswith(b"\n") else _RUNNER_KILLED)


def _detach() -> None:
    """Leave the runner's children: Ray's stop signals all of them, also W&B's core, which then loses its data."""
    if os.fork():
        os._exit(0)
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform.startswith("linux") else None
    if prctl is not None:
        prctl(_PR_SET_NAME, _COMM, 0, 0, 0)


def main() -> None:
    """Detach, and log until the training has ended."""
    path = Path(sys.argv[1])
    _detach()
    follow(path, sys.stdin.fileno())


if __name__ == "__main__":
    main()
