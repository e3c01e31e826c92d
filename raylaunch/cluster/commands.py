"""Programs on this machine, run under a time limit. If the call is cancelled, they are ended with their children.

On Linux they also end when this process is killed: an orphan must not keep writing into folders that the next command
cleans.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio

from raylaunch.errors import ClusterStartError, HostStepError, HostTimeoutError

_DIES_WITH_US = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[3:])
"""
"""Asks the kernel for SIGKILL (9) at the parent's death (1: PR_SET_PDEATHSIG), then becomes the program.

A function that `subprocess` runs before it starts the program would do the same, but is not safe with threads.
"""


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended, and what it printed."""

    status: int
    out: bytes
    err: bytes
    """Empty if it was sent to `out` too."""

    @property
    def text(self) -> str:
        """`out` as text."""
        return self.out.decode(errors="replace")


async def run_program(  # noqa: PLR0913 -- each is one fact, and all are named
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    limit_s: float,
    step: str,
    input: bytes = b"",  # noqa: A002 -- as in subprocess
) -> ProgramResult:
    """Run a program; return how it ended.

    Raises:
        ClusterStartError: it cannot be started, or has not ended after `limit_s` seconds.
    """
    try:
        with anyio.fail_after(limit_s):
            return await _ended(argv, input, cwd=cwd, env=env, stderr=subprocess.STDOUT)
    except TimeoutError:
        msg = f"{' '.join(argv[:3])} … has not ended after {limit_s:.0f} s"
        raise ClusterStartError(
            msg, hint="run the same command again; completed steps are skipped", step=step
        ) from None
    except OSError as error:  # after TimeoutError, which is one
        msg = f"{argv[0]} cannot be started: {error.strerror or error}"
        raise ClusterStartError(msg, step=step) from None


async def _ended(argv: Sequence[str], given: bytes, *, cwd: Path, env: Mapping[str, str], stderr: int) -> ProgramResult:
    process = await asyncio.create_subprocess_exec(
        *_bound_to_us(argv, env),
        cwd=cwd,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )
    try:
        out, err = await process.communicate(given)  # also if the program exits without reading its input
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with anyio.CancelScope(shield=True):
            await process.wait()
        raise
    return ProgramResult(await process.wait(), out, err or b"")


def _bound_to_us(argv: Sequence[str], env: Mapping[str, str]) -> Sequence[str]:
    if not sys.platform.startswith("linux"):
        return argv
    program = shutil.which(argv[0], path=env.get("PATH", os.defpath))
    if program is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
    return [sys.executable, "-I", "-S", "-c", _DIES_WITH_US, str(os.getpid()), program, *argv]


@dataclass(frozen=True)
class LocalHost:
    """Runs commands on this machine. `name` is its name in errors."""

    name: str = "this machine"

    async def run(self, argv: Sequence[str], /, *, input: bytes = b"", limit_s: float) -> ProgramResult:  # noqa: A002 -- as in subprocess
        """Run a program with `input` on its stdin.

        Raises:
            HostStepError: there is no such program.
            HostTimeoutError: it did not end within `limit_s`, and was ended.
        """
        try:
            with anyio.fail_after(limit_s):
                return await _ended(argv, input, cwd=Path.cwd(), env=os.environ, stderr=subprocess.PIPE)
        except TimeoutError:
            msg = f"{self.name}: {argv[0]} did not end within {limit_s:.0f} s"
            raise HostTimeoutError(msg, host=self.name, step=argv[0]) from None
        except OSError as error:
            msg = f"{self.name}: {argv[0]} cannot be started: {error.strerror}"
            raise HostStepError(msg, host=self.name, step=argv[0]) from None
