"""Stop requests and signals to the runner, its heartbeat, and helper programs that stop with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from raylaunch import contract

BEAT_S = 1.0
_RAY_STOP_WAIT_S = 3.0
"""Between Ray's SIGTERM and its SIGKILL, unless the job's own variable sets another value."""
_ENDING_S = 20.0


class StopRequest(NamedTuple):
    """A request to stop the attempt; `until` is when everything should have stopped, on the monotonic clock."""

    why: str
    grace_s: float
    by_ray: bool
    until: float

    @property
    def ended(self) -> contract.Ended:
        """How an attempt ends that is stopped for it."""
        return "timed_out" if self.why == "timed_out" else "stopped"

    @property
    def remaining_s(self) -> float:
        """How much time is left for stopping everything, at least a moment."""
        return max(0.4, self.until - time.monotonic())


class StopRequested(Exception):  # noqa: N818 -- not an error
    """The attempt is to end while its training has not started yet."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__(request.why)
        self.request = request


class Heartbeat:
    """Touches the heartbeat file once a second, and reads stop requests. Every loop of the runner polls it."""

    def __init__(self, folder: Path, *, grace_s: float, environ: Mapping[str, str]) -> None:
        self._stop = folder / contract.STOP
        self._heartbeat = folder / contract.HEARTBEAT
        self._grace_s = grace_s
        self._ray_wait_s = _number(environ.get("RAY_JOB_STOP_WAIT_TIME_S"), _RAY_STOP_WAIT_S)
        self._signalled = False
        self._beaten_at = 0.0
        self._request: StopRequest | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._signalled = True

    def poll(self) -> StopRequest | None:
        """Touch the heartbeat if it is due, and return the stop request, once there is one."""
        now = time.monotonic()
        if now - self._beaten_at >= BEAT_S:
            self._beaten_at = now
            self.beat()
        if self._request is None:
            self._request = self._stop_file() or self._ray_stop()
        return self._request

    def beat(self) -> None:
        """Touch the heartbeat."""
        fd = os.open(str(self._heartbeat), os.O_WRONLY | os.O_CREAT, 0o600)
        os.close(fd)
        os.utime(str(self._heartbeat))

    def check(self) -> None:
        """Poll, and raise when the attempt is to end.

        Raises:
            StopRequested: it is.
        """
        request = self.poll()
        if request is not None:
            raise StopRequested(request)

    def time_out(self) -> StopRequest:
        """Request a stop because the attempt has reached its time limit."""
        self._request = _request("timed_out", self._grace_s)
        return self._request

    def _stop_file(self) -> StopRequest | None:
        try:
            content = json.loads(self._stop.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return None  # not there, or not written to its end yet
        if not isinstance(content, dict):
            return None
        grace = _number(content.get("grace_s"), self._grace_s)
        return _request(str(content.get("why") or "stopped"), grace)

    def _ray_stop(self) -> StopRequest | None:
        """Ray kills what is left some seconds after its SIGTERM; the exit file must be written before."""
        if not self._signalled:
            return None
        in_s = max(1.0, self._ray_wait_s - 0.7)
        return StopRequest("stopped", min(self._grace_s, in_s * 0.6), by_ray=True, until=time.monotonic() + in_s)


def _request(why: str, grace_s: float) -> StopRequest:
    return StopRequest(why, grace_s, by_ray=False, until=time.monotonic() + grace_s + _ENDING_S)


def _number(value: object, default: float) -> float:
    try:
        return float(str(value))
    except ValueError:
        return default


class HelperResult(NamedTuple):
    """How a helper program ended. `status` is None when it was ended at its time limit; `output` its last part."""

    status: int | None
    output: str


def run_program(  # noqa: PLR0913 -- what a process needs
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    timeout_s: float,
    heartbeat: Heartbeat,
    output: IO[bytes],
) -> HelperResult:
    """Run a helper program to its end, while the heartbeat continues. Its output is appended to `output`.

    Raises:
        OSError: it cannot be executed.
        StopRequested: the attempt is to stop; the program has been killed.
    """
    started_at = output.seek(0, os.SEEK_END)
    child = subprocess.Popen(  # noqa: S603 -- a list of ours, no shell
        list(argv),
        env=dict(env),
        cwd=str(cwd),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + timeout_s
    status = None
    try:
        while status is None and time.monotonic() < deadline:
            heartbeat.check()
            try:
                status = child.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
    finally:
        if status is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    size = output.seek(0, os.SEEK_END)
    output.seek(max(started_at, size - 64 * 1024))
    return HelperResult(status, output.read().decode("utf-8", "replace"))
