"""What a bring-up is doing: in a notebook lines that are written anew with each step, elsewhere the log."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from typing import Protocol

from raylaunch.cluster.plan import Step
from raylaunch.sdk.display import Steps

_log = logging.getLogger(__name__)

OnStep = Callable[[Step], None]
"""Told each step when it begins, takes long, is done, or had nothing to do."""


def show_steps(cluster: str) -> OnStep:
    """Return what shows the steps of a cluster where this Python runs."""
    display = _notebook_display()
    return LiveSteps(cluster, display) if display else _log_step


class Shown(Protocol):
    """Something that is shown already, and can be replaced."""

    def update(self, shown: object, /) -> None:
        """Show this in its place."""


class LiveSteps:
    """Takes steps, and shows where each host is.

    Args:
        cluster: the cluster's name.
        display: shows something, and returns what replaces it.
    """

    def __init__(self, cluster: str, display: Callable[[object], Shown]) -> None:
        self._steps = Steps(cluster)
        self._display = display
        self._shown: Shown | None = None

    def __call__(self, step: Step) -> None:
        """Take a step."""
        self._steps = self._steps.with_step(step)
        if self._shown is None:
            self._shown = self._display(self._steps)
        else:
            self._shown.update(self._steps)


def _notebook_display() -> Callable[[object], Shown] | None:
    """Return a notebook's own way to show something; None where this is none. IPython is not imported for that."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is None:
        return None
    display = importlib.import_module("IPython.display").display
    return lambda steps: display(steps, display_id=True)


def _log_step(step: Step) -> None:
    _log.info("%s", step)
