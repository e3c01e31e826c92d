"""The MCP server: its start, a call compared with the controller's own answer, and the size of its list of tools."""

from __future__ import annotations

import http.client
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO
from urllib.parse import urlsplit

from benchmarks.measure import Result, Skipped, compared, in_turns, seconds
from benchmarks.workshop import PROGRAMS, Workshop
from raylaunch.cluster.types import Endpoint

_OURS = (sys.executable, "-c", "from mcp_server.server import main; main()")
"""What the program `raylaunch-mcp` runs."""
_MINIMAL = (sys.executable, str(PROGRAMS / "minimal_mcp.py"))
_ERA = "2025-06-18"
_STARTS, _CALLS = 11, 100
_END_S = 10.0
_QUESTIONS = {"cluster_status": "/v1/status", "list_jobs": "/v1/jobs?limit=20"}
"""Tools, and what they ask the controller."""


class Server:
    """A server on stdio, spoken to in lines of JSON-RPC: no client of any SDK stands between."""

    def __init__(self, process: subprocess.Popen[bytes], ask: IO[bytes], answers: IO[bytes]) -> None:
        self._process = process
        self._ask = ask
        self._told = answers
        self._numbers = itertools.count(1)

    def hello(self) -> dict[str, object]:
        """Open the session and return the list of tools: what a client does first."""
        client = {"name": "bench", "version": "1"}
        self.ask("initialize", {"protocolVersion": _ERA, "capabilities": {}, "clientInfo": client})
        self._say({"method": "notifications/initialized"})
        return self.ask("tools/list", {})

    def ask(self, method: str, params: Mapping[str, object]) -> dict[str, object]:
        """Ask, and wait for the answer.

        Raises:
            Skipped: the server answered with an error, or ended.
        """
        number = next(self._numbers)
        self._say({"id": number, "method": method, "params": params})
        for line in self._told:
            answer = json.loads(line)
            if answer.get("id") == number:
                result = answer.get("result")
                if not isinstance(result, dict) or result.get("isError"):
                    msg = f"{method}: {answer}"
                    raise Skipped(msg)
                return result
        msg = f"the server ended before it answered {method}"
        raise Skipped(msg)

    def _say(self, message: Mapping[str, object]) -> None:
        self._ask.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
        self._ask.flush()


@contextmanager
def running(command: Sequence[str], environ: Mapping[str, str]) -> Iterator[Server]:
    """Run a server for as long as the block takes."""
    process = subprocess.Popen(
        command, env=dict(environ), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    if process.stdin is None or process.stdout is None:
        msg = "a server without pipes"
        raise Skipped(msg)
    try:
        with process.stdin as ask, process.stdout as answers:
            yield Server(process, ask, answers)
    finally:
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()


def start(shop: Workshop) -> Iterator[Result]:
    """Measure from the start of the process to the list of tools."""
    pairs = in_turns(
        lambda: _first_answer(_OURS, shop), lambda: _first_answer(_MINIMAL, shop), rounds=shop.rounds(_STARTS)
    )
    how = "From the start of the process until it has answered `initialize` and `tools/list`."
    yield compared("mcp_start", pairs, unit="s", peer="a server of the same SDK with one tool, which adds", how=how)


def call(shop: Workshop) -> Iterator[Result]:
    """Measure calls of tools that make one request to the controller, compared with that request itself."""
    found = []
    with running(_OURS, shop.cluster.environ) as server, _asking(shop.cluster.reach) as ask:
        server.hello()
        for tool, path in _QUESTIONS.items():
            pairs = in_turns(
                lambda: seconds(lambda: server.ask("tools/call", {"name": tool, "arguments": {}})),  # noqa: B023 -- at once
                lambda: seconds(lambda: ask(path)),  # noqa: B023 -- as above
                rounds=shop.rounds(_CALLS),
                warm=5,
            )
            found.append((tool, *(statistics.median(side) * 1000 for side in zip(*pairs, strict=True))))
    tool, figure, peer_figure = max(found, key=lambda each: each[1] - each[2])
    how = f"Median of {_CALLS} calls over stdio; of {' and '.join(_QUESTIONS)} the one that adds more, {tool}."
    yield Result("mcp_call", figure, "ms", how, peer="the controller's own answer over HTTP", peer_figure=peer_figure)


def tools_list(shop: Workshop) -> Iterator[Result]:
    """Measure what an agent reads of the tools before it uses any."""
    with running(_OURS, shop.environ) as server:
        size = len(json.dumps(server.hello()).encode())
    yield Result("mcp_tools_list", size / 1000, "KB", "Bytes of the answer to `tools/list`, as JSON.")


def _first_answer(command: Sequence[str], shop: Workshop) -> float:
    began = time.perf_counter()
    with running(command, shop.environ) as server:
        server.hello()
        return time.perf_counter() - began


@contextmanager
def _asking(reach: Endpoint) -> Iterator[Callable[[str], bytes]]:
    """Yield a way to ask the controller over one open connection."""
    connection = http.client.HTTPConnection(urlsplit(reach.url).netloc, timeout=30)

    def ask(path: str) -> bytes:
        connection.request("GET", path, headers={"Authorization": f"Bearer {reach.token}"})
        return connection.getresponse().read()

    try:
        yield ask
    finally:
        connection.close()
