"""The protocol between controller and bridge process: events, frames, the child's pipes, and how the child is started.

A frame is a pickled value after its length: both ends are the same program, of the same user. From the controller come
the configuration and then requests ``(id, method, arguments)``; from the child come events and responses
``(id, result, error)``. What attempts wrote themselves is validated here before the controller uses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import queue
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NoReturn, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raylaunch.agent.change_feed import AttemptFacts
from raylaunch.contract import Claim, Ended, Exit, Facts, Started
from raylaunch.errors import RaylaunchError
from raylaunch.files import rotate
from raylaunch.models.fields import Count, ExitCode, Moment

_MAX_PENDING = 64 * 1024 * 1024
"""Bytes of frames that may wait for the controller to read them."""
_FLUSH_S, _POLL_S = 2.0, 0.01
_CLOSE_S = 5.0
_LENGTH = struct.Struct("!Q")

Request = tuple[int, str, dict[str, object]]
Response = tuple[int, object, RaylaunchError | None]


@dataclass(frozen=True)
class BridgeUp:
    """The child is connected to Ray."""

    ray_version: str


@dataclass(frozen=True)
class BridgeDown:
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


BridgeEvent = BridgeUp | BridgeDown | NodesChanged | ObservedAttempt | Grew | Stored | StoreProblem


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


def observed(node_id: str, facts: AttemptFacts) -> ObservedAttempt:
    """Return what an agent observed of an attempt, validated."""
    return ObservedAttempt(
        node_id=node_id,
        attempt=facts["attempt"],
        claim=cast("Claim | None", facts["claim"]),
        started=started_from(facts["started"]),
        facts=facts_from(facts["facts"]),
        exit=exit_from(facts["exit"], now=time.time()),
        runner_alive=facts["runner_alive"],
    )


def pack(value: object) -> bytes:
    """Return the frame of a value."""
    data = pickle.dumps(value)
    return _LENGTH.pack(len(data)) + data


async def read_frame(reader: asyncio.StreamReader) -> object:
    """Return the next value from the child.

    Raises:
        EOFError: its stdout has ended.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))  # noqa: S301 -- from our own child


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

    def send(self, value: object) -> None:
        """Queue a value for writing."""
        line = pack(value)
        with self._lock:
            self._waiting_bytes += len(line)
            too_many = self._waiting_bytes > _MAX_PENDING
        if too_many:  # the controller hangs; the next one starts another child and gets everything again
            os._exit(1)
        self._lines.put(line)

    def fail(self, why: str) -> NoReturn:
        """Report why the connection is down, and exit soon even if Ray's own threads hang."""
        self.send(BridgeDown(why))
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
        self._values: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def next(self) -> object:
        """Wait for the next value, and return it."""
        return self._values.get()

    def _read(self) -> None:
        while length := sys.stdin.buffer.read(_LENGTH.size):
            data = sys.stdin.buffer.read(*_LENGTH.unpack(length))
            self._values.put(pickle.loads(data))  # noqa: S301 -- from our own controller
        os._exit(0)


async def serve_all(program: object, stdin: Stdin, stdout: Stdout) -> None:
    """Serve requests for methods of `program`, each in its own task, until cancelled."""
    tasks: set[asyncio.Task[None]] = set()
    while True:
        request = cast("Request", await asyncio.to_thread(stdin.next))
        task = asyncio.create_task(_serve(program, request, stdout))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _serve(program: object, request: Request, stdout: Stdout) -> None:
    number, method, params = request
    result, failure = None, None
    try:
        result = await getattr(program, method)(**params)
    except RaylaunchError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 -- the top of one request
        traceback.print_exc()
        message = f"the bridge failed at {method}: {str(error).partition(chr(10))[0]}"
        failure = RaylaunchError(message, hint="see link.log in the store")
    stdout.send((number, result, failure))


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
