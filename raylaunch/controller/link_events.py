"""What the link to Ray tells the controller, and the same as the frames in which its child says it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raylaunch.runner.contract import Claim, Ended, Exit, Facts, Started
from raylaunch.spec_parts import Count, ExitCode, Moment


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


class _Exit(BaseModel):
    """`raylaunch.runner.contract.Exit` as it must be, whoever wrote it: an attempt may write into its own folder."""

    model_config = ConfigDict(extra="allow")

    ended: Ended
    exit_code: ExitCode | None = None
    signal: str = ""
    message: str = ""
    failed_rank: Count | None = None
    at: Moment
    by_ray: bool = False
    killed: Count = 0
    oom: bool = False


class _Started(BaseModel):
    """`raylaunch.runner.contract.Started`, as above."""

    model_config = ConfigDict(extra="allow")

    pid: Count
    at: Moment
    gpus: list[str] = Field(default_factory=list)
    ranks: Annotated[int, Field(ge=0, le=1_000_000)] = 1


class _Facts(BaseModel):
    """`raylaunch.runner.contract.Facts`, as above; what is wrong in them is left out with the rest."""

    model_config = ConfigDict(extra="allow")

    python: str = ""
    version: str = ""
    torch: str = ""
    wandb: str = ""
    packages: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    wandb_mode: Literal["online", "offline", "disabled"] = "disabled"
    wandb_why: str = ""
    wandb_url: str = ""
    wandb_run: str = ""
    wandb_runs: list[str] = Field(default_factory=list)
    wandb_staged: Count = 0


def exit_from(value: object, *, now: float) -> Exit | None:
    """Return how an attempt ended, from what its folder says; that it cannot be read is an end too."""
    if value is None:
        return None
    try:
        return cast("Exit", _Exit.model_validate(value).model_dump())
    except ValidationError:
        message = "what it wrote about its end cannot be read"
        return cast("Exit", _Exit(ended="runner_error", message=message, at=now).model_dump())


def started_from(value: object) -> Started | None:
    """Return that an attempt's training has started, from what its folder says."""
    try:
        return None if value is None else cast("Started", _Started.model_validate(value).model_dump())
    except ValidationError:
        return None


def facts_from(value: object) -> Facts | None:
    """Return what an attempt's runner found, from what its folder says."""
    try:
        return None if value is None else cast("Facts", _Facts.model_validate(value).model_dump(exclude_unset=True))
    except ValidationError:
        return None


def event_frame(event: LinkEvent) -> dict[str, object]:
    """Return an event as the child sends it."""
    name = next(name for name, kind in _EVENTS.items() if kind is type(event))
    return {"event": name, **asdict(event)}


def event_from(frame: dict[str, object]) -> LinkEvent:
    """Return the event that a frame carries."""
    fields = dict(frame)
    if fields["event"] == "attempt":
        fields["exit"] = exit_from(fields["exit"], now=time.time())
        fields["started"] = started_from(fields["started"])
        fields["facts"] = facts_from(fields["facts"])
    return _EVENTS[cast("str", fields.pop("event"))](**fields)
