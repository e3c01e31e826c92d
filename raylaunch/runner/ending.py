"""Ending an attempt: the training first, then all that it has left behind, W&B's core last, for it still writes."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from raylaunch.runner.processes import Found, of_attempt, send
from raylaunch.runner.watch import Pulse, Wish

if TYPE_CHECKING:
    from raylaunch.runner.keeper import Kept

LEFTOVERS_S = 5.0
WANDB_S = 5.0
WANDB_ONLINE_S = 60.0
_SURE_S = 30.0
_POLL_S = 0.1


def stop_training(kept: Kept, wish: Wish, pulse: Pulse) -> bool:
    """SIGTERM to the training's program, the grace, SIGKILL to all of the training; W&B's core is spared.

    Returns:
        Whether the training exited within its grace.
    """
    kept.terminate()
    deadline = time.monotonic() + wish.grace_s
    while not kept.poll(_POLL_S) and time.monotonic() < deadline:
        pulse.poll()
    in_time = kept.status is not None or kept.keeper_died
    kept.kill()
    sure = time.monotonic() + _SURE_S
    while not kept.poll(_POLL_S) and time.monotonic() < sure:
        pulse.poll()
    return in_time


class Sweep:
    """Ends what is left of an attempt after its training; `killed` counts the processes that had to be ended."""

    def __init__(self, tag: str, spare: frozenset[int], pulse: Pulse) -> None:
        self._tag = tag
        self._spare = spare
        self._pulse = pulse
        self._signalled: set[tuple[int, int]] = set()
        self._counted: set[tuple[int, int]] = set()

    @property
    def killed(self) -> int:
        """How many processes of the program (not W&B's own, nor Ray's workers) did not end by themselves."""
        return len(self._counted)

    def after_end(self, *, online: bool) -> None:
        """The training ended by itself: its children get some seconds, W&B's core the time that its uploads take."""
        wandb_s = WANDB_ONLINE_S if online else WANDB_S
        self._wait(own_s=LEFTOVERS_S, wandb_s=wandb_s)
        self._end_own(grace_s=1.0)
        self.end_all()

    def after_stop(self, wish: Wish, *, in_time: bool) -> None:
        """The training was stopped: its leftovers get what is left of the grace, W&B's core a few seconds.

        Args:
            wish: the wish that it was stopped for.
            in_time: whether it exited within its grace; else its leftovers are killed at once.
        """
        if in_time:
            self._end_own(grace_s=min(wish.grace_s, LEFTOVERS_S, left_s(wish) / 2))
        else:
            self._end_own(grace_s=0.0, number=signal.SIGKILL)
        self._wait(own_s=0.0, wandb_s=min(WANDB_S, left_s(wish) / 2))
        self.end_all()

    def _wait(self, *, own_s: float, wandb_s: float) -> None:
        begun = time.monotonic()
        while True:
            left = of_attempt(self._tag, self._spare)
            waited = time.monotonic() - begun
            own = waited < own_s and any(not process.wandb and not process.ray for process in left)
            core = waited < wandb_s and any(process.name == "wandb-core" for process in left)
            if not own and not core:
                return
            wish = self._pulse.poll()
            if wish is not None and time.monotonic() >= min(wish.until, begun + WANDB_S):
                return
            time.sleep(_POLL_S)

    def _end_own(self, *, grace_s: float, number: int = signal.SIGTERM) -> None:
        deadline = time.monotonic() + grace_s
        while True:
            left = [process for process in of_attempt(self._tag, self._spare) if not process.wandb]
            for process in left:
                identity = (process.pid, process.ticks)
                if identity not in self._signalled and send(process, number):
                    self._note(process)
            if not left or time.monotonic() >= deadline:
                return
            self._pulse.poll()
            time.sleep(_POLL_S / 2)

    def end_all(self) -> None:
        """SIGKILL to everything of the attempt, until nothing is left."""
        sure = time.monotonic() + _SURE_S
        while time.monotonic() < sure:
            left = of_attempt(self._tag, self._spare)
            if not left:
                return
            for process in left:
                if send(process, signal.SIGKILL):
                    self._note(process)
            self._pulse.poll()
            time.sleep(_POLL_S / 5)

    def _note(self, process: Found) -> None:
        identity = (process.pid, process.ticks)
        self._signalled.add(identity)
        if not process.wandb and not process.ray:
            self._counted.add(identity)


def left_s(wish: Wish) -> float:
    """Return how much of the time for the whole ending is left, at least a moment."""
    return max(0.4, wish.until - time.monotonic())
