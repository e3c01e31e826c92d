"""The MCP server as its clients see it: started as a program, spoken to by the SDK's client."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.types import TextContent

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def _session(home: Path, log: Path) -> AsyncIterator[ClientSession]:
    program = StdioServerParameters(
        command=sys.executable,
        args=["-c", "from mcp_server.server import main; main()"],
        env={**os.environ, "RAYLAUNCH_HOME": str(home), "PYTHONPATH": str(ROOT)},
        cwd=home,
    )
    with log.open("w", encoding="utf-8") as errors:
        async with stdio_client(program, errlog=errors) as (reader, writer), ClientSession(reader, writer) as session:
            await session.initialize()
            yield session


async def test_all_tools_read_only_and_say_so(home: Path, tmp_path: Path) -> None:
    async with _session(home, tmp_path / "server.log") as session:
        tools = (await session.list_tools()).tools
    assert {tool.name for tool in tools} == {"cluster_status", "list_jobs", "job_status"}
    assert all(tool.annotations and tool.annotations.read_only_hint for tool in tools)


async def test_without_a_cluster_the_model_reads_what_to_do(home: Path, tmp_path: Path) -> None:
    async with _session(home, tmp_path / "server.log") as session:
        answer = await session.call_tool("list_jobs", {})
    (content,) = answer.content
    assert answer.is_error
    assert isinstance(content, TextContent)
    assert "raylaunch up" in content.text
