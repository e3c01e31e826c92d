"""From a command to a client; notices and steps go to stderr."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import TypeVar

from raylaunch import place
from raylaunch.cli.console import note
from raylaunch.cluster.backends import Step
from raylaunch.config import load_cluster_spec

_Result = TypeVar("_Result")


def finish(work: Coroutine[None, None, _Result]) -> _Result:
    """Run a command's work to its end."""
    return asyncio.run(work)


def show_step(step: Step) -> None:
    """Print a step of ``up`` to stderr when it has done something."""
    if step.state in {"done", "note"}:
        note(str(step))


class Place(place.Place):
    """The cluster that a command is about."""

    def __init__(self, cluster_file: Path | None) -> None:
        super().__init__(load_cluster_spec(cluster_file), on_notice=note, on_step=show_step)
