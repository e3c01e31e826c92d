"""This machine, asked as a host over SSH is: the same commands, without a connection."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from raylaunch.errors import HostStepError, HostTimeoutError


@dataclass(frozen=True)
class Ran:
    """What became of a command here."""

    status: int
    out: bytes
    err: bytes


@dataclass(frozen=True)
class ThisMachine:
    """Runs commands here. `name` is what errors call it."""

    name: str = "this machine"

    async def run(self, argv: Sequence[str], /, *, input: bytes = b"", limit_s: float) -> Ran:  # noqa: A002 -- the name that subprocess has for it
        """Run a program with `input` on its stdin.

        Raises:
            HostStepError: there is no such program.
            HostTimeoutError: it did not end within `limit_s`, and was ended.
        """
        try:
            with anyio.fail_after(limit_s):
                return await _ended(argv, input)
        except TimeoutError:
            msg = f"{self.name}: {argv[0]} did not end within {limit_s:.0f} s"
            raise HostTimeoutError(msg, host=self.name, step=argv[0]) from None
        except OSError as error:
            msg = f"{self.name}: {argv[0]} cannot be started: {error.strerror}"
            raise HostStepError(msg, host=self.name, step=argv[0]) from None


async def _ended(argv: Sequence[str], given: bytes) -> Ran:
    pipe = subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        out, err = await process.communicate(given)  # also of a program that ends without reading what it is given
    finally:
        if process.returncode is None:
            process.kill()
            with anyio.CancelScope(shield=True):
                await process.wait()
    return Ran(await process.wait(), out, err)
