"""The MCP server on a real cluster: train, watch, read, fetch, stop; and what only a real one refuses or loses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.agent import Agent, agent_at
from support.cluster import Cluster
from support.signals import send

pytestmark = pytest.mark.ray

TRAINING = """\
import os, pathlib
import raylaunch
for step in range(3):
    print("step", step, flush=True)
    raylaunch.report({"loss": 1.0 / (step + 1)}, step=step, total=3)
pathlib.Path(os.environ["RAYLAUNCH_OUTPUT_DIR"], "model.txt").write_text("weights")
"""
ENDS = {"succeeded", "failed", "stopped", "timed_out", "lost"}


@pytest.fixture(scope="module")
def code(cluster: Cluster) -> Path:
    folder = cluster.work / "agent"
    folder.mkdir()
    (folder / "train.py").write_text(TRAINING)
    (folder / "cluster.yaml").write_bytes((cluster.work / "cluster.yaml").read_bytes())
    return folder


@pytest.fixture(scope="module")
def agent(cluster: Cluster, code: Path) -> Iterator[Agent]:
    with agent_at(cluster.home, code) as opened:
        yield opened


def until_it_ended(agent: Agent, job: str) -> dict[str, object]:
    """Do as the tool says: call again with the cursor of the last answer."""
    cursor = 0
    for _ in range(30):
        facts = agent.call("monitor_job", job=job, wait_s=20, cursor=cursor).facts
        cursor = facts["cursor"]
        if facts["job"]["state"] in ENDS:
            return facts
    raise AssertionError(facts)


def test_an_agent_trains_watches_and_fetches_a_model(agent: Agent, code: Path) -> None:
    job = agent.call("train_job", entrypoint="python train.py", name="agent").facts["job"]["id"]
    facts = until_it_ended(agent, job)
    assert facts["job"]["state"] == "succeeded"  # type: ignore[index]  # JSON
    assert facts["next"] == f"download its outputs: download_model job={job}"
    assert "step 2" in agent.call("job_logs", job=job).facts["log"]["lines"]
    fetched = agent.call("download_model", job=job).facts
    assert fetched["verified"] is True
    assert (code / job / "model.txt").read_text() == "weights"


def test_a_failed_job_is_answered_with_its_last_lines_and_where_to_look(agent: Agent) -> None:
    command = "echo before; python -c 'raise ValueError(42)'"
    job = agent.call("train_job", entrypoint=command, working_dir="").facts["job"]["id"]
    facts = until_it_ended(agent, job)
    assert facts["job"]["state"] == "failed"  # type: ignore[index]  # JSON
    assert "ValueError: 42" in facts["log"]["lines"]  # type: ignore[index]  # JSON
    assert f"job_logs job={job}" in str(facts["next"])


def test_what_no_node_could_ever_run_is_refused(agent: Agent) -> None:
    for dry_run in (True, False):
        answer = agent.call("train_job", entrypoint="true", working_dir="", gpus=64, dry_run=dry_run)
        assert answer.error
        assert "can never run on cluster" in answer.text
        assert "raylaunch status" in answer.text


def test_a_missing_secret_is_answered_with_the_command_that_a_person_types(agent: Agent) -> None:
    answer = agent.call("train_job", entrypoint="true", working_dir="", secrets=["NOT_SET_YET"])
    assert answer.error
    assert "raylaunch secret set NOT_SET_YET" in answer.text


def test_a_running_job_is_stopped_and_a_second_stop_says_that_it_has_ended(agent: Agent, cluster: Cluster) -> None:
    job = agent.call("train_job", entrypoint="sleep 300", working_dir="").facts["job"]["id"]
    cluster.runs(job)
    assert agent.call("stop_job", job=job, grace_s=1).facts["job"]["state"] == "stopping"
    assert until_it_ended(agent, job)["job"]["state"] == "stopped"  # type: ignore[index]  # JSON
    again = agent.call("stop_job", job=job)
    assert again.error
    assert f"{job} has ended already: stopped" in again.text


def test_the_cluster_is_shown_with_its_gpus(agent: Agent) -> None:
    facts = agent.call("cluster_status").facts
    assert (facts["state"], facts["gpus"]) == ("up", 4)
    assert facts["nodes"][0]["alive"] is True


def test_a_controller_that_was_killed_is_started_again_by_the_next_call(agent: Agent, cluster: Cluster) -> None:
    job = agent.call("train_job", entrypoint="sleep 300", working_dir="").facts["job"]["id"]
    cluster.runs(job)
    send(cluster.controller_pid())
    facts = agent.call("monitor_job", job=job).facts
    assert facts["job"]["state"] == "running"
    agent.call("stop_job", job=job, grace_s=1)
