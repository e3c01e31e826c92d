"""The probe of one host: a script in one round trip (`script.sh`), and its results as `HostFacts`."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Sequence
from importlib import resources
from typing import Protocol

from raylaunch.cluster.probe.facts import Clock, HostFacts
from raylaunch.cluster.probe.parse import read_facts
from raylaunch.cluster.probe.parse_gpus import ProbeOutput, read_answer
from raylaunch.errors import HostStepError
from raylaunch.models.host_spec import HostSpec

LIMIT_S = 35.0
"""The script ends itself after 20 s and gives up the section that is running then."""

_TAIL = 5


class CommandResult(Protocol):
    """How a command ended."""

    @property
    def status(self) -> int:
        """Its exit status."""
        ...

    @property
    def out(self) -> bytes:
        """What it printed."""
        ...

    @property
    def err(self) -> bytes:
        """What it printed as errors."""
        ...


class CommandRunner(Protocol):
    """A machine that runs commands: `raylaunch.ssh.host.SSHHost`, or this one."""

    @property
    def name(self) -> str:
        """What errors call it."""
        ...

    async def run(self, argv: Sequence[str], /, *, input: bytes, limit_s: float) -> CommandResult:  # noqa: A002 -- the name that subprocess has for it
        """Run a program with `input` on its stdin."""
        ...


async def probe(machine: CommandRunner, host: HostSpec | None = None) -> HostFacts:
    """Collect facts about the machine, without changing anything there.

    Args:
        machine: where.
        host: its entry in cluster.yaml, whose folders and Python are checked.

    Raises:
        HostError: the machine cannot be reached, or its shell does not run the script.
    """
    mark = secrets.token_hex(8)
    about = (host.root, host.store, host.environment) if host else ("", "", "")
    argv = ["sh", "-s", "--", mark, *about]
    sent, began = time.time(), time.monotonic()
    ran = await machine.run(argv, input=script(), limit_s=LIMIT_S)
    took_s = time.monotonic() - began
    answer = read_answer(ran.out, mark)
    if not answer.complete:
        raise _broken(machine.name, ran, answer)
    return read_facts(answer, clock=_clock(answer, sent, sent + took_s), took_s=took_s)


def script() -> bytes:
    """Return the script's text."""
    folder = resources.files("raylaunch.cluster.probe")
    return b"".join(folder.joinpath(name).read_bytes() for name in ("gpus.sh", "python.sh", "script.sh"))


def _clock(answer: ProbeOutput, sent: float, received: float) -> Clock:
    """Compare clocks as NTP does: the host read its clock after we sent, and again before we received."""
    synced = {"yes": True, "no": False}.get(answer["ntp"].one("synced"))
    try:
        first, last = (
            float(answer[f"clock_{which}"].text.replace(".%N", "").rstrip("N.")) for which in ("first", "last")
        )
    except ValueError:
        return Clock(synced=synced)
    if not (math.isfinite(first) and math.isfinite(last)):
        return Clock(synced=synced)
    low, high = last - received, first - sent
    return Clock(offset_s=(low + high) / 2, uncertain_s=abs(high - low) / 2, synced=synced)


def _broken(name: str, ran: CommandResult, answer: ProbeOutput) -> HostStepError:
    printed = (ran.err or ran.out).decode("utf-8", errors="replace").strip().splitlines()[-_TAIL:]
    reached = f"it stopped halfway ({len(answer.sections)} sections came)" if answer.sections else "it did not start"
    msg = f"{name}: the probe's script could not be run: {reached}, exit status {ran.status}"
    hint = "log in with ssh and run: sh -c 'date'; the account needs a POSIX shell at /bin/sh"
    return HostStepError(msg, hint=hint, host=name, step="probe", exit_status=ran.status, tail=tuple(printed))
