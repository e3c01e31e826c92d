"""What commands share: options, times, prompts, and the connection to a cluster. Notices and steps go to stderr."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import click

from raylaunch.cli.console import is_terminal, note, note_lines, shown_text
from raylaunch.client.client import Client
from raylaunch.cluster.types import Step
from raylaunch.config.load import load_cluster_file
from raylaunch.errors import SpecError
from raylaunch.models.fields import point_in_time, seconds
from raylaunch.operations import connect
from raylaunch.ssh.target import Prompt

as_json = click.option("--json", "as_json", is_flag=True, help="Print the state as JSON.")
job_argument = click.argument("job", default="last")
attempt_option = click.option(
    "--attempt", type=click.IntRange(1), metavar="N", help="The N-th attempt. Default: the latest."
)
rank_option = click.option("--rank", type=click.IntRange(0), default=0, metavar="R", help="The rank. Default: 0.")


def duration(text: str, *, option: str) -> float:
    """Return a duration from the command line in seconds.

    Raises:
        SpecError: it is not a duration.
    """
    try:
        return float(str(seconds(text)))
    except ValueError as error:
        msg = f"{option}: {error}"
        raise SpecError(msg) from None


def parse_future_time(text: str | None, *, option: str) -> float | None:
    """Return a future time from the command line in seconds since the epoch; None if it was not given.

    Raises:
        SpecError: it is not a time, or is in the past.
    """
    if text is None:
        return None
    now = datetime.fromtimestamp(time.time(), timezone.utc).astimezone()
    try:
        return point_in_time(text, now=now).timestamp()
    except ValueError as error:
        raise SpecError(str(error), field=option) from None


_Result = TypeVar("_Result")


def finish(work: Coroutine[None, None, _Result]) -> _Result:
    """Run a command's work to its end."""
    return asyncio.run(work)


def show_step(step: Step) -> None:
    """Print a step of ``up`` to stderr when it has done something or takes long."""
    if step.state in {"done", "note", "waits"}:
        note_lines(str(step))


_ONE_AT_A_TIME = asyncio.Lock()
"""Hosts are contacted in parallel; prompts come one at a time."""


async def ask_person(prompt: Prompt) -> str | None:
    """Prompt on the terminal; without one return None, and the error says what to type."""
    if not is_terminal(sys.stdin):
        return None
    secret = prompt.kind == "passphrase"
    async with _ONE_AT_A_TIME:
        return str(
            await asyncio.to_thread(
                click.prompt,
                shown_text(prompt.text),
                hide_input=secret,
                default="",
                show_default=False,
                prompt_suffix="",
                err=True,
            )
        )


class ClusterCommand(connect.ClusterConnection):
    """The cluster that a command works on."""

    def __init__(self, cluster_file: Path | None) -> None:
        file = load_cluster_file(cluster_file)
        super().__init__(file.spec, on_notice=note, on_step=show_step, on_prompt=ask_person)
        self.file = file
        self.notes = file.notes


def request(cluster_file: Path | None, verb: Callable[[Client], Awaitable[_Result]]) -> _Result:
    """Connect to the cluster of a command, run one verb of its client, and return the result."""

    async def work() -> _Result:
        async with ClusterCommand(cluster_file).client() as client:
            return await verb(client)

    return finish(work())
