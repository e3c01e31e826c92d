"""The protocol between controller and bridge process: events, frames, the child's pipes, and how the child is started.

Frames are lines of JSON. What attempts wrote themselves is validated here before the controller uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NoReturn, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raylaunch.contract import Claim, Ended, Exit, Facts, Started
from raylaunch.errors import RaylaunchError
from raylaunch.files import rotate
from raylaunch.models.fields import Count, ExitCode, Moment

_MAX_PENDING = 64 * 1024 * 1024
"""Bytes of frames that may wait for the controller to read them."""
_FLUSH_S, _POLL_S = 2.0, 0.01
_CLOSE_S = 5.0


@dataclass(frozen=True)
class LinkUp:
    """The child is connected to Ray."""

    ray_version: str


@dataclass(frozen=True)
class LinkDown:
    """The child has exited, or could not connect. It is restarted automatically; `why` is for people."""

    why: str


@dataclass(frozen=True)
class NodesChanged:
    """A node joined or was lost, an agent started or stopped, or free resources changed: see `RayBridge.nodes`."""


@dataclass(frozen=True)
class ObservedAttempt:
    """An attempt as the agent observes it: sent after each connection, and whenever it changes."""

    node_id: str
    attempt: str
    claim: Claim | None
    started: Started | None
    facts: Facts | None
    exit: Exit | None
    runner_alive: bool
    """Whether the process of the claim is alive. False also before there is a claim."""


@dataclass(frozen=True)
class Grew:
    """A growing file of an attempt (log, W&B file, progress) has more bytes in the store; `size` is its size there."""

    attempt: str
    path: str
    size: int


@dataclass(frozen=True)
class Stored:
    """A file of an attempt is complete in the store, with this checksum. Sent again when the file changes."""

    attempt: str
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class StoreProblem:
    """The store cannot be written, usually because its disk is full. Writing is retried; nothing is lost on the node.

    An empty `message` reports that writing works again.
    """

    attempt: str
    message: str


LinkEvent = LinkUp | LinkDown | NodesChanged | ObservedAttempt | Grew | Stored | StoreProblem

_EVENTS: dict[str, Callable[..., LinkEvent]] = {
    "up": LinkUp,
    "nodes": NodesChanged,
    "attempt": ObservedAttempt,
    "grew": Grew,
    "stored": Stored,
    "store_problem": StoreProblem,
}


class _Exit(BaseModel):
    """Validates `raylaunch.contract.Exit`: an attempt may write into its own folder."""

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
    """Validates `raylaunch.contract.Started`."""

    model_config = ConfigDict(extra="allow")

    pid: Count
    at: Moment
    gpus: list[str] = Field(default_factory=list)
    ranks: Annotated[int, Field(ge=0, le=1_000_000)] = 1


class _Facts(BaseModel):
    """Validates `raylaunch.contract.Facts`; if one field is invalid, all are dropped."""

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
    """Return the exit facts from an attempt's folder; unreadable ones count as an end too."""
    if value is None:
        return None
    try:
        return cast("Exit", _Exit.model_validate(value).model_dump())
    except ValidationError:
        message = "its exit facts cannot be read"
        return cast("Exit", _Exit(ended="runner_error", message=message, at=now).model_dump())


def started_from(value: object) -> Started | None:
    """Return the start facts from an attempt's folder."""
    try:
        return None if value is None else cast("Started", _Started.model_validate(value).model_dump())
    except ValidationError:
        return None


def facts_from(value: object) -> Facts | None:
    """Return the runner's environment facts from an attempt's folder."""
    try:
        return None if value is None else cast("Facts", _Facts.model_validate(value).model_dump(exclude_unset=True))
    except ValidationError:
        return None


def event_frame(event: LinkEvent) -> dict[str, object]:
    """Return the frame of an event."""
    name = next(name for name, kind in _EVENTS.items() if kind is type(event))
    return {"event": name, **asdict(event)}


def event_from(frame: dict[str, object]) -> LinkEvent:
    """Return the event in a frame."""
    fields = dict(frame)
    if fields["event"] == "attempt":
        fields["exit"] = exit_from(fields["exit"], now=time.time())
        fields["started"] = started_from(fields["started"])
        fields["facts"] = facts_from(fields["facts"])
    return _EVENTS[cast("str", fields.pop("event"))](**fields)


class Stdout:
    """Writes frames to the controller. Ray's core may print to descriptor 1, so the pipe is moved to another.

    A thread writes: a controller that does not read for a while must not block this process.
    """

    def __init__(self) -> None:
        self._file: BinaryIO = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        self._lines: queue.Queue[bytes] = queue.Queue()
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        threading.Thread(target=self._write, name="stdout", daemon=True).start()

    def send(self, frame: Mapping[str, object]) -> None:
        """Queue one frame for writing."""
        line = json.dumps(frame, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._waiting_bytes += len(line)
            too_many = self._waiting_bytes > _MAX_PENDING
        if too_many:  # the controller hangs; the next one starts another child and gets everything again
            os._exit(1)
        self._lines.put(line)

    def fail(self, why: str) -> NoReturn:
        """Report why the connection is down, and exit soon even if Ray's own threads hang."""
        self.send({"event": "down", "why": why})
        until = time.monotonic() + _FLUSH_S
        while self._waiting_bytes and time.monotonic() < until:
            time.sleep(_POLL_S)
        os._exit(1)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            try:
                self._file.write(line)
                self._file.flush()
            except OSError:
                os._exit(0)
            with self._lock:
                self._waiting_bytes -= len(line)


class Stdin:
    """Reads the controller's frames. EOF means that the controller has exited; this process exits immediately."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def next(self) -> dict[str, object]:
        """Wait for the next frame, and return it."""
        return cast("dict[str, object]", json.loads(self._lines.get()))

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._lines.put(line)
        os._exit(0)


async def serve_all(methods: Mapping[str, Callable[..., Awaitable[object]]], stdin: Stdin, stdout: Stdout) -> None:
    """Serve requests, each in its own task, until cancelled."""
    tasks: set[asyncio.Task[None]] = set()
    while True:
        task = asyncio.create_task(_serve(methods, await asyncio.to_thread(stdin.next), stdout))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _serve(
    methods: Mapping[str, Callable[..., Awaitable[object]]], request: Mapping[str, object], stdout: Stdout
) -> None:
    answer: dict[str, object]
    try:
        method = methods[str(request["method"])]
        params = cast("dict[str, object]", request["params"])
        answer = {"result": await method(**params)}
    except RaylaunchError as error:
        answer = {"error": _error_frame(error)}
    except Exception as error:  # noqa: BLE001 -- the top of one request
        traceback.print_exc()
        message = f"the bridge failed at {request['method']}: {str(error).partition(chr(10))[0]}"
        answer = {"error": _error_frame(RaylaunchError(message, hint="see link.log in the store"))}
    stdout.send({"id": request["id"], **answer})


def _error_frame(error: RaylaunchError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "hint": error.hint}


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[int]:
    """Open the log file for the child's stderr."""
    rotate(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


async def end(child: asyncio.subprocess.Process) -> None:
    """Stop the child: close its stdin, and send SIGKILL if it does not exit in time."""
    if child.stdin is not None:
        child.stdin.close()
    try:
        await asyncio.wait_for(child.wait(), _CLOSE_S)
    except asyncio.TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def child_command(module: str) -> list[str]:
    """Return the command line of a program of this package, with no user's folder on its ``sys.path``."""
    root = str(Path(__file__).resolve().parents[3])
    start = f"import sys, runpy; sys.path.append({root!r}); runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-I", "-c", start]


def child_environment(base: Mapping[str, str], ray_token_path: Path, ray_env: Mapping[str, str]) -> dict[str, str]:
    """Return the child's environment: `base` with the token file and certificate of this Ray instead of another's.

    An empty token file means that this Ray requires no token.
    """
    kept = {name: value for name, value in base.items() if name not in {"RAY_ADDRESS", "RAY_AUTH_TOKEN"}}
    asks = not ray_token_path.is_file() or ray_token_path.stat().st_size > 0
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(ray_token_path)}
    return {
        **kept,
        **(token if asks else {"RAY_AUTH_MODE": "disabled"}),
        **ray_env,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }
