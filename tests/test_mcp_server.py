"""The MCP server as a program: both protocol eras, its list of tools, roles, audit, nonsense, and a sudden end."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from mcp.types import ListToolsResult
from support.agent import GOOD, PROGRAM, Agent, Raw, agent_at, cluster_of_paper, environment
from support.api import Api

from mcp_server.tools import TOOLS, offered
from tools.reference import mcp

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "train_job",
    "monitor_job",
    "list_jobs",
    "job_logs",
    "stop_job",
    "download_model",
    "cluster_status",
}
READING = {"monitor_job", "list_jobs", "job_logs", "cluster_status"}
MODES = ["auto", "legacy"]


@pytest.fixture(scope="module", params=MODES)
def agent(request: pytest.FixtureRequest, place: Path, paper: Api) -> Iterator[Agent]:
    assert paper
    with agent_at(place, place / "work", mode=request.param) as opened:
        yield opened


def audit_of(home: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (home / "mcp-audit.jsonl").read_text().splitlines()]


def test_both_protocol_eras_are_served(agent: Agent) -> None:
    assert agent.client.protocol_version in {"2026-07-28", "2025-11-25"}
    assert {tool.name for tool in agent.tools()} == NAMES
    assert GOOD.keys() == NAMES, "name it in NAMES, and a call of it in GOOD of tests/support/agent.py"
    assert agent.call("list_jobs", name="nobody").facts["next"]


def test_a_client_of_each_era_gets_the_era_it_asked_for(place: Path, paper: Api) -> None:
    assert paper
    found = []
    for mode in MODES:
        with agent_at(place, place / "work", mode=mode) as opened:
            found.append(opened.client.protocol_version)
    assert found == ["2026-07-28", "2025-11-25"]


def test_the_list_of_tools_is_at_most_9_kb(agent: Agent) -> None:
    listed = ListToolsResult(tools=agent.tools()).model_dump(by_alias=True, mode="json", exclude_none=True)
    assert len(json.dumps(listed).encode()) <= 9000


def test_every_tool_has_all_four_annotations_and_says_what_it_answers(agent: Agent) -> None:
    for tool in agent.tools():
        assert tool.annotations
        hints = tool.annotations.model_dump(exclude={"title"})
        assert None not in hints.values(), tool.name
        assert hints["read_only_hint"] == (tool.name in READING)
        assert tool.title
        assert tool.description
        assert tool.output_schema
        assert "next" in tool.output_schema["required"]
    assert {tool.name for tool in agent.tools() if tool.annotations and tool.annotations.destructive_hint} == {
        "stop_job"
    }


def test_descriptions_and_instructions_are_shorter_than_what_claude_code_cuts(agent: Agent) -> None:
    assert len(agent.client.instructions or "") < 2000
    assert max(len(tool.description or "") for tool in agent.tools()) < 2000


def test_every_success_carries_the_next_step_and_the_same_as_text(agent: Agent) -> None:
    for tool in (tool for tool in TOOLS if not tool.writes and "job" not in tool.takes.model_fields):
        answer = agent.call(tool.name)
        assert not answer.error
        assert answer.facts["next"]
        assert json.loads(answer.text) == answer.facts


def test_a_jobs_python_is_its_projects_lock_else_the_environment_that_is_active_for_the_server(
    place: Path, paper: Api, tmp_path: Path
) -> None:
    assert paper
    active, project = tmp_path / "venv", tmp_path / "project"
    for folder in (active, project):
        folder.mkdir()
    (active / "pyvenv.cfg").write_text("version_info = 3.12.1\n")
    (project / "train.py").write_text("print(1)\n")
    with agent_at(place, project, extra={"VIRTUAL_ENV": str(active), "CONDA_PREFIX": ""}) as agent:

        def python(**given: object) -> str:
            answer = agent.call("train_job", entrypoint="python train.py", dry_run=True, **given)
            return str(answer.facts["reported"]["python"])

        assert python() == f"Python 3.12 from the active environment (venv:{active})"
        assert python(environment="venv:/opt/train") == "Python from the job's environment (venv:/opt/train)"
        (project / "pyproject.toml").write_text('[project]\nname = "p"\nversion = "0"\n')
        (project / "uv.lock").write_text("version = 1\n")
        assert python() == "Python from uv.lock"


def test_a_viewer_sees_only_what_reads_and_the_rest_does_not_exist(place: Path, paper: Api) -> None:
    assert paper
    with agent_at(place, place / "work", extra={"RAYLAUNCH_ROLE": "viewer"}) as viewer:
        assert {tool.name for tool in viewer.tools()} == READING
        assert "only reads" in (viewer.client.instructions or "")
        for tool in sorted(NAMES - READING):
            refused, unknown = viewer.call(tool, job="last"), viewer.call("no_such_tool")
            assert refused.error
            assert refused.text == f"Unknown tool: {tool}"
            assert unknown.text == "Unknown tool: no_such_tool"


def test_writes_leave_a_line_before_and_after_in_a_file_of_the_owner_alone(place: Path, agent: Agent) -> None:
    answer = agent.call("train_job", entrypoint="python train.py", name="noted", env={"TOKEN": "hush-hush"})
    before, after = audit_of(place)[-2:]
    assert (before["tool"], after["outcome"], after["job"]) == ("train_job", "done", answer.facts["job"]["id"])
    assert before["call"] == after["call"]
    assert "hush-hush" not in (place / "mcp-audit.jsonl").read_text()
    assert stat.S_IMODE((place / "mcp-audit.jsonl").stat().st_mode) == 0o600


def test_reading_and_dry_runs_leave_no_line(place: Path, agent: Agent) -> None:
    agent.call("train_job", entrypoint="python train.py", name="first")
    count = len(audit_of(place))
    agent.call("list_jobs")
    agent.call("train_job", entrypoint="python train.py", dry_run=True)
    assert len(audit_of(place)) == count


def test_a_refused_write_is_noted_with_its_reason(place: Path, agent: Agent) -> None:
    agent.call("stop_job", job="nobody")
    assert "nobody" in str(audit_of(place)[-1]["outcome"])


def test_what_cannot_be_noted_is_not_done(home: Path, tmp_path: Path) -> None:
    (home / "mcp-audit.jsonl").mkdir()
    with cluster_of_paper(home, tmp_path / "store") as paper, agent_at(home, tmp_path) as opened:
        answer = opened.call("train_job", entrypoint="true", working_dir="")
        assert answer.error
        assert "mcp-audit.jsonl" in answer.text
        assert not paper.do(lambda: paper.records.page().jobs)


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (["--help"], 0, "claude mcp add raylaunch -- raylaunch-mcp"),
        (["--version"], 0, "raylaunch-mcp 0."),
        (["serve"], 2, "claude mcp add raylaunch -- raylaunch-mcp"),
    ],
)
def test_words_after_the_name_are_answered_on_stderr(home: Path, words: list[str], status: int, expected: str) -> None:
    done = subprocess.run(
        [*PROGRAM, *words], env=environment(home), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert expected in done.stderr


def test_a_role_that_there_is_not_ends_the_server_with_a_sentence(home: Path) -> None:
    done = subprocess.run(
        PROGRAM,
        env=environment(home, {"RAYLAUNCH_ROLE": "root"}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "RAYLAUNCH_ROLE=root is not a role" in done.stderr
    assert "Traceback" not in done.stderr


def test_starting_it_loads_neither_ray_nor_wandb_nor_ssh() -> None:
    code = "import sys, mcp_server.server; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert not {"ray", "wandb", "asyncssh", "fastapi", "numpy"} & set(done.stdout.split())


HOSTILE: list[object] = [
    None,
    True,
    -1,
    10**400,
    1e308,
    "",
    "\x00",
    "../../etc/passwd",
    "~nobody-at-all/x",
    "'; DROP TABLE jobs; --",
    "\N{RIGHT-TO-LEFT OVERRIDE}\x1b[2J",
    "a" * 100_000,
    [],
    [[["x"]]],
    {},
    {"a": {"b": None}},
]


def _nonsense(properties: Mapping[str, object]) -> Iterator[dict[str, object]]:
    for name in properties:
        for value in HOSTILE:
            yield {"job": "nobody", "to": "out", name: value}
    for value in HOSTILE:
        yield {str(value)[:200]: value}


def _fitting(tool: str, call: Mapping[str, object], properties: Mapping[str, object]) -> dict[str, object]:
    """Return the call without harmless arguments that the tool does not take; nothing is trained."""
    kept = {name: value for name, value in call.items() if name in properties or name not in {"job", "to"}}
    return {"entrypoint": "true", "working_dir": "", "dry_run": True, **kept} if tool == "train_job" else kept


@pytest.mark.parametrize("tool", sorted(NAMES))
def test_nonsense_is_answered_without_a_crash_and_stdout_is_the_protocols_alone(
    place: Path, paper: Api, tool: str
) -> None:
    assert paper
    properties = offered(may_write=True)[tool].takes.model_fields
    calls = [_fitting(tool, call, properties) for call in _nonsense(properties)]
    with Raw(place, place / "work") as raw:
        raw.greet()
        for number, arguments in enumerate(calls, 1):
            raw.ask(number, "tools/call", {"name": tool, "arguments": arguments})
        answers = [raw.answer(number) for number in range(1, len(calls) + 1)]
        bugs = [
            str(asked)[:200] for asked, output in zip(calls, answers, strict=True) if "this is a bug" in str(output)
        ]
        assert not bugs
        assert raw.end() == 0
        output = b"\n".join(raw.received)
        assert b"Traceback" not in output
        assert len(raw.messages()) == len(calls) + 1


def test_lines_that_are_no_messages_end_nothing(place: Path, paper: Api) -> None:
    assert paper
    with Raw(place, place / "work") as raw:
        raw.greet()
        raw.send(
            b"",
            b"hello",
            b"{",
            b"[]",
            b"null",
            b"\xff\xfe\x00",
            b'{"jsonrpc": "2.0"}',
            b'{"jsonrpc": "1.0", "id": 1, "method": "tools/list"}',
            b'{"jsonrpc": "2.0", "id": {}, "method": "tools/list"}',
            b'{"jsonrpc": "2.0", "id": 7, "method": 5}',
            b"[" * 100_000,
            b'{"jsonrpc": "2.0", "method": "notifications/nonsense", "params": {"a": [1]}}',
        )
        raw.ask(70, "no/such/method", {})
        raw.ask(71, "tools/call", {"name": 5})
        raw.ask(72, "tools/call", {"name": "list_jobs", "arguments": "x"})
        raw.send(
            b'{"jsonrpc":"2.0","id":73,"method":"tools/call","params":{"name":"\\ud800","arguments":{"\\udfff":"\\ud800"}}}'
        )
        raw.send(
            b'{"jsonrpc":"2.0","id":74,"method":"tools/call","params":{"name":"monitor_job","arguments":{"job":"\\ud800"}}}'
        )
        raw.ask(75, "tools/call", {"name": "list_jobs", "arguments": {}})
        assert "result" in raw.answer(75)
        assert {"error"} & raw.answer(70).keys()
        assert raw.end() == 0
        assert all(message["jsonrpc"] == "2.0" for message in raw.messages())


def test_a_closed_stdin_ends_the_server_in_the_middle_of_a_call(place: Path, paper: Api, agent: Agent) -> None:
    assert paper
    job = agent.call("train_job", entrypoint="python train.py", name="left").facts["job"]["id"]
    with Raw(place, place / "work") as raw:
        raw.greet()
        raw.ask(1, "tools/call", {"name": "monitor_job", "arguments": {"job": job, "wait_s": 50}})
        assert raw.end() == 0


def test_the_page_about_the_tools_is_what_the_tools_say() -> None:
    text = mcp.PAGE.read_text(encoding="utf-8")
    assert text == mcp.page(text), "python -m tools.reference.mcp writes it anew"


def test_the_mcp_file_of_the_repository_names_the_program() -> None:
    facts = json.loads((ROOT / ".mcp.json").read_text())
    command = facts["mcpServers"]["raylaunch"]["command"]
    assert command.endswith("raylaunch-mcp}")
    assert os.environ.get("RAYLAUNCH_MCP") is None
