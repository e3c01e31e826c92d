"""From a command to a client; notices and steps go to stderr."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TypeVar

import click

from raylaunch import place
from raylaunch.cli.console import is_terminal, note, note_lines, shown_text
from raylaunch.cluster.backends import Step
from raylaunch.cluster.ssh.target import Prompt
from raylaunch.config import load_cluster_file

_Result = TypeVar("_Result")


def finish(work: Coroutine[None, None, _Result]) -> _Result:
    """Run a command's work to its end."""
    return asyncio.run(work)


def show_step(step: Step) -> None:
    """Print a step of ``up`` to stderr when it has done something, or takes long."""
    if step.state in {"done", "note", "waits"}:
        note_lines(str(step))


_ONE_AT_A_TIME = asyncio.Lock()
"""Hosts are asked in parallel; a person is not."""


async def ask_person(prompt: Prompt) -> str | None:
    """Ask the person at the terminal; without one nobody answers, and the error says what to type."""
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


class Place(place.Place):
    """The cluster that a command is about."""

    def __init__(self, cluster_file: Path | None) -> None:
        file = load_cluster_file(cluster_file)
        super().__init__(file.spec, on_notice=note, on_step=show_step, on_prompt=ask_person)
        self.file = file
        self.notes = file.notes
