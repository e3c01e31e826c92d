"""Every MCP tool and every kind of error, with the words that a model reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mcp.client import Client
from mcp.server import Server
from mcp.types import TextContent
from support.agent import GOOD, Agent, agent_at, cluster_of_paper, keep, submitted
from support.api import Api
from support.api_use import foreign, start, write
from support.disks import fill, small_disk

from mcp_server import arguments
from mcp_server.context import ToolCall
from mcp_server.policy import ROOTS_VARIABLE, Audit, Roots
from mcp_server.render import Json
from mcp_server.server import ToolHandlers
from mcp_server.tools import TOOLS as ALL_TOOLS
from mcp_server.tools import Tool
from raylaunch.models.states import Change

pytestmark = pytest.mark.slow
TOOLS = sorted(GOOD)
ABOUT_A_JOB = ["monitor_job", "job_logs", "stop_job", "download_model"]
TAKES = {tool.name: ", ".join(tool.takes.model_fields) for tool in ALL_TOOLS}


@pytest.mark.parametrize("tool", TOOLS)
def test_an_unknown_argument_is_refused_with_those_that_there_are(agent: Agent, tool: str) -> None:
    answer = agent.call_with(tool, {**GOOD[tool], "jobb": "x"})
    assert answer.error
    assert answer.text == f"{tool} has no argument 'jobb'\n  → {tool} takes {TAKES[tool]}"


WRONG: list[tuple[str, dict[str, object], str]] = [
    ("train_job", {}, "nothing to run: neither entrypoint nor job_file was given"),
    ("train_job", {"entrypoint": " "}, "the entrypoint is empty"),
    ("train_job", {"entrypoint": [""]}, "the entrypoint is empty"),
    ("train_job", {"entrypoint": {"a": 1}}, "entrypoint: a mapping is not text or a list"),
    ("train_job", {"entrypoint": "true", "gpus": -1}, "resources.gpus: -1 is less than 0"),
    ("train_job", {"entrypoint": "true", "gpus": "many"}, "gpus: 'many' is not a whole number"),
    ("train_job", {"entrypoint": "true", "timeout": "soon"}, "'soon' is not a duration; write seconds, or 90s, 15m"),
    ("train_job", {"entrypoint": "true", "name": "a b"}, "'a b' is not a job name"),
    ("train_job", {"entrypoint": "true", "environment": "x"}, "'x' is not an environment; write default"),
    ("train_job", {"entrypoint": "true", "env": {"CUDA_VISIBLE_DEVICES": "0"}}, "ask for them with resources.gpus"),
    ("train_job", {"entrypoint": "true", "env": {"RAYLAUNCH_X": "0"}}, "RAYLAUNCH_X cannot be set"),
    ("train_job", {"entrypoint": "true", "env": [1]}, "env: a list is not a mapping"),
    ("train_job", {"entrypoint": "true", "secrets": ["a=b"]}, "values with: raylaunch secret set NAME"),
    ("train_job", {"entrypoint": "true", "retries": 101}, "retries: 101 is more than 100"),
    ("train_job", {"entrypoint": "true", "more": {"resorces": {}}}, "unknown key 'resorces' (nearest: resources)"),
    ("train_job", {"entrypoint": "true", "name": "a", "more": {"name": "b"}}, "name is in `more`"),
    ("train_job", {"entrypoint": "true", "more": {"working_dir": "/"}}, "working_dir is in `more`"),
    ("train_job", {"entrypoint": "true", "working_dir": "/"}, "working_dir: '/' is outside of the folders"),
    ("train_job", {"entrypoint": "true", "working_dir": "~"}, "is outside of the folders"),
    ("train_job", {"entrypoint": "true", "environment": "pip:/etc/passwd"}, "environment: '/etc/passwd' is outside of"),
    ("train_job", {"entrypoint": "true", "working_dir": "gone"}, "/gone does not exist"),
    ("train_job", {"entrypoint": "true", "working_dir": "a\0b"}, "cannot be a path here"),
    ("train_job", {"job_file": "gone.yaml"}, "gone.yaml"),
    ("train_job", {"entrypoint": "true", "dry_run": "perhaps"}, "dry_run: 'perhaps' is not true or false"),
    ("monitor_job", {"job": 5}, "job: 5 is not text"),
    ("monitor_job", {"wait_s": 51}, "wait_s: 51 is more than 50"),
    ("monitor_job", {"cursor": "x"}, "cursor: 'x' is not a whole number"),
    ("monitor_job", {"log_lines": 201}, "log_lines: 201 is more than 200"),
    ("list_jobs", {"states": ["done"]}, "states.0: 'done': input should be 'held', 'queued', 'starting'"),
    ("list_jobs", {"limit": 0}, "limit: 0 is less than 1"),
    ("list_jobs", {"cursor": "zzz"}, "cursor"),
    ("job_logs", {"tail": 1001}, "tail: 1001 is more than 1000"),
    ("job_logs", {"cursor": "zzz"}, "'zzz' is not a cursor of job_logs\n  → pass the cursor of an earlier answer"),
    ("job_logs", {"cursor": "1:5", "attempt": 2}, "attempt 2 and the cursor 1:5 name different attempts"),
    ("job_logs", {"rank": -1}, "rank: -1 is less than 0"),
    ("cluster_status", {"doctor": "perhaps"}, "doctor: 'perhaps' is not true or false"),
    ("stop_job", {}, "the key 'job' is missing\n  → stop_job takes job, grace_s"),
    ("stop_job", {"job": "a", "grace_s": "x"}, "grace_s: 'x' is not a number"),
    ("download_model", {"what": "weights"}, "what: 'weights' is not one of outputs, checkpoint, all"),
    ("download_model", {"to": "/"}, "to: '/' is outside of the folders that this server may use\n  → they are "),
    ("download_model", {"to": "~"}, "is outside of the folders"),
    ("download_model", {"to": ".git/hooks"}, "to: '.git/hooks' is hidden"),
    ("download_model", {"to": "~no-such-user/x"}, "cannot be a path here"),
    ("download_model", {"to": "x" * 5000}, "cannot be a path here"),
]


@pytest.mark.parametrize(("tool", "given", "words"), WRONG, ids=[f"{n}-{one[0]}" for n, one in enumerate(WRONG)])
def test_what_cannot_be_is_refused_in_words(agent: Agent, tool: str, given: dict[str, object], words: str) -> None:
    answer = agent.call_with(tool, given)
    assert answer.error, answer.text
    assert words in answer.text
    assert "Traceback" not in answer.text
    assert "pydantic" not in answer.text


@pytest.mark.parametrize("tool", ABOUT_A_JOB)
def test_a_job_that_there_is_not_is_answered_with_the_nearest(agent: Agent, tool: str) -> None:
    job = submitted(agent, name="mistyped")
    answer = agent.call_with(tool, {"job": "mistpyed"})
    assert answer.error
    assert answer.text.startswith("not_found; ")
    assert "\n| no such job: 'mistpyed'\n| → did you mean mistyped or mistyped-" in answer.text
    api_wide = agent.call_with(tool, {"job": "zzzzzzzz"})
    assert "\n| no such job: 'zzzzzzzz'\n| → list jobs: raylaunch list\n" in api_wide.text
    assert api_wide.text.endswith("\n  → list_jobs shows all jobs")
    assert agent.call("monitor_job", job=job).facts["job"]["state"] == "queued"


@pytest.mark.parametrize("tool", ABOUT_A_JOB)
def test_a_name_that_several_jobs_bear_means_the_latest(agent: Agent, paper: Api, tool: str) -> None:
    first, last = (submitted(agent, name=f"twice-{tool[:4]}") for _ in range(2))
    keep(paper, paper.do(lambda: paper.records.get(last).view()), "attempt-1/outputs/model.pt", b"weights")
    answer = agent.call_with(tool, {"job": f"twice-{tool[:4]}"})
    assert not answer.error, answer.text
    assert last in answer.text
    assert first not in answer.text


def test_a_broken_job_file_is_named_with_its_line(agent: Agent, place: Path) -> None:
    (place / "work" / "bad.yaml").write_text("entrypoint: true.sh\nretrys: 2\n")
    answer = agent.call("train_job", job_file="bad.yaml")
    assert answer.error
    assert "bad.yaml:2: unknown key (known: name, entrypoint," in answer.text


def test_a_pattern_that_is_no_regular_expression_is_refused(agent: Agent, paper: Api) -> None:
    job = submitted(agent)
    start(paper, paper.do(lambda: paper.records.get(job).view()))
    answer = agent.call("job_logs", job=job, search="(", regex=True)
    assert answer.error
    assert "is not a supported regular expression" in answer.text


def test_an_attempt_that_there_is_not_is_refused(agent: Agent, paper: Api) -> None:
    job = submitted(agent)
    start(paper, paper.do(lambda: paper.records.get(job).view()))
    answer = agent.call("job_logs", job=job, attempt=7)
    assert answer.error
    assert "attempt" in answer.text


@pytest.mark.parametrize("what", ["outputs", "checkpoint"])
def test_of_a_job_without_files_it_is_said_what_to_do(agent: Agent, what: str) -> None:
    job = submitted(agent)
    answer = agent.call("download_model", job=job, what=what)
    assert answer.error
    assert f"{job} has no {what.rstrip('s')}s" in answer.text
    assert f"monitor_job job={job} wait_s=50" in answer.text


def with_output(agent: Agent, paper: Api) -> str:
    job = submitted(agent)
    keep(paper, paper.do(lambda: paper.records.get(job).view()), "attempt-1/outputs/model.pt", b"weights")
    return job


def test_a_file_that_there_is_not_is_answered_with_the_nearest(agent: Agent, paper: Api) -> None:
    answer = agent.call("download_model", job=with_output(agent, paper), files=["modle.pt"])
    assert answer.error
    assert "\n| no file matches 'modle.pt' (nearest: model.pt)\n  → " in answer.text


def test_a_file_of_the_users_is_never_replaced(agent: Agent, paper: Api, place: Path) -> None:
    mine = place / "work" / "mine"
    mine.mkdir()
    (mine / "model.pt").write_text("mine")
    answer = agent.call("download_model", job=with_output(agent, paper), to="mine")
    assert answer.error
    assert "model.pt already exists with other content; it was kept\n  → choose another folder" in answer.text
    assert (mine / "model.pt").read_text() == "mine"


def test_a_folder_that_is_a_file_is_said(agent: Agent, paper: Api, place: Path) -> None:
    (place / "work" / "plain").write_text("")
    answer = agent.call("download_model", job=with_output(agent, paper), to="plain")
    assert answer.error
    assert "cannot be written to" in answer.text
    assert "choose another folder" in answer.text


def roots(folder: Path) -> dict[str, str]:
    return {ROOTS_VARIABLE: str(folder)}


def test_a_disk_that_is_full_is_said(agent: Agent, paper: Api, place: Path, tmp_path: Path) -> None:
    job = submitted(agent)
    write(paper, paper.do(lambda: paper.records.get(job).view()), "attempt-1/outputs/model.pt", os.urandom(1_000_000))
    with small_disk(tmp_path / "small", kib=64) as disk, agent_at(place, place / "work", extra=roots(disk)) as opened:
        answer = opened.call("download_model", job=job, to=str(disk / "here"))
    assert answer.error
    assert "the disk is full\n  → free some space" in answer.text


def test_a_folder_that_may_not_be_written_is_said(agent: Agent, paper: Api, place: Path, tmp_path: Path) -> None:
    job = with_output(agent, paper)
    with (
        small_disk(tmp_path / "fixed", kib=64, options="ro") as disk,
        agent_at(place, place / "work", extra=roots(disk)) as opened,
    ):
        answer = opened.call("download_model", job=job, to=str(disk / "here"))
    assert answer.error
    assert f"{disk / 'here'} cannot be written to: Read-only file system\n  → choose" in answer.text


def test_a_store_that_is_full_is_said_and_nothing_is_recorded(home: Path, tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", kib=512) as disk,
        cluster_of_paper(home, disk / "store") as paper,
        agent_at(home, tmp_path) as opened,
    ):
        fill(disk)
        answer = opened.call("train_job", **GOOD["train_job"])
        assert answer.error
        assert "No space left on device" in answer.text or "disk is full" in answer.text
        assert "→" in answer.text
        assert not paper.do(lambda: paper.records.page().jobs)


@pytest.mark.parametrize("tool", ["job_logs", "download_model"])
def test_what_cannot_be_had_of_a_job_of_plain_ray_is_said(agent: Agent, paper: Api, tool: str) -> None:
    job = foreign(paper, f"raysubmit_{tool}")
    answer = agent.call_with(tool, {"job": job.id})
    assert answer.error
    assert (  # there is no Ray behind this API
        f"log of {job.id}; ConnectError)\n| → raylaunch up"
        if tool == "job_logs"
        else f"{job.id} was submitted with plain ray job submit: raylaunch stores no files of it\n| → its log: "
    ) in answer.text


def test_bytes_that_did_not_arrive_as_they_were_sent_are_refused(agent: Agent, paper: Api, place: Path) -> None:
    job = with_output(agent, paper)
    (facts,) = agent.call("download_model", job=job, to="good").facts["files"]["list"]
    part = place / "work" / "torn" / f".model.pt.{facts['sha256'][:12]}.part"
    part.parent.mkdir()
    part.write_bytes(b"wrong!!")
    answer = agent.call("download_model", job=job, to="torn")
    assert answer.error
    assert "did not arrive as it was sent" in answer.text
    assert "repeat the command" in answer.text


def test_hidden_files_of_a_job_are_not_written_into_the_project(agent: Agent, paper: Api, place: Path) -> None:
    job = with_output(agent, paper)
    keep(paper, paper.do(lambda: paper.records.get(job).view()), "attempt-1/outputs/.claude/settings.json", b"{}")
    facts = agent.call("download_model", job=job, to=".").facts
    assert (place / "work" / "model.pt").read_bytes() == b"weights"
    assert not (place / "work" / ".claude").exists()
    assert "its name is hidden" in str(facts["files"]["not_downloaded"])
    (place / "work" / "model.pt").unlink()


def test_what_the_controller_itself_gets_wrong_is_said_without_its_traceback(agent: Agent, paper: Api) -> None:
    job = submitted(agent)
    paper.do(lambda: paper.records.update(job, kind="ended", change=Change.END_STOPPED))
    answer = agent.call("stop_job", job=job)  # the stand-in for the verbs fails here, as a bug would
    assert answer.error
    assert "the controller failed at POST" in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_bug_of_ours_is_called_one_and_ends_nothing(tmp_path: Path, anyio_backend: str) -> None:
    assert anyio_backend

    async def broken_tool(_given: arguments.ClusterStatusArguments, _call: ToolCall) -> Json:
        key = "a secret value"
        raise KeyError(key)

    tool = Tool(arguments.ClusterStatusArguments, broken_tool, title="", description="", answers={})
    desk = ToolHandlers({"broken_tool": tool}, Audit(tmp_path), restarts=False, roots=Roots(tmp_path, ()))
    made = Server("bug", on_list_tools=desk.list_tools, on_call_tool=desk.call_tool)
    async with Client(made) as client:
        for _ in range(2):
            (content,) = (await client.call_tool("broken_tool", {})).content
            assert isinstance(content, TextContent)
            assert content.text.startswith("broken_tool failed inside raylaunch; this is a bug")
            assert "secret" not in content.text
