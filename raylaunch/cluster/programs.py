"""Programs that are run on this machine to their end, under a limit. Cancelled, they are ended with their children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio

from raylaunch.errors import ClusterStartError


@dataclass(frozen=True)
class Ran:
    """How a program ended, and all that it printed."""

    status: int
    text: str


async def run_program(  # noqa: PLR0913 -- each is one fact, and all are named
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    limit_s: float,
    step: str,
    input: bytes = b"",  # noqa: A002 -- as subprocess calls it
) -> Ran:
    """Run a program; return how it ended.

    Raises:
        ClusterStartError: it cannot be started, or has not ended after `limit_s` seconds.
    """
    try:
        with anyio.fail_after(limit_s):
            return await _run(argv, cwd, env, input)
    except OSError as error:
        msg = f"{argv[0]} cannot be started: {error.strerror or error}"
        raise ClusterStartError(msg, step=step) from None
    except TimeoutError:
        msg = f"{' '.join(argv[:3])} … has not ended after {limit_s:.0f} s"
        raise ClusterStartError(
            msg, hint="run the same command again: what is done is not done again", step=step
        ) from None


async def _run(argv: Sequence[str], cwd: Path, env: Mapping[str, str], body: bytes) -> Ran:
    process = await anyio.open_process(
        argv, cwd=cwd, env=dict(env), stdin=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        async with process:
            assert process.stdin is not None  # noqa: S101 -- both are pipes
            assert process.stdout is not None  # noqa: S101 -- as above
            with contextlib.suppress(anyio.BrokenResourceError):
                await process.stdin.send(body)
            await process.stdin.aclose()
            printed = b"".join([chunk async for chunk in process.stdout])
            return Ran(await process.wait(), printed.decode(errors="replace"))
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
