"""The MCP server, spoken to by the MCP Inspector's command line: a client that none of us wrote."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.agent import PROGRAM, cluster_of_paper, environment, keep
from support.api import Api
from support.api_use import start, write
from support.node import node, program

from mcp_server.tools import TOOLS
from raylaunch.models.job import JobView, SubmitRequest
from raylaunch.models.job_spec import JobSpec

pytestmark = pytest.mark.slow


class Place(NamedTuple):
    """A home with a cluster of paper, and a job in it."""

    home: Path
    api: Api
    job: str


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    node()
    program("inspector", "mcp-inspector")
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as folder:
        home = Path(folder)
        (home / "work").mkdir()
        (home / "work" / "train.py").write_text("print()")
        with cluster_of_paper(home, home / "store") as api:
            yield Place(home, api, _job(api).id)


def _job(api: Api) -> JobView:
    request = SubmitRequest(spec=JobSpec(name="digits", entrypoint="python train.py"))
    record, _created = api.do(lambda: api.records.create(request, owner="olga", wandb=None))
    job = record.view()
    start(api, job)
    write(api, job, "attempt-1/logs/rank-0.log", b"epoch 1\nepoch 2\n")
    keep(api, job, "attempt-1/outputs/model.pt", b"weights")
    return job


def inspect(place: Place, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the Inspector with an environment that has nothing of ours; the server's own stands in its file."""
    server = {
        "command": PROGRAM[0],
        "args": PROGRAM[1:],
        "cwd": str(place.home / "work"),
        "env": environment(place.home),
    }
    config = place.home / "inspector.json"
    config.write_text(json.dumps({"mcpServers": {"raylaunch": server}}))
    return subprocess.run(
        [node(), program("inspector", "mcp-inspector"), "--cli", "--config", config, "--server", "raylaunch", *words],
        env={"HOME": str(place.home), "PATH": "/usr/bin:/bin", "MCP_INSPECTOR_SECRET_STORE": "memory"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def call(place: Place, tool: str, arguments: Mapping[str, str]) -> dict[str, Any]:
    """Call a tool, and return the result."""
    pairs = [f"{name}={value}" for name, value in arguments.items()]
    options = ["--tool-arg", *pairs] if pairs else []
    done = inspect(place, "--method", "tools/call", "--tool-name", tool, *options)
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_the_list_of_tools_has_no_problem_that_a_strict_reader_finds(place: Place) -> None:
    done = inspect(place, "--method", "tools/list", "--strict")
    assert done.returncode == 0, done.stderr
    assert {tool["name"] for tool in json.loads(done.stdout)["tools"]} == {tool.name for tool in TOOLS}


CALLS: dict[str, tuple[dict[str, str], str]] = {
    "train_job": ({"entrypoint": "python train.py", "request_id": "by-inspector"}, "job"),
    "monitor_job": ({"job": "digits", "log_lines": "1"}, "log"),
    "list_jobs": ({"limit": "5"}, "jobs"),
    "job_logs": ({"job": "digits", "search": "epoch", "ignore_case": "true"}, "matches"),
    "download_model": ({"job": "digits", "to": "fetched"}, "files"),
    "cluster_status": ({}, "state"),
    "stop_job": ({"job": "digits"}, "job"),
}


@pytest.mark.parametrize("tool", [tool.name for tool in TOOLS if tool.name != "stop_job"] + ["stop_job"])
def test_every_tool_can_be_called(place: Place, tool: str) -> None:
    assert tool in CALLS, "add a call of it to the table above"
    arguments, key = CALLS[tool]
    result = call(place, tool, arguments)
    assert not result.get("isError"), result
    assert key in result["structuredContent"]
    assert result["structuredContent"]["next"]


def test_an_error_is_shown_as_one(place: Place) -> None:
    result = call(place, "monitor_job", {"job": "nobody"})
    assert result["isError"] is True
    assert "nobody" in result["content"][0]["text"]
