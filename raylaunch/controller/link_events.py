"""What the link to Ray tells the controller, and the same as the frames in which its child says it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import cast

from raylaunch.runner.contract import Claim, Exit, Facts, Started


@dataclass(frozen=True)
class LinkUp:
    """The child is connected to Ray."""

    ray_version: str


@dataclass(frozen=True)
class LinkDown:
    """The child is gone, or could not connect. It is started again by itself; `why` is for people."""

    why: str


@dataclass(frozen=True)
class NodesChanged:
    """A node joined or was lost, a steward came or went, or free resources changed: ask `Link.nodes`."""


@dataclass(frozen=True)
class AttemptSeen:
    """What a steward sees of one attempt on its node: sent once after each connection, and whenever it changes."""

    node_id: str
    attempt: str
    claim: Claim | None
    started: Started | None
    facts: Facts | None
    exit: Exit | None
    runner_alive: bool
    """Whether the process named by the claim lives. False also before there is a claim."""


@dataclass(frozen=True)
class Grew:
    """A file of an attempt has more bytes in the store. Logs, W&B files and progress grow; `size` is the size there."""

    attempt: str
    path: str
    size: int


@dataclass(frozen=True)
class Stored:
    """A file of an attempt is whole in the store, with this checksum. It is said again when the file changes."""

    attempt: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class StoreProblem:
    """The store cannot be written (disk full, as a rule). It is tried again; nothing is lost on the node.

    An empty `message` says that writing works again.
    """

    attempt: str
    message: str


LinkEvent = LinkUp | LinkDown | NodesChanged | AttemptSeen | Grew | Stored | StoreProblem

_EVENTS: dict[str, Callable[..., LinkEvent]] = {
    "up": LinkUp,
    "nodes": NodesChanged,
    "attempt": AttemptSeen,
    "grew": Grew,
    "stored": Stored,
    "store_problem": StoreProblem,
}


def event_frame(event: LinkEvent) -> dict[str, object]:
    """Return an event as the child sends it."""
    name = next(name for name, kind in _EVENTS.items() if kind is type(event))
    return {"event": name, **asdict(event)}


def event_from(frame: dict[str, object]) -> LinkEvent:
    """Return the event that a frame carries."""
    fields = dict(frame)
    return _EVENTS[cast("str", fields.pop("event"))](**fields)
