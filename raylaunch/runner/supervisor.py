"""Starting, stopping and cleaning up the training: its supervisor process, and the reaper of what it leaves running.

The supervisor is the training's parent. It is detached (two forks, its own session), so the training is not a
descendant of the Ray job's driver. Ray's stop signals every descendant of the driver, W&B's core too, which then drops
its buffer; detached, only the runner receives the signal and stops the training in order. When the runner is killed,
its end of a pipe closes, and the supervisor kills every process of the attempt at once.

The runner sends single bytes: ``T`` requests the training to stop (see `raylaunch.runner.shutdown`), ``K`` kills all of
it, ``.`` means that everything has ended. The supervisor replies ``pid N`` or ``error TEXT``, and later ``exit STATUS``
(as `subprocess.Popen.returncode`).
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
from raylaunch.runner.processes import AttemptProcess, attempt_processes, send_signal
from raylaunch.runner.shutdown import Shutdown

LEFTOVERS_S = 5.0
"""How long the training's children may run on after it."""
WANDB_S = 5.0
WANDB_ONLINE_S = 60.0
"""How long W&B's core may write: after a stop or offline, and while it uploads."""
_KILL_S = 30.0
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1
_WANDB_LAST_S = 1.0
_STEP_S = 0.02
_KILL_ALL_S = 20.0


class StartError(Exception):
    """The training's program could not be started; the text is the system's."""


class ManagedProcess:
    """The training under its supervisor."""

    def __init__(self, pid: int, control: int, report: int) -> None:
        self.pid = pid
        self._control = control
        self._report = report
        self._text = b""
        self.status: int | None = None
        """As `subprocess.Popen.returncode`, once it has ended."""
        self.supervisor_died = False

    def poll(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` for the training to end; True when it has ended."""
        if self.status is not None or self.supervisor_died:
            return True
        if not select.select([self._report], [], [], timeout_s)[0]:
            return False
        data = os.read(self._report, 4096)
        self._text += data
        if b"\n" in self._text:
            self.status = int(self._text.split()[1])
        elif not data:
            self.supervisor_died = True
        return self.status is not None or self.supervisor_died

    def wait(self, timeout_s: float, heartbeat: Heartbeat) -> bool:
        """Wait for the training to end while the heartbeat continues; True when it has ended."""
        deadline = time.monotonic() + timeout_s
        while not (ended := self.poll(_POLL_S)) and time.monotonic() < deadline:
            heartbeat.poll()
        return ended

    def terminate(self) -> None:
        """Send SIGTERM to the training's program; its launchers are held meanwhile."""
        self._write(b"T")

    def kill(self) -> None:
        """Send SIGKILL to the training and all that it started."""
        self._write(b"K")

    def release(self) -> None:
        """Let the supervisor exit: every process of the attempt has ended."""
        self._write(b".")
        os.close(self._control)
        os.close(self._report)

    def _write(self, command: bytes) -> None:
        try:
            os.write(self._control, command)
        except BrokenPipeError:
            self.supervisor_died = True


def start(  # noqa: PLR0913 -- what a process needs
    argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path, tag: str, spare: frozenset[int]
) -> ManagedProcess:
    """Start the training under a supervisor; its output goes straight into `log`.

    The caller must have a single thread, for this forks.

    Raises:
        StartError: the program cannot be executed.
    """
    control_read, control_write = os.pipe()
    report_read, report_write = os.pipe()
    sys.stdout.flush()
    middle = os.fork()
    if middle == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                os.close(control_write)
                os.close(report_read)
                _Supervisor(control_read, report_write, tag, spare).run(argv, env, cwd, log)
        finally:
            os._exit(0)
    os.close(control_read)
    os.close(report_write)
    os.waitpid(middle, 0)
    with os.fdopen(report_read, "rb", buffering=0, closefd=False) as report:
        word, _, rest = report.readline().decode("utf-8", "replace").strip().partition(" ")
    if word != "pid":
        os.close(control_write)
        os.close(report_read)
        raise StartError(rest or "its supervisor exited before it started")
    return ManagedProcess(int(rest), control_write, report_read)


def stop_training(process: ManagedProcess, request: StopRequest, heartbeat: Heartbeat) -> bool:
    """Send SIGTERM to the training's program and, after the grace period, SIGKILL to all of it but W&B's core.

    Returns:
        Whether the training exited within its grace period.
    """
    process.terminate()
    in_time = process.wait(request.grace_s, heartbeat)
    process.kill()
    process.wait(_KILL_S, heartbeat)
    return in_time


class ProcessReaper:
    """Ends what is left of an attempt after its training; `killed` counts the processes that had to be killed."""

    def __init__(self, tag: str, spare: frozenset[int], heartbeat: Heartbeat) -> None:
        self._tag = tag
        self._spare = spare
        self._heartbeat = heartbeat
        self._signalled: set[tuple[int, int]] = set()
        self._counted: set[tuple[int, int]] = set()

    @property
    def killed(self) -> int:
        """How many processes of the program (not W&B's, nor Ray's workers) did not exit by themselves."""
        return len(self._counted)

    def after_end(self, *, online: bool) -> None:
        """Clean up after a training that ended by itself: its children get seconds, W&B's core the time to upload."""
        wandb_s = WANDB_ONLINE_S if online else WANDB_S
        self._wait(own_s=LEFTOVERS_S, wandb_s=wandb_s)
        self._end(within_s=1.0)
        self.end_all()

    def after_stop(self, request: StopRequest, *, in_time: bool) -> None:
        """Clean up after a stop: leftovers get the rest of the grace period, W&B's core a few seconds.

        Args:
            request: the stop request.
            in_time: whether it exited within its grace period; else its leftovers are killed at once.
        """
        if in_time:
            self._end(within_s=min(request.grace_s, LEFTOVERS_S, request.remaining_s / 2))
        else:
            self._end(within_s=0.0, number=signal.SIGKILL)
        self._wait(own_s=0.0, wandb_s=min(WANDB_S, request.remaining_s / 2))
        self.end_all()

    def _wait(self, *, own_s: float, wandb_s: float) -> None:
        started = time.monotonic()
        while True:
            left = attempt_processes(self._tag, self._spare)
            waited = time.monotonic() - started
            own = waited < own_s and any(not process.wandb and not process.ray for process in left)
            core = waited < wandb_s and any(process.name == "wandb-core" for process in left)
            if not own and not core:
                return
            request = self._heartbeat.poll()
            if request is not None and time.monotonic() >= min(request.until, started + WANDB_S):
                return
            time.sleep(_POLL_S)

    def end_all(self) -> None:
        """Send SIGKILL to everything of the attempt, until nothing is left."""
        self._end(within_s=_KILL_S, number=signal.SIGKILL, wandb=True)

    def _end(self, *, within_s: float, number: int = signal.SIGTERM, wandb: bool = False) -> None:
        """Send a signal once to each process, SIGKILL repeatedly, until all have exited or the time is up."""
        deadline = time.monotonic() + within_s
        while True:
            left = [process for process in attempt_processes(self._tag, self._spare) if wandb or not process.wandb]
            for process in left:
                new = (process.pid, process.ticks) not in self._signalled
                if (new or number == signal.SIGKILL) and send_signal(process, number):
                    self._count(process)
            if not left or time.monotonic() >= deadline:
                return
            self._heartbeat.poll()
            time.sleep(_POLL_S / 5)

    def _count(self, process: AttemptProcess) -> None:
        identity = (process.pid, process.ticks)
        self._signalled.add(identity)
        if not process.wandb and not process.ray:
            self._counted.add(identity)


class _Supervisor:
    def __init__(self, control: int, report: int, tag: str, spare: frozenset[int]) -> None:
        self._control = control
        self._report = report
        self._tag = tag
        self._spare = spare | {os.getpid()}
        self._shutdown: Shutdown | None = None

    def run(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._detach_from_terminal()
        try:
            child = _spawn(argv, env, cwd, log)
        except (OSError, subprocess.SubprocessError) as error:
            self._reply(f"error {error}")
            return
        self._reply(f"pid {child.pid}")
        reported = False
        wake = _wake_on_child_end()
        while True:
            if self._shutdown is not None:
                self._shutdown.step()
            status = _exit_status(child) if not reported else None
            if status is not None:
                self._reply(f"exit {status}")
                reported = True
            timeout_s = 1.0 if self._shutdown is None or reported else _STEP_S
            ready = select.select([self._control, wake], [], [], timeout_s)[0]
            if wake in ready:
                os.read(wake, 512)
            if self._control in ready and not self._handle_commands(child):
                return

    @staticmethod
    def _detach_from_terminal() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)

    def _reply(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # the runner has exited; the other pipe reports that
            os.write(self._report, " ".join(text.split()).encode() + b"\n")

    def _handle_commands(self, child: subprocess.Popen[bytes]) -> bool:
        commands = os.read(self._control, 64)
        if not commands:
            self._end_all(child)
            return False
        for command in commands:
            if command == ord("."):
                return False
            if command == ord("K"):
                self._kill(child)
            elif self._shutdown is None:
                self._stop(child)
        return True

    def _stop(self, child: subprocess.Popen[bytes]) -> None:
        if Path("/proc/self").exists():
            self._shutdown = Shutdown(child.pid)
        else:
            _signal_group(child, signal.SIGTERM)

    def _kill(self, child: subprocess.Popen[bytes]) -> None:
        """Kill the training and its descendants, including W&B's core unless that detached."""
        _signal_group(child, signal.SIGKILL)
        if self._shutdown is not None:
            self._shutdown.end()

    def _end_all(self, child: subprocess.Popen[bytes]) -> None:
        """Kill every process of the attempt: the runner has died."""
        _signal_group(child, signal.SIGKILL)
        started = time.monotonic()
        while time.monotonic() < started + _KILL_ALL_S:
            left = attempt_processes(self._tag, self._spare)
            wandb_may_write = time.monotonic() < started + _WANDB_LAST_S
            for process in left:
                if not (process.wandb and wandb_may_write):
                    send_signal(process, signal.SIGKILL)
            if not left:
                return
            _exit_status(child)
            select.select([], [], [], 0.05)


def _exit_status(child: subprocess.Popen[bytes]) -> int | None:
    """Return the exit status of the supervised child, as `subprocess.Popen.returncode`; None while it lives.

    Not `Popen.poll`, to which a child that is held with ptrace appears to have ended.
    """
    if child.returncode is None:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if pid and os.WIFSIGNALED(status):
            child.returncode = -os.WTERMSIG(status)
        elif pid and os.WIFEXITED(status):
            child.returncode = os.WEXITSTATUS(status)
    return child.returncode


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the whole group has exited
        os.killpg(child.pid, number)


def _spawn(argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> subprocess.Popen[bytes]:
    out = os.open(str(log), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        return subprocess.Popen(  # noqa: S603 -- running the command of the job is the purpose
            list(argv),
            env=dict(env),
            cwd=str(cwd),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=_killed_with(os.getpid()),  # noqa: PLW1509 -- the supervisor has a single thread
        )
    finally:
        os.close(out)


def _killed_with(parent: int) -> Callable[[], None]:
    """Return a hook with which the kernel kills a child when its parent dies (Linux; elsewhere it does nothing)."""
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
