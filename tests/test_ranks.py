"""A job with several ranks, as people and agents see it: whose log, whose failure, whose metrics."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.agent import Agent, environment
from support.api import Api
from support.api_use import end, error, submit, write
from support.cli import run_cli
from support.run_writer import history, run, write_run
from support.store import job_view

from raylaunch.controller.metrics.reader import MetricsStore
from raylaunch.controller.store.logs import log_tail
from raylaunch.models.job import AttemptView, JobView
from raylaunch.models.states import Change
from raylaunch.runner.launchers.torchrun import RankFailure, before_report, rank_failure

REPORT = """\
W1122 20:35:25.256000 30212 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 30219 closing signal
E1122 20:35:25.276000 30212 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 3) local_rank: 1
Traceback (most recent call last):
  File "torch/distributed/launcher/api.py", line 383, in launch_agent
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-22_20:35:25
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 30219)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 30219
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_20:35:25
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : 3 (pid: 30220)
  error_file: <N/A>
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============================================================
"""


def started(paper: Api, ranks: int) -> JobView:
    """Submit a job and let it have a running attempt with so many ranks."""
    with paper.client("olga") as client:
        job = submit(client)
    attempt = AttemptView(id=f"{job.id}-1", n=1, admitted_at=1.0, started_at=2.0, ranks=ranks)
    paper.do(lambda: paper.records.update(job.id, kind="admitted", change=Change.ADMIT, attempts=(attempt,)))
    for rank in range(ranks):
        write(paper, job, f"attempt-1/logs/rank-{rank}.log", f"hello from rank {rank}\n".encode())
    return job


def failed(paper: Api, job: JobView) -> JobView:
    """Let rank 1 of the job have failed."""

    def over() -> None:
        (attempt,) = paper.records.get(job.id).attempts
        facts = {"failed_rank": 1, "exit_code": 3}
        paper.records.update(
            job.id, kind="", attempts=(attempt.model_copy(update=facts),), log_tail=("its last words",)
        )

    paper.do(over)
    end(paper, job, Change.FAIL)
    return paper.do(lambda: paper.records.get(job.id).view())


def cli(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_cli(words, cwd=place / "work", env=environment(place))


def test_the_log_of_each_rank_is_read_while_it_runs_and_says_how_many_there_are(paper: Api, place: Path) -> None:
    job = started(paper, 2)
    first, second = cli(place, "logs", job.id), cli(place, "logs", job.id, "--rank", "1")
    assert first.stdout == "hello from rank 0\n"
    assert f"raylaunch logs {job.id} --rank 1" in first.stderr
    assert (second.stdout, second.stderr) == ("hello from rank 1\n", "")


@pytest.mark.parametrize(("ranks", "has"), [(2, "it has 2 ranks: 0 to 1"), (1, "it has rank 0 only")])
def test_a_rank_that_never_will_be_is_refused_at_once(paper: Api, ranks: int, has: str) -> None:
    job = started(paper, ranks)
    with paper.client("olga") as client:
        read = client.get(f"/v1/jobs/{job.id}/logs", params={"rank": 7, "wait_s": 20})
        searched = client.get(f"/v1/jobs/{job.id}/logs/search", params={"rank": 7, "pattern": "x"})
    assert error(read) == error(searched) == (404, "not_found", f"attempt 1 of {job.id} has no rank 7", has)


def test_where_nobody_knows_how_many_ranks_there_are_those_with_a_log_count(paper: Api) -> None:
    job = started(paper, 0)
    for rank in range(3):
        write(paper, job, f"attempt-1/logs/rank-{rank}.log", b"a line\n")
    with paper.client("olga") as client:
        assert client.get(f"/v1/jobs/{job.id}/logs", params={"rank": 2}).headers["X-Log-Ranks"] == "3"
        assert client.get(f"/v1/jobs/{job.id}/logs", params={"rank": 3}).content == b""


def test_a_failed_job_says_which_rank_it_was(paper: Api, place: Path) -> None:
    job = failed(paper, started(paper, 2))
    shown = cli(place, "show", job.id).stdout
    assert "2 ranks (logs --rank 0 to 1), ran 0 s, exit code 3" in shown
    assert "last lines of rank 1's log:\n  │ its last words\n" in shown


def test_an_agent_is_told_the_ranks_and_the_one_that_failed(paper: Api, agent: Agent) -> None:
    job = failed(paper, started(paper, 2))
    seen = agent.call("monitor_job", job=job.id).facts
    assert (seen["job"]["attempt"]["ranks"], seen["job"]["attempt"]["failed_rank"]) == (2, 1)
    assert seen["next"].startswith(f"find the cause: job_logs job={job.id} rank=1; ")
    log = agent.call("job_logs", job=job.id, rank=1).facts
    assert (log["log"]["lines"], log["rank"], log["ranks"]) == (["hello from rank 1"], 1, 2)
    refused = agent.call("job_logs", job=job.id, rank=7)
    assert refused.error
    assert "it has 2 ranks: 0 to 1" in refused.text


def test_torchruns_report_names_the_rank_and_is_left_out_of_the_last_words() -> None:
    log = f"epoch 1\nRuntimeError: my own\n{REPORT}"
    assert rank_failure(log) == RankFailure(1, 3)
    assert before_report(log) == "epoch 1\nRuntimeError: my own\n"


def test_a_log_without_a_report_is_left_as_it_is() -> None:
    assert rank_failure("Traceback\nValueError: x\n") is None
    assert before_report("Traceback\nValueError: x\n") == "Traceback\nValueError: x\n"


@pytest.mark.parametrize(
    ("exit_facts", "expected"),
    [
        ({"failed_rank": 1}, ("rank 1 line", "ValueError: mine")),
        ({"failed_rank": 0}, ("rank 0 line",)),
        ({"failed_rank": 9}, ("rank 0 line",)),
        ({}, ("rank 0 line",)),
        (None, ("rank 0 line",)),
    ],
)
def test_the_last_lines_are_those_of_the_rank_that_failed(
    exit_facts: dict[str, object] | None, expected: tuple[str, ...], tmp_path: Path
) -> None:
    logs = tmp_path / "attempt-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "rank-0.log").write_text(f"rank 0 line\n{REPORT}")
    (logs / "rank-1.log").write_text("rank 1 line\nValueError: mine\n")
    if exit_facts is not None:
        (logs.parent / "exit.json").write_text(json.dumps(exit_facts))
    assert log_tail(tmp_path, attempt=1) == expected


def test_the_jobs_metrics_are_those_of_its_own_run_though_another_rank_began_earlier(tmp_path: Path) -> None:
    attempt = tmp_path / "jobs" / "digits-a" / "attempt-1"
    write_run(attempt, [run("1z"), history(0, {"loss": 9.0})], run_id="1z", started="20260101_110000")
    write_run(attempt, [run("own"), history(0, {"loss": 1.0})], run_id="own", started="20260101_120000")
    (attempt / "attempt.json").write_text(json.dumps({"wandb": {"run_id": "own"}}))
    last = MetricsStore(tmp_path).latest(job_view("digits-a")).last
    assert list(last.items()) == [("loss", 1.0), ("1z/loss", 9.0)]
