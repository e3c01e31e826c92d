"""A coding agent as the tests see one: the official SDK's client, speaking to ``raylaunch-mcp`` over stdio."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from mcp import StdioServerParameters
from mcp.client import Client
from mcp.client.stdio import stdio_client
from mcp.types import TextContent, Tool
from typing_extensions import Self

from raylaunch.cluster.processes import identify
from raylaunch.cluster.record import new_record, save_record
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.job import JobView
from raylaunch.paths import cluster_paths, make_cluster_dirs, write_private
from support.api import Api, serving, token_of
from support.api_use import write
from support.cli import forked
from support.waiting import wait_until

_T = TypeVar("_T")

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-c", "from mcp_server.server import main; main()"]
HASTY = [
    *PROGRAM[:2],
    "import mcp_server.context, raylaunch.client.transport; "
    "mcp_server.context.PATIENCE_S = raylaunch.client.transport.ANSWER_TIMEOUT_S = 3.0; " + PROGRAM[2],
]
"""The same server, which waits three seconds for what it else waits thirty for."""


GOOD: dict[str, dict[str, object]] = {
    "train_job": {"entrypoint": "true", "working_dir": ""},
    "monitor_job": {"job": "digits"},
    "list_jobs": {},
    "job_logs": {"job": "digits"},
    "stop_job": {"job": "digits"},
    "download_model": {"job": "digits", "to": "out"},
    "cluster_status": {},
}
"""One call of each tool that would be in order."""


class Answer(NamedTuple):
    """What a tool answered."""

    error: bool
    text: str
    facts: dict[str, Any]


def environment(home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a server whose clusters live in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAYLAUNCH_", "WANDB_", "RAY_"))}
    return {**kept, "RAYLAUNCH_HOME": str(home), "PYTHONPATH": str(ROOT), **(extra or {})}


class Agent:
    """A client with a server of its own. Its verbs block; the SDK's client runs in a thread.

    Args:
        home: raylaunch's home.
        cwd: where the server is started.
        extra: more environment.
        mode: ``auto`` (2026-07-28), or ``legacy`` (the handshake).
        program: the server; without one it is forked.
    """

    def __init__(
        self,
        home: Path,
        cwd: Path,
        *,
        extra: Mapping[str, str] | None = None,
        mode: str = "auto",
        program: Sequence[str] = (),
    ) -> None:
        program = program or forked("raylaunch-mcp")
        self._program = StdioServerParameters(
            command=program[0], args=list(program[1:]), env=environment(home, extra), cwd=cwd
        )
        self._mode = mode
        self.log = home / "mcp-server.log"
        self.log.touch(mode=0o600)  # it lies in a home of raylaunch's, where nobody else may read anything
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="agent")

    def open(self) -> None:
        """Start the server, and wait until it has answered."""
        self._thread.start()
        wait_until(lambda: self._ready.is_set() or not self._thread.is_alive(), 60, "the MCP server answers")

    def close(self) -> None:
        """End client and server."""
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(30)

    def call(self, tool: str, /, **arguments: object) -> Answer:
        """Call a tool."""
        return self.call_with(tool, arguments)

    def call_with(
        self, tool: str, arguments: dict[str, object], news: list[tuple[float, float | None, str | None]] | None = None
    ) -> Answer:
        """Call a tool; progress notifications are added to `news`."""

        async def heard(progress: float, total: float | None, message: str | None) -> None:
            if news is not None:
                news.append((progress, total, message))

        result = self._do(self.client.call_tool(tool, arguments, progress_callback=heard if news is not None else None))
        (content,) = result.content
        assert isinstance(content, TextContent)
        return Answer(bool(result.is_error), content.text, dict(result.structured_content or {}))

    def tools(self) -> list[Tool]:
        """Return the tools."""
        return self._do(self.client.list_tools()).tools

    def _do(self, work: Coroutine[None, None, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        with self.log.open("a", encoding="utf-8") as errors:
            async with Client(stdio_client(self._program, errlog=errors), mode=self._mode) as self.client:
                await self.client.list_tools()
                self._ready.set()
                await self._over.wait()


@contextmanager
def agent_at(
    home: Path,
    cwd: Path,
    *,
    extra: Mapping[str, str] | None = None,
    mode: str = "auto",
    program: Sequence[str] = (),
) -> Iterator[Agent]:
    """Open an agent, and close it."""
    agent = Agent(home, cwd, extra=extra, mode=mode, program=program)
    agent.open()
    try:
        yield agent
    finally:
        agent.close()


@contextmanager
def cluster_of_paper(home: Path, store: Path, *, person: str = "olga") -> Iterator[Api]:
    """Let the cluster ``local`` of `home` be the API over `store`: its record names a process that does nothing."""
    paths = cluster_paths("local", {"RAYLAUNCH_HOME": str(home)})
    make_cluster_dirs(paths)
    with (
        serving(store) as running,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stand_in,
    ):
        port = int(running.url.rpartition(":")[2])
        record = new_record(ClusterSpec(), paths)
        save_record(
            paths, record.with_(wanted="running", controller=identify(stand_in.pid), ports={"controller": port})
        )
        write_private(paths.token, token_of(person))
        try:
            yield running
        finally:
            stand_in.kill()


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A home of raylaunch's for the tests of one file, with a folder ``work`` that has a program."""
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as folder:
        (Path(folder) / "work").mkdir()
        (Path(folder) / "work" / "train.py").write_text("print(1)\n")
        yield Path(folder)


@pytest.fixture(scope="module")
def paper(place: Path) -> Iterator[Api]:
    """The cluster of paper of that home."""
    with cluster_of_paper(place, place / "store") as running:
        yield running


@pytest.fixture(scope="module")
def agent(place: Path, paper: Api) -> Iterator[Agent]:
    """An agent in ``work`` of that home."""
    assert paper
    with agent_at(place, place / "work") as opened:
        yield opened


def submitted(agent: Agent, **given: object) -> str:
    """Submit a job without code by way of the agent; return its id."""
    answer = agent.call_with("train_job", {"entrypoint": "true", "working_dir": "", **given})
    assert not answer.error, answer.text
    return str(answer.facts["job"]["id"])


def keep(api: Api, job: JobView, path: str, content: bytes) -> None:
    """Put a file that is complete, with its checksum, into the job's folder."""
    write(api, job, path, content)
    sha256 = hashlib.sha256(content).hexdigest()
    api.do(lambda: api.state.artifacts.note(job.id, path, size=len(content), sha256=sha256))


class Raw:
    """A server that is spoken to line by line; what it says on stdout is kept as it is."""

    def __init__(
        self, home: Path, cwd: Path, *, extra: Mapping[str, str] | None = None, program: Sequence[str] = ()
    ) -> None:
        self.process = subprocess.Popen(
            program or forked("raylaunch-mcp"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(home, extra),
            cwd=cwd,
        )
        self.received: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.process.kill()
        self.process.wait(10)
        self._reader.join(10)

    def send(self, *lines: bytes) -> None:
        """Send lines."""
        assert self.process.stdin
        self.process.stdin.write(b"".join(line + b"\n" for line in lines))
        self.process.stdin.flush()

    def ask(self, number: int, method: str, params: Mapping[str, object]) -> None:
        """Send a request."""
        self.send(json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}).encode())

    def greet(self) -> None:
        """Shake hands."""
        facts = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "raw", "version": "1"}}
        self.ask(0, "initialize", facts)
        self.answer(0)
        self.send(b'{"jsonrpc":"2.0","method":"notifications/initialized"}')

    def answer(self, number: int, timeout_s: float = 60) -> dict[str, Any]:
        """Wait for the answer to a request, and return it."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [message for message in self.messages() if message.get("id") == number]
            return bool(found)

        wait_until(look, timeout_s, f"request {number} is answered")
        return found[0]

    def messages(self) -> list[dict[str, Any]]:
        """Return what was said so far; every line must be a message of the protocol."""
        return [json.loads(line) for line in list(self.received)]

    def end(self) -> int:
        """Close its stdin, and wait for its end."""
        assert self.process.stdin
        self.process.stdin.close()
        status = self.process.wait(30)
        self._reader.join(10)
        return status

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.received.append(line)
        self.process.stdout.close()
