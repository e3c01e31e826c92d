"""The MCP server killed in the middle of each tool: jobs stay as they were, and the same call afterwards goes well."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.agent import PROGRAM, Agent, Raw
from support.api import Api
from support.api_use import large, listening, start, write
from support.waiting import wait_until

from raylaunch.controller.store.database import Filters
from raylaunch.models.job import JobView
from raylaunch.models.states import JobState

pytestmark = pytest.mark.slow

LARGE = 150_000_000


def killed(place: Path, tool: str, given: dict[str, object], when: Callable[[], object]) -> None:
    """Ask a new server, and kill it when something is so."""
    with Raw(place, place / "work", program=PROGRAM) as raw:
        raw.greet()
        raw.ask(1, "tools/call", {"name": tool, "arguments": given})
        wait_until(lambda: when() or any(message.get("id") == 1 for message in raw.messages()), 60, "the moment")
        raw.process.kill()
        raw.process.wait(10)


def jobs_named(paper: Api, name: str) -> list[JobView]:
    return list(paper.do(lambda: paper.records.page(Filters(name=name))).jobs)


def packages(paper: Api) -> int:
    return sum(file.stat().st_size for file in (paper.store / "packages").rglob("*") if file.is_file())


@pytest.mark.parametrize("moment", ["at once", "in the middle", "when it is there"])
def test_a_submission_that_was_killed_is_one_job_when_it_is_made_again(
    place: Path, paper: Api, agent: Agent, moment: str
) -> None:
    name = f"once-{moment.partition(' ')[0]}"
    code = place / "work" / name
    code.mkdir()
    (code / "noise.bin").write_bytes(os.urandom(24_000_000))
    given: dict[str, object] = {"entrypoint": "true", "working_dir": name, "name": name, "request_id": name}
    before = packages(paper)
    moments: dict[str, Callable[[], object]] = {
        "at once": lambda: True,
        "in the middle": lambda: packages(paper) > before,
        "when it is there": lambda: jobs_named(paper, name),
    }
    killed(place, "train_job", given, moments[moment])
    there = {job.id for job in jobs_named(paper, name)}
    answer = agent.call_with("train_job", given)
    assert not answer.error, answer.text
    (job,) = jobs_named(paper, name)
    assert (job.id, job.state) == (answer.facts["job"]["id"], JobState.QUEUED)
    assert answer.facts["created"] is not bool(there)


def test_a_server_killed_while_it_watches_leaves_the_job_and_no_question_open(
    place: Path, paper: Api, agent: Agent
) -> None:
    job = agent.call("train_job", entrypoint="true", working_dir="", name="watched").facts["job"]["id"]
    before = listening(paper)
    killed(place, "monitor_job", {"job": job, "wait_s": 50}, lambda: listening(paper) > before)
    wait_until(lambda: listening(paper) == before, 20, "its question is given up")
    assert agent.call("monitor_job", job=job).facts["job"]["state"] == "queued"


def test_a_server_killed_while_it_searches_a_log_leaves_the_job(place: Path, paper: Api, agent: Agent) -> None:
    job = agent.call("train_job", entrypoint="true", working_dir="", name="searched").facts["job"]["id"]
    view = paper.do(lambda: paper.records.get(job).view())
    start(paper, view)
    write(paper, view, "attempt-1/logs/rank-0.log", b"a line of the log\n" * 3_000_000 + b"the needle\n")
    killed(place, "job_logs", {"job": job, "search": "needle", "regex": True}, lambda: True)
    found = agent.call("job_logs", job=job, search="needle").facts
    assert (found["state"], found["matches"]) == ("running", 1)


def test_a_server_killed_while_it_stops_a_job_has_stopped_it_or_not(place: Path, paper: Api, agent: Agent) -> None:
    job = agent.call("train_job", entrypoint="true", working_dir="", name="ended").facts["job"]["id"]
    killed(place, "stop_job", {"job": job}, lambda: True)
    assert paper.do(lambda: paper.records.get(job).state) in {JobState.QUEUED, JobState.STOPPED}
    if paper.do(lambda: paper.records.get(job).state) is JobState.QUEUED:
        agent.call("stop_job", job=job)
    assert agent.call("monitor_job", job=job).facts["job"]["state"] == "stopped"


def test_a_download_that_was_killed_is_completed_by_the_next_and_leaves_nothing_else(
    place: Path, paper: Api, agent: Agent
) -> None:
    job = agent.call("train_job", entrypoint="true", working_dir="", name="weighty").facts["job"]["id"]
    sha256 = large(paper, paper.do(lambda: paper.records.get(job).view()), "attempt-1/outputs/model.pt", LARGE)
    folder = place / "work" / "weighty"
    given: dict[str, object] = {"job": job, "to": "weighty"}
    killed(place, "download_model", given, lambda: any(part.stat().st_size for part in folder.glob(".*.part")))
    assert len(list(folder.iterdir())) == 1
    (file,) = agent.call_with("download_model", given).facts["files"]["list"]
    assert (file["sha256"], file["bytes"]) == (sha256, LARGE)
    assert sorted(left.name for left in folder.iterdir()) == [".raylaunch", "model.pt"]
    assert (folder / "model.pt").stat().st_size == LARGE
