"""What holds the lock of a host's wheels while they are pushed, and unpacks those that came in one piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from raylaunch.cluster.installer_call import LOADER, Answer, Interpreter, OnStep, installer_error, installer_input
from raylaunch.cluster.plan import Step
from raylaunch.cluster.ssh import Machine
from raylaunch.cluster.ssh_talk import Talk, step_error

PUSH_S = 6 * 3600.0
_STEP = "push"
_BEAT_S = 5.0


class Receiver:
    """The installer on the host, waiting for wheels."""

    def __init__(self, machine: Machine, talk: Talk, on_step: OnStep) -> None:
        self._machine = machine
        self._talk = talk
        self._tell = on_step
        self._answers = self._read()

    async def unpack(self, bundle: str) -> None:
        """Have a bundle that was pushed unpacked.

        Raises:
            HostError: the disk is full, or the host was lost.
            TransferError: it is damaged.
        """
        await self._talk.send(bundle.encode() + b"\n")
        await self.wait_for("unpacked")

    async def wait_for(self, state: str) -> None:
        """Wait until it says that it has come so far; another client may be pushing before."""
        async for answer in self._answers:
            if answer.error:
                raise installer_error(self._machine, answer.error)
            if answer.state == state:
                return
            if answer.state == "waits":
                self._tell(Step(_STEP, "waits", "waits for another client that pushes to the same host"))
        status, err = await self._talk.end()
        raise step_error(self._machine.name, _STEP, status, b"", err)

    async def _read(self) -> AsyncIterator[Answer]:
        held = b""
        async for data in self._talk.chunks():
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                yield Answer.read(line)

    async def end(self) -> None:
        """Let it free the lock and end."""
        self._talk.close_input()
        async for _ in self._answers:
            pass
        await self._talk.end()


@asynccontextmanager
async def receiving(machine: Machine, interpreter: Interpreter, root: str, on_step: OnStep) -> AsyncIterator[Receiver]:
    """Hold the lock of the host's wheels.

    Raises:
        HostError: the host was lost, or its disk cannot be written.
    """
    request = {"verb": "receive", "root": root, "name": ""}
    async with machine.talk(interpreter.runs(LOADER), limit_s=PUSH_S, step=_STEP) as talk:
        await talk.send(installer_input(request))
        receiver = Receiver(machine, talk, on_step)
        await receiver.wait_for("holds")
        beating = asyncio.ensure_future(_beat(talk))
        try:
            yield receiver
        finally:
            beating.cancel()
        await receiver.end()


async def _beat(talk: Talk) -> None:
    """Show that the client lives: where a link is cut, the host may not notice for hours."""
    while True:
        await anyio.sleep(_BEAT_S)
        await talk.send(b"\n")
