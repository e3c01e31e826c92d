"""The bars: what a figure must not exceed. `make bench` ends with exit status 1 when one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.measure import Result


@dataclass(frozen=True)
class Bar:
    """A limit on the ratio to the peer's figure, on our figure itself, or on what it is above the peer's."""

    on: Literal["ratio", "figure", "excess"]
    most: float
    goal: float | None = None
    """What would be good, below the limit."""
    promised: bool = True
    """Whether the project's plan names it; the others are set here, to see what becomes worse."""

    def value(self, result: Result) -> float:
        """Return what the bar is about."""
        if self.on == "ratio":
            if result.ratio is None:
                msg = f"{result.name} has a bar on its ratio, and no peer"
                raise ValueError(msg)
            return result.ratio
        return result.figure if self.on == "figure" else result.excess

    def met(self, result: Result) -> bool:
        """Whether the result is within it."""
        return self.value(result) <= self.most


BARS = {
    "list": Bar("ratio", 0.45, goal=0.25),
    "list_help": Bar("ratio", 0.5, promised=False),
    "first_line": Bar("ratio", 1.3),
    "log_tail": Bar("ratio", 0.01),
    "followed_line": Bar("figure", 0.3),
    "page_10000": Bar("figure", 50),
    "controller_memory": Bar("figure", 200),
    "queue_end": Bar("figure", 20),
    "queue_list": Bar("figure", 100),
    "queue_show": Bar("figure", 100),
    "wandb_overhead": Bar("ratio", 1.02),
    "mcp_start": Bar("ratio", 1.25),
    "mcp_call": Bar("excess", 10),
    "mcp_tools_list": Bar("figure", 9),
    "pack_time": Bar("ratio", 1.5, promised=False),
    "pack_size": Bar("ratio", 0.5, promised=False),
    "tunnel_verb": Bar("excess", 50),
    "probe_and_plan": Bar("ratio", 2.0),
    "up_healthy": Bar("figure", 5),
    "up_fresh": Bar("ratio", 1.0),
    "download": Bar("ratio", 1.0),
    "push_wheels": Bar("ratio", 1 / 0.9),
    "push_wheels_to_four": Bar("ratio", 1 / 0.9),
    "push_wheels_far": Bar("ratio", 1.0),
}
