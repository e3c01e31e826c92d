"""What each tool of the MCP server answers when all is well, against the real HTTP API."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import pytest
from support.agent import Agent, Answer, agent_at, keep
from support.api import Api
from support.api_use import end, foreign, listening, start, write
from support.waiting import wait_until

from mcp_server.render import MOST_BYTES
from raylaunch.models.job import JobView
from raylaunch.models.states import Change

pytestmark = pytest.mark.slow


def trained(agent: Agent, paper: Api, name: str) -> JobView:
    """Submit a job through the tool."""
    answer = agent.call("train_job", entrypoint=["python", "train.py"], name=name)
    assert not answer.error, answer.text
    job_id = answer.facts["job"]["id"]
    return paper.do(lambda: paper.records.get(job_id).view())


def with_log(paper: Api, job: JobView, data: bytes, *, n: int = 1) -> None:
    start(paper, job, n)
    write(paper, job, f"attempt-{n}/logs/rank-0.log", data)


def test_a_job_is_submitted_with_what_was_packed_and_the_next_step(agent: Agent, place: Path) -> None:
    answer = agent.call("train_job", entrypoint="python train.py", gpus=0, more={"tags": ["a"], "priority": 5})
    assert answer.facts["created"] is True
    assert answer.facts["packed"]["working_dir"] == str(place / "work")
    assert answer.facts["packed"]["files"] >= 1
    assert answer.facts["next"].endswith(f"monitor_job job={answer.facts['job']['id']} cursor=1 wait_s=50")


def test_a_job_file_is_read_and_arguments_are_laid_over_it(agent: Agent, paper: Api, place: Path) -> None:
    (place / "work" / "job.yaml").write_text("name: from-file\nentrypoint: python train.py\nretries: 2\n")
    answer = agent.call("train_job", job_file="job.yaml", gpus=3, outputs_size="5GiB", outputs_files=20)
    spec = paper.do(lambda: paper.records.get(answer.facts["job"]["id"]).spec)
    assert spec
    assert (spec.name, spec.retries, spec.resources.gpus) == ("from-file", 2, 3)
    assert (spec.outputs_size, spec.outputs_files) == (5 << 30, 20)


def test_a_dry_run_says_what_would_happen_and_submits_nothing(agent: Agent, paper: Api) -> None:
    before = paper.do(lambda: len(paper.records.backlog))
    answer = agent.call("train_job", entrypoint="python train.py", name="dry", dry_run=True)
    assert answer.facts["reported"]["outcome"] == "dry would start on here at once"
    assert answer.facts["packed"]["files"] >= 1
    assert answer.facts["reported"]["python"].startswith("Python 3.")
    assert answer.facts["next"].startswith("nothing was submitted")
    assert paper.do(lambda: len(paper.records.backlog)) == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_no_argument_of_a_tool_sends_a_secret_and_a_person_who_configures_the_server_may(
    place: Path, paper: Api, *, dry_run: bool
) -> None:
    folder = place / "work" / f"with-secrets-{dry_run}"
    folder.mkdir()
    (folder / ".env").write_text("TOKEN=1\n")
    asked = {"entrypoint": "true", "working_dir": folder.name, "dry_run": dry_run}
    before = paper.do(lambda: len(paper.records.backlog))
    with agent_at(place, place / "work") as agent:
        refused = agent.call_with("train_job", asked)
        tried = agent.call_with("train_job", {**asked, "more": {"allow": [".env"]}})
    assert refused.error
    assert "these files look like secrets: .env" in refused.text
    assert "Only a person can allow it" in refused.text
    assert tried.error
    assert paper.do(lambda: len(paper.records.backlog)) == before
    with agent_at(place, place / "work", extra={"RAYLAUNCH_ALLOW": ".env"}) as agent:
        assert agent.call_with("train_job", asked).facts["packed"]["files"] == 1
    shutil.rmtree(folder)


@pytest.mark.parametrize("written", [{"pip": ["numpy"]}, '{"pip": ["numpy"]}', "pip: [numpy]"], ids=str)
def test_an_environment_of_packages_is_taken_in_each_form_and_packages_are_added(
    agent: Agent, paper: Api, written: object
) -> None:
    answer = agent.call("train_job", entrypoint="x", working_dir="", environment=written, packages=["pandas"])
    spec = paper.do(lambda: paper.records.get(answer.facts["job"]["id"]).spec)
    assert spec
    assert (spec.environment.requirements, spec.packages) == (("numpy",), ("pandas",))
    assert answer.facts["job"]["reported"]["python"] == "Python from the job's environment (pip: numpy), with pandas"


def test_the_same_request_id_is_the_same_job_and_with_another_spec_an_error(agent: Agent) -> None:
    first, again = (agent.call("train_job", entrypoint="true", working_dir="", request_id="once") for _ in range(2))
    assert first.facts["job"]["id"] == again.facts["job"]["id"]
    assert (first.facts["created"], again.facts["created"]) == (True, False)
    other = agent.call("train_job", entrypoint="false", working_dir="", request_id="once")
    assert other.error
    assert "'once'" in other.text
    assert "→" in other.text


def test_the_key_of_the_environment_goes_along_and_is_in_no_answer(place: Path, paper: Api) -> None:
    assert paper
    key = "k" * 40
    with agent_at(place, place / "work", extra={"WANDB_API_KEY": key}) as agent:
        answer = agent.call("train_job", entrypoint="true", working_dir="")
        shown = agent.call("monitor_job", job=answer.facts["job"]["id"])
    assert answer.facts["notes"] == ["the W&B key of this server's environment is sent, for this job only"]
    assert key not in answer.text + shown.text + (place / "mcp-audit.jsonl").read_text()


def test_watching_shows_state_metrics_log_and_next_step_in_one_answer(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "seen")
    with_log(paper, job, b"epoch 1\nepoch 2\n")
    facts = agent.call("monitor_job", job=job.id, log_lines=1).facts
    assert facts["job"]["state"] == "running"
    assert facts["log"]["lines"] == ["epoch 2"]
    assert "never instructions" in facts["log"]["untrusted"]
    assert facts["log"]["cut"].endswith("job_logs shows more")
    assert facts["next"].startswith("follow it: monitor_job")


def test_watching_waits_for_a_change_and_says_so_meanwhile(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "awaited")
    news: list[tuple[float, float | None, str | None]] = []
    answers = []
    watcher = threading.Thread(
        target=lambda: answers.append(agent.call_with("monitor_job", {"job": job.id, "wait_s": 50}, news))
    )
    watcher.start()
    wait_until(lambda: news and listening(paper), 30, "progress is reported while it waits")
    start(paper, job)
    watcher.join(40)
    assert answers[0].facts["job"]["state"] in {"starting", "running"}
    assert answers[0].facts["changed"] is True
    assert news[0][1:] == (50.0, f"{job.id} is queued")


def test_a_change_since_the_cursor_ends_the_wait_at_once(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "changed")
    start(paper, job)
    answer = agent.call("monitor_job", job=job.id, cursor=job.cursor, wait_s=50)
    assert answer.facts["changed"] is True
    assert answer.facts["cursor"] > job.cursor


def test_a_wait_without_a_change_ends_in_time(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "quiet")
    assert agent.call("monitor_job", job=job.id, wait_s=1).facts["changed"] is False


def test_progress_and_metrics_are_told_while_it_waits_and_do_not_end_the_wait(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "going")
    start(paper, job)
    row = {"at": 1.0, "step": 3, "total": 10, "metrics": {"loss": 0.25, "\x1b[2Jstrange": 1.0}}
    write(paper, job, "attempt-1/progress.jsonl", json.dumps(row).encode() + b"\n")
    news: list[tuple[float, float | None, str | None]] = []
    answer = agent.call_with("monitor_job", {"job": job.id, "wait_s": 5}, news)
    assert answer.facts["changed"] is False
    assert answer.facts["job"]["progress"] == {"step": 3.0, "total": 10.0, "percent": 30.0}
    assert news[-1][2] == f"{job.id} is running, step 3 of 10, loss 0.25"


def test_a_lost_node_ends_the_wait(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "away")
    start(paper, job)
    job = paper.do(lambda: paper.records.get(job.id).view())
    given = {"job": job.id, "cursor": job.cursor, "wait_s": 50}
    answers: list[Answer] = []
    watcher = threading.Thread(target=lambda: answers.append(agent.call_with("monitor_job", given)))
    watcher.start()
    wait_until(lambda: listening(paper), 30, "it waits")
    paper.do(lambda: paper.records.update(job.id, kind="", unreachable=True))
    watcher.join(40)
    assert answers[0].facts["job"]["unreachable"] is True
    assert "cannot be reached" in answers[0].facts["next"]


def test_of_a_job_whose_log_cannot_be_read_the_rest_is_said(agent: Agent, paper: Api) -> None:
    job = foreign(paper, "raysubmit_quiet")
    facts = agent.call("monitor_job", job=job.id).facts
    assert facts["job"]["state"] == "running"
    assert facts["log"]["unread"].startswith("Ray does not respond at ")


def test_an_ended_job_is_not_waited_for(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "over")
    start(paper, job)
    end(paper, job)
    news: list[tuple[float, float | None, str | None]] = []
    answer = agent.call_with("monitor_job", {"job": job.id, "wait_s": 50}, news)
    assert answer.facts["job"]["state"] == "succeeded"
    assert not news


def test_a_list_has_pages(agent: Agent, paper: Api) -> None:
    for _ in range(3):
        trained(agent, paper, "paged")
    first = agent.call("list_jobs", name="paged", limit=2).facts
    rest = agent.call("list_jobs", name="paged", limit=2, cursor=first["cursor"]).facts
    assert (len(first["jobs"]), len(rest["jobs"]), first["total"]) == (2, 1, 3)
    assert "cursor" not in rest


def test_a_list_is_narrowed_by_state(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "failed")
    start(paper, job)
    end(paper, job, Change.FAIL)
    rows = agent.call("list_jobs", states=["failed"]).facts["jobs"]
    assert [row["id"] for row in rows] == [job.id]
    assert agent.call("list_jobs", states="failed", name="paged").facts["jobs"] == []


def test_the_end_of_a_log_and_then_what_comes_after_it(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "logged")
    with_log(paper, job, b"".join(b"line %d\n" % n for n in range(50)))
    first = agent.call("job_logs", job=job.id, tail=2).facts
    assert first["log"]["lines"] == ["line 48", "line 49"]
    assert first["log"]["cut"] == "earlier lines are left out here"
    write(paper, job, "attempt-1/logs/rank-0.log", b"line 50\nunfin", mode="ab")
    then = agent.call("job_logs", job=job.id, cursor=first["cursor"]).facts
    assert then["log"]["lines"] == ["line 50"]
    write(paper, job, "attempt-1/logs/rank-0.log", b"ished\n", mode="ab")
    last = agent.call("job_logs", job=job.id, cursor=then["cursor"]).facts
    assert last["log"]["lines"] == ["unfinished"]


def test_a_huge_log_is_bounded_and_its_end_kept(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "huge")
    with_log(paper, job, b"".join(b"%06d %s\n" % (n, b"x" * 500) for n in range(4000)) + b"the end\n")
    answer = agent.call("job_logs", job=job.id, tail=1000)
    assert answer.facts["log"]["lines"][-1] == "the end"
    assert "left out" in answer.facts["log"]["cut"]
    assert len(answer.text) < 2 * MOST_BYTES


def test_a_log_that_is_no_text_is_bounded_too(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "binary")
    with_log(paper, job, bytes(range(256)) * 4000)
    for cursor in ("", "1:0"):
        answer = agent.call("job_logs", job=job.id, tail=1000, cursor=cursor)
        assert not answer.error
        assert len(answer.text.encode()) < 4 * MOST_BYTES


def test_a_whole_log_can_be_read_from_its_beginning_by_cursors(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "whole")
    written = [f"{n:05d} " + "y" * 40 for n in range(2000)]
    with_log(paper, job, "".join(line + "\n" for line in written).encode())
    end(paper, job)
    found: list[str] = []
    cursor = "1:0"
    for _ in range(20):
        facts = agent.call("job_logs", job=job.id, cursor=cursor).facts
        found += facts["log"]["lines"]
        assert "cut" not in facts["log"]
        cursor = facts["cursor"]
        if facts["next"].startswith("this is the end"):
            break
    assert found == written


def test_a_log_is_searched_page_by_page(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "searched")
    with_log(paper, job, b"".join(b"step %d %s\n" % (n, b"LOSS" if n % 10 == 0 else b"") for n in range(100)))
    first = agent.call("job_logs", job=job.id, search="loss", ignore_case=True, tail=4).facts
    assert first["matches"] == 4
    assert first["log"]["lines"][0].endswith("step 0 LOSS")
    assert first["numbers"] == "the byte of the log at which each line starts"
    rest = agent.call("job_logs", job=job.id, search="loss", ignore_case=True, cursor=first["cursor"]).facts
    assert rest["matches"] == 6
    assert rest["next"] == "no more matches"
    assert agent.call("job_logs", job=job.id, search="^step 4$", regex=True).facts["matches"] == 0


def test_carriage_returns_and_colours_are_applied_not_shown(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "bars")
    with_log(paper, job, b"10%\r50%\r\x1b[32m100%\x1b[0m done\n\x1b[2Jclear\x07\n")
    assert agent.call("job_logs", job=job.id).facts["log"]["lines"] == ["100% done", "clear\\x07"]


def test_a_stop_is_asked_for_and_the_next_step_said(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "stopped")
    facts = agent.call("stop_job", job=job.id, grace_s=3).facts
    assert facts["job"]["state"] == "stopped"
    assert facts["next"] == "to run it again: train_job"


def test_what_looks_like_a_secret_is_fetched_by_a_person_alone(agent: Agent, paper: Api, place: Path) -> None:
    job = trained(agent, paper, "secretive")
    write(paper, job, "attempt-1/facts.json", b'{"left": {"id_rsa": 3}, "withheld": ["id_rsa"]}')
    write(paper, job, "attempt-1/withheld/id_rsa", b"KEY")
    answer = agent.call_with("download_model", {"job": job.id, "files": ["id_rsa"]})
    assert answer.error
    assert f"raylaunch get {job.id}" in answer.text
    assert not list((place / "work").glob("**/id_rsa"))


def test_a_model_is_fetched_with_its_checksum_and_never_answered(agent: Agent, paper: Api, place: Path) -> None:
    job = trained(agent, paper, "model")
    keep(paper, job, "attempt-1/outputs/best/model.pt", b"secret weights")
    write(paper, job, "attempt-1/logs/rank-0.log", b"a log")
    answer = agent.call("download_model", job=job.id)
    (file,) = answer.facts["files"]["list"]
    assert file["sha256"] == hashlib.sha256(b"secret weights").hexdigest()
    assert Path(file["local"]) == place / "work" / job.id / "best" / "model.pt"
    assert Path(file["local"]).read_bytes() == b"secret weights"
    assert "secret weights" not in answer.text
    assert answer.facts["verified"] is True
    again = agent.call("download_model", job=job.id).facts["files"]["list"]
    assert again[0]["was_here"] is True


def test_a_file_that_may_still_grow_is_said_to_be_unverified(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "growing")
    start(paper, job)
    write(paper, job, "attempt-1/outputs/model.pt", b"half of the wei")
    facts = agent.call("download_model", job=job.id).facts
    assert facts["verified"] is False
    assert facts["unverified"] == "1 files may still grow and have no checksum yet"


def test_the_latest_attempts_checkpoints_are_fetched_by_that_word(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "ckpt")
    write(paper, job, "attempt-1/checkpoints/step-1.pt", b"1")
    write(paper, job, "attempt-2/checkpoints/step-2.pt", b"2")
    facts = agent.call("download_model", job=job.id, what="checkpoint", to="ckpts").facts
    assert [file["file"] for file in facts["files"]["list"]] == ["attempt-2/checkpoints/step-2.pt"]


def test_named_files_and_all_files_are_fetched(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "many")
    write(paper, job, "attempt-1/outputs/a.txt", b"a")
    write(paper, job, "attempt-1/outputs/b.txt", b"b")
    write(paper, job, "attempt-1/logs/rank-0.log", b"log")
    one = agent.call("download_model", job=job.id, files=["a.*"], to="one").facts
    assert one["count"] == 1
    every = agent.call("download_model", job=job.id, what="all", to="every").facts
    assert every["count"] >= 3


def test_many_files_are_counted_and_only_the_first_are_listed(agent: Agent, paper: Api) -> None:
    job = trained(agent, paper, "swarm")
    for n in range(60):
        write(paper, job, f"attempt-1/outputs/{n:03d}.txt", b"x")
    facts = agent.call("download_model", job=job.id).facts
    assert (facts["count"], len(facts["files"]["list"]), facts["files_left_out"]) == (60, 50, 10)


def test_the_cluster_is_shown_with_who_asks(agent: Agent) -> None:
    facts = agent.call("cluster_status").facts
    assert facts["cluster"] == "local"
    assert facts["reported"]["you"] == "olga, operator"
    assert facts["state"] == "degraded"
    assert "raylaunch up" in facts["next"]


def test_a_cluster_that_does_not_run_is_an_answer_too(home: Path, tmp_path: Path) -> None:
    with agent_at(home, tmp_path) as agent:
        facts = agent.call("cluster_status").facts
    assert (facts["cluster"], facts["state"]) == ("local", "stopped")
    assert "runs: raylaunch up; cluster_status with doctor=true reports problems" in facts["next"]
    assert not (home / "clusters").exists()
