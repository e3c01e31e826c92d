"""The program that logs to W&B what Ray Train's workers report: started with the first report, told how all ended.

See `raylaunch.tracking.train_callback`, which writes the reports down, and `raylaunch.tracking.train_writer`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from raylaunch.runner import contract
from raylaunch.runner.ending import left_s
from raylaunch.runner.watch import Pulse, Wish

_MODULE = "raylaunch.tracking.train_writer"
_REPORT = b'"event": "report"'
_POLL_S = 0.1
_FINISH_S = 60.0
"""For uploads; and off-line for a machine that is so busy that wandb takes long to begin."""


class TrainReports:
    """The reports of one attempt. Without any, nothing is started."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / contract.TRAIN_REPORTS
        self._size = 0
        self._log = folder / contract.RANK_LOG.format(rank=0)
        self._cwd = folder / contract.TMP / "ray"
        self._env: Mapping[str, str] = {}
        self._python = ""
        self._control = -1
        self._done = -1

    def begin(self, env: Mapping[str, str], python: str) -> None:
        """Look for reports from now on; those of a training that was started before are dropped.

        Args:
            env: the training's variables.
            python: interpreter of the job's environment.
        """
        self._env, self._python, self._size = env, python, 0
        for file in self._file.parent.glob(f"{self._file.name}*"):
            file.unlink()

    def look(self) -> None:
        """Start the program if there are reports, and it does not run yet."""
        if not self._python or self._control >= 0 or not self._has_reports():
            return
        control, self._control = os.pipe()
        self._done, done = os.pipe()
        with self._log.open("ab") as log:
            child = subprocess.Popen(  # noqa: S603 -- a list of ours, no shell
                [self._python, "-m", _MODULE, str(self._file)],
                env=dict(self._env),
                cwd=str(self._cwd),  # `-m` puts it on sys.path: nothing of the person's lies there
                stdin=control,
                stdout=log,
                stderr=log,
                pass_fds=[done],
            )
        os.close(control)
        os.close(done)
        child.wait()

    def finish(self, exit_code: int, *, wish: Wish | None, pulse: Pulse) -> None:
        """Say how the training ended, and wait until all is written; not longer than a wish to stop allows."""
        self.look()
        if self._control < 0:
            return
        limit_s = _FINISH_S if wish is None else left_s(wish) / 2
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself: what it said stands in the log
            os.write(self._control, json.dumps({"exit_code": exit_code}).encode() + b"\n")
        os.close(self._control)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and not select.select([self._done], [], [], _POLL_S)[0]:
            pulse.poll()
        os.close(self._done)
        self._control = self._done = -1

    def _has_reports(self) -> bool:
        try:
            size = self._file.stat().st_size
        except FileNotFoundError:
            return False
        if size == self._size:
            return False
        self._size = size
        return _REPORT in self._file.read_bytes()
