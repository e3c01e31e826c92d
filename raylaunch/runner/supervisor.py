"""The training's parent: a small process that no signal meant for the runner reaches.

It stands apart (two forks, a session of its own), so the training is not a descendant of the Ray job's driver. That has
two uses. Ray's stop signals every descendant of the driver, W&B's core too, which then drops what it has buffered; kept
apart, only the runner hears of the stop and ends the training in order. And when the runner is killed, its end of a
pipe closes: the keeper then ends every process of the attempt at once.

The runner speaks to it with single bytes: ``T`` asks the training to stop (see `raylaunch.runner.shutdown`), ``K``
kills all of it, ``.`` says that everything has ended. It answers ``pid N`` or ``error TEXT``, and later
``exit STATUS`` (as `subprocess.Popen.returncode`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from raylaunch.runner.control import Heartbeat, StopRequest
from raylaunch.runner.processes import AttemptProcess, of_attempt, send
from raylaunch.runner.shutdown import Shutdown

_PR_SET_PDEATHSIG = 1
_WANDB_LAST_S = 1.0
_STEP_S = 0.02
_SWEEP_S = 20.0


class StartError(Exception):
    """The training's program could not be started; the text is the system's."""


class ManagedProcess:
    """A training that a keeper looks after."""

    def __init__(self, pid: int, control: int, report: int) -> None:
        self.pid = pid
        self._control = control
        self._report = report
        self._text = b""
        self.status: int | None = None
        """As `subprocess.Popen.returncode`, once it has ended."""
        self.keeper_died = False

    def poll(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` for the training's end; True when it has ended."""
        if self.status is not None or self.keeper_died:
            return True
        if not select.select([self._report], [], [], timeout_s)[0]:
            return False
        data = os.read(self._report, 4096)
        self._text += data
        if b"\n" in self._text:
            self.status = int(self._text.split()[1])
        elif not data:
            self.keeper_died = True
        return self.status is not None or self.keeper_died

    def terminate(self) -> None:
        """Send SIGTERM to the training's program; what started it is held meanwhile."""
        self._say(b"T")

    def kill(self) -> None:
        """Send SIGKILL to the training, and to all that it has started."""
        self._say(b"K")

    def release(self) -> None:
        """Let the keeper go; everything of the attempt has been ended."""
        self._say(b".")
        os.close(self._control)
        os.close(self._report)

    def _say(self, word: bytes) -> None:
        try:
            os.write(self._control, word)
        except BrokenPipeError:
            self.keeper_died = True


def start(  # noqa: PLR0913 -- what a process needs
    argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path, tag: str, spare: frozenset[int]
) -> ManagedProcess:
    """Start the training under a keeper; its output goes straight into `log`.

    The caller must have a single thread, for this forks.

    Raises:
        StartError: the program cannot be executed.
    """
    control_read, control_write = os.pipe()
    report_read, report_write = os.pipe()
    sys.stdout.flush()
    between = os.fork()
    if between == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                os.close(control_write)
                os.close(report_read)
                _Keeper(control_read, report_write, tag, spare).keep(argv, env, cwd, log)
        finally:
            os._exit(0)
    os.close(control_read)
    os.close(report_write)
    os.waitpid(between, 0)
    word, _, rest = _first_line(report_read).partition(" ")
    if word != "pid":
        os.close(control_write)
        os.close(report_read)
        raise StartError(rest or "its keeper ended before it had started")
    return ManagedProcess(int(rest), control_write, report_read)


def _first_line(fd: int) -> str:
    text = b""
    while not text.endswith(b"\n"):
        data = os.read(fd, 1)
        if not data:
            break
        text += data
    return text.decode("utf-8", "replace").strip()


class _Keeper:
    def __init__(self, control: int, report: int, tag: str, spare: frozenset[int]) -> None:
        self._control = control
        self._report = report
        self._tag = tag
        self._spare = spare | {os.getpid()}
        self._stopping: Shutdown | None = None

    def keep(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._leave_the_terminal()
        try:
            child = _spawn(argv, env, cwd, log)
        except (OSError, subprocess.SubprocessError) as error:
            self._answer(f"error {error}")
            return
        self._answer(f"pid {child.pid}")
        told = False
        wake = _wake_on_child_end()
        while True:
            if self._stopping is not None:
                self._stopping.step()
            status = _status_of(child) if not told else None
            if status is not None:
                self._answer(f"exit {status}")
                told = True
            patience_s = 1.0 if self._stopping is None or told else _STEP_S
            ready = select.select([self._control, wake], [], [], patience_s)[0]
            if wake in ready:
                os.read(wake, 512)
            if self._control in ready and not self._obey(child):
                return

    @staticmethod
    def _leave_the_terminal() -> None:
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nothing, fd)
        os.close(nothing)

    def _answer(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the runner is gone; its end of the other pipe says so
            os.write(self._report, " ".join(text.split()).encode() + b"\n")

    def _obey(self, child: subprocess.Popen[bytes]) -> bool:
        words = os.read(self._control, 64)
        if not words:
            self._end_all(child)
            return False
        for word in words:
            if word == ord("."):
                return False
            if word == ord("K"):
                self._kill(child)
            elif self._stopping is None:
                self._stop(child)
        return True

    def _stop(self, child: subprocess.Popen[bytes]) -> None:
        if Path("/proc/self").exists():
            self._stopping = Shutdown(child.pid)
        else:
            _signal_group(child, signal.SIGTERM)

    def _kill(self, child: subprocess.Popen[bytes]) -> None:
        """End the training and all that descends from it, W&B's core as well unless it has left."""
        _signal_group(child, signal.SIGKILL)
        if self._stopping is not None:
            self._stopping.end()

    def _end_all(self, child: subprocess.Popen[bytes]) -> None:
        """End every process of the attempt: the runner has died."""
        _signal_group(child, signal.SIGKILL)
        begun = time.monotonic()
        while time.monotonic() < begun + _SWEEP_S:
            left = of_attempt(self._tag, self._spare)
            patient = time.monotonic() < begun + _WANDB_LAST_S
            for process in left:
                if not (process.wandb and patient):
                    send(process, signal.SIGKILL)
            if not left:
                return
            _status_of(child)
            select.select([], [], [], 0.05)


def _status_of(child: subprocess.Popen[bytes]) -> int | None:
    """Return the exit status of the keeper's child, as `subprocess.Popen.returncode`; None while it lives.

    Not `Popen.poll`, to which a child that is held with ptrace looks as if it had ended.
    """
    if child.returncode is None:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid and os.WIFSIGNALED(status):
            child.returncode = -os.WTERMSIG(status)
        elif pid and os.WIFEXITED(status):
            child.returncode = os.WEXITSTATUS(status)
    return child.returncode


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of the group are gone
        os.killpg(child.pid, number)


def _spawn(argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> subprocess.Popen[bytes]:
    out = os.open(str(log), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        return subprocess.Popen(  # noqa: S603 -- running what the person asked for is the purpose
            list(argv),
            env=dict(env),
            cwd=str(cwd),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 -- the keeper has a single thread
        )
    finally:
        os.close(out)


def _die_with(parent: int) -> Callable[[], None]:
    """Return what makes the kernel kill a child when its parent dies (Linux; elsewhere it does nothing)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform.startswith("linux") else None

    def before_exec() -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
            if os.getppid() != parent:
                os._exit(1)

    return before_exec


def _wake_on_child_end() -> int:
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.set_blocking(read, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    return read


LEFTOVERS_S = 5.0
WANDB_S = 5.0
WANDB_ONLINE_S = 60.0
_SURE_S = 30.0
_POLL_S = 0.1


def stop_training(kept: ManagedProcess, wish: StopRequest, pulse: Heartbeat) -> bool:
    """SIGTERM to the training's program, the grace, SIGKILL to all of the training; W&B's core is spared.

    Returns:
        Whether the training exited within its grace.
    """
    kept.terminate()
    deadline = time.monotonic() + wish.grace_s
    while not kept.poll(_POLL_S) and time.monotonic() < deadline:
        pulse.poll()
    in_time = kept.status is not None or kept.keeper_died
    kept.kill()
    sure = time.monotonic() + _SURE_S
    while not kept.poll(_POLL_S) and time.monotonic() < sure:
        pulse.poll()
    return in_time


class ProcessReaper:
    """Ends what is left of an attempt after its training; `killed` counts the processes that had to be ended."""

    def __init__(self, tag: str, spare: frozenset[int], pulse: Heartbeat) -> None:
        self._tag = tag
        self._spare = spare
        self._pulse = pulse
        self._signalled: set[tuple[int, int]] = set()
        self._counted: set[tuple[int, int]] = set()

    @property
    def killed(self) -> int:
        """How many processes of the program (not W&B's own, nor Ray's workers) did not end by themselves."""
        return len(self._counted)

    def after_end(self, *, online: bool) -> None:
        """The training ended by itself: its children get some seconds, W&B's core the time that its uploads take."""
        wandb_s = WANDB_ONLINE_S if online else WANDB_S
        self._wait(own_s=LEFTOVERS_S, wandb_s=wandb_s)
        self._end_own(grace_s=1.0)
        self.end_all()

    def after_stop(self, wish: StopRequest, *, in_time: bool) -> None:
        """The training was stopped: its leftovers get what is left of the grace, W&B's core a few seconds.

        Args:
            wish: the wish that it was stopped for.
            in_time: whether it exited within its grace; else its leftovers are killed at once.
        """
        if in_time:
            self._end_own(grace_s=min(wish.grace_s, LEFTOVERS_S, left_s(wish) / 2))
        else:
            self._end_own(grace_s=0.0, number=signal.SIGKILL)
        self._wait(own_s=0.0, wandb_s=min(WANDB_S, left_s(wish) / 2))
        self.end_all()

    def _wait(self, *, own_s: float, wandb_s: float) -> None:
        begun = time.monotonic()
        while True:
            left = of_attempt(self._tag, self._spare)
            waited = time.monotonic() - begun
            own = waited < own_s and any(not process.wandb and not process.ray for process in left)
            core = waited < wandb_s and any(process.name == "wandb-core" for process in left)
            if not own and not core:
                return
            wish = self._pulse.poll()
            if wish is not None and time.monotonic() >= min(wish.until, begun + WANDB_S):
                return
            time.sleep(_POLL_S)

    def _end_own(self, *, grace_s: float, number: int = signal.SIGTERM) -> None:
        deadline = time.monotonic() + grace_s
        while True:
            left = [process for process in of_attempt(self._tag, self._spare) if not process.wandb]
            for process in left:
                identity = (process.pid, process.ticks)
                if identity not in self._signalled and send(process, number):
                    self._note(process)
            if not left or time.monotonic() >= deadline:
                return
            self._pulse.poll()
            time.sleep(_POLL_S / 2)

    def end_all(self) -> None:
        """SIGKILL to everything of the attempt, until nothing is left."""
        sure = time.monotonic() + _SURE_S
        while time.monotonic() < sure:
            left = of_attempt(self._tag, self._spare)
            if not left:
                return
            for process in left:
                if send(process, signal.SIGKILL):
                    self._note(process)
            self._pulse.poll()
            time.sleep(_POLL_S / 5)

    def _note(self, process: AttemptProcess) -> None:
        identity = (process.pid, process.ticks)
        self._signalled.add(identity)
        if not process.wandb and not process.ray:
            self._counted.add(identity)


def left_s(wish: StopRequest) -> float:
    """Return how much of the time for the whole ending is left, at least a moment."""
    return max(0.4, wish.until - time.monotonic())
