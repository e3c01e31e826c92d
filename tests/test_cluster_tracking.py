"""Tracking on a real cluster: scripts with plain ``wandb.init()`` and ``wandb.log()``, offline and online."""

from __future__ import annotations

import importlib.util
import json
import socket
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.signals import send
from support.waiting import wait_until
from support.wandb_server import WandbServer

from raylaunch.models.job import JobView, MetricPoint
from raylaunch.models.states import JobState, Reason

pytestmark = [
    pytest.mark.ray,
    pytest.mark.wandb,
    pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the wandb package"),
]

SENDS_TIMES = """
import time, wandb
wandb.init()
while True:
    wandb.log({"sent": time.time()})
    time.sleep(0.1)
"""
KEEPS_A_DIARY = """
import os, time, wandb
wandb.init()
with open(os.environ["DIARY"], "w", buffering=1) as diary:
    for step in range(100_000):
        wandb.log({"pt": step})
        diary.write(f"{step} {time.time()}\\n")
        time.sleep(0.02)
"""
LOGS_FIVE = "import wandb\nrun = wandb.init()\nfor step in range(5): run.log({'loss': 1 / (step + 1)})\n"
FAILS_ONCE = LOGS_FIVE + "import os, sys\nsys.exit(os.environ['RAYLAUNCH_ATTEMPT'] == '1')\n"
LOGS_AN_ARTIFACT = (
    "import pathlib, wandb\n"
    "run = wandb.init()\n"
    "run.log({'loss': 1})\n"
    "pathlib.Path('model.bin').write_bytes(b'model')\n"
    "artifact = wandb.Artifact('model', 'model')\n"
    "artifact.add_file('model.bin')\n"
    "run.log_artifact(artifact)\n"
)
SEVERAL_RUNS = """
import pathlib, wandb
pathlib.Path("logs").mkdir()
for fold in (1, 2):
    with wandb.init(dir="logs", name=f"fold-{fold}") as run:
        run.log({"loss": fold})
        artifact = wandb.Artifact(f"model-{fold}", "model")
        with artifact.new_file("weights") as file:
            file.write("weights")
        run.log_artifact(artifact)
"""
REPORTS = (
    "import time, raylaunch\n"
    "assert raylaunch.context().in_job\n"
    "raylaunch.report({'accuracy': 0.5}, step=3, total=10)\n"
    "time.sleep(600)\n"
)
SHARE_IN_TIME = 0.9
WINDOW = 40
WINDOWS = 3


@pytest.fixture
def server() -> Iterator[WandbServer]:
    """A W&B server on the loopback."""
    with WandbServer() as one:
        yield one


def points(cluster: Cluster, job: str, key: str) -> tuple[MetricPoint, ...]:
    """Return all points of one metric, as a client reads them."""
    page = cluster.ask(lambda client: client.metrics(job, keys=[key], max_points=100_000))
    return next((series.points for series in page.series if series.key == key), ())


def link_of(job: JobView) -> tuple[str, str]:
    """Return how a job tracks, and why."""
    assert job.wandb is not None
    return job.wandb.mode, job.wandb.why


def test_without_credentials_an_unchanged_script_tracks_offline_and_the_job_reports_it(cluster: Cluster) -> None:
    job = cluster.python(LOGS_FIVE)
    done = cluster.ended(job)
    assert done.state is JobState.SUCCEEDED
    mode, why = link_of(done)
    assert mode == "offline"
    assert why.startswith("no W&B credentials: neither WANDB_API_KEY nor a netrc entry for ")
    assert [(point.step, point.value) for point in points(cluster, job, "loss")] == [
        (step, 1 / (step + 1)) for step in range(5)
    ]
    assert "W&B" in cluster.good("show", job)
    assert why in cluster.good("show", job)


def test_each_run_of_a_job_is_its_own_and_all_is_kept_wherever_it_was_written(cluster: Cluster) -> None:
    job = cluster.python(SEVERAL_RUNS)
    done = cluster.ended(job)
    assert done.wandb is not None
    own, other = done.wandb.runs
    assert own == done.wandb.run_id
    assert done.last_metrics == {"loss": 1.0, f"{other}/loss": 2.0}
    page = cluster.ask(lambda client: client.metrics(job))
    assert [(run.id, run.name, run.prefix) for run in page.runs] == [
        (own, "fold-1", ""),
        (other, "fold-2", f"{other}/"),
    ]
    assert f"{other}/… is run fold-2" in cluster.cli("metrics", job).err
    shown = cluster.good("show", job)
    assert "2 runs, " in shown
    assert "not uploaded yet" in shown
    kept = cluster.good("files", "--kind", "wandb", job)
    assert f"run-{other}.wandb" in kept
    assert "wandb/data/artifacts/staging/" in kept


def test_points_are_readable_within_a_second_of_their_logging(cluster: Cluster) -> None:
    job = cluster.python(SENDS_TIMES)
    wait_until(lambda: points(cluster, job, "sent"), 60, "the first point is readable")
    shares = []
    for _ in range(WINDOWS):
        ages = _ages(cluster, job)
        shares.append(sum(age <= 1.0 for age in ages) / len(ages))
        if shares[-1] >= SHARE_IN_TIME:
            break
    cluster.good("stop", job)
    cluster.ended(job)
    assert max(shares) >= SHARE_IN_TIME, f"readable within a second, in each window of {WINDOW} points: {shares}"


def _ages(cluster: Cluster, job: str) -> list[float]:
    """Return how old each of the next points is when a client first has it."""
    known = len(points(cluster, job, "sent"))
    ages: list[float] = []

    def look() -> bool:
        nonlocal known
        found = points(cluster, job, "sent")
        now = time.time()
        ages.extend(now - point.value for point in found[known:])
        known = len(found)
        return len(ages) >= WINDOW

    wait_until(look, 60, f"{WINDOW} more points are readable")
    return ages


@pytest.mark.parametrize(
    "by", [*(pytest.param(by, marks=pytest.mark.long) for by in ("stop", "timeout")), "kill"]
)  # test_runner_wandb has them all, without a cluster
def test_no_point_older_than_a_second_is_lost_by_a(by: str, cluster: Cluster, tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    limit = ["--timeout", "10s"] if by == "timeout" else []
    job = cluster.python(KEEPS_A_DIARY, "--env", f"DIARY={diary}", "--grace", "2s", *limit)
    wait_until(lambda: len(_diary(diary)) > 20, 60, "the training logs")
    if by == "stop":
        cluster.good("stop", job)
    elif by == "kill":
        send(cluster.runs(job).attempts[0].pid or 0)
    ended = cluster.ended(job)
    states = {"stop": JobState.STOPPED, "timeout": JobState.TIMED_OUT, "kill": JobState.FAILED}
    assert ended.state is states[by]
    logged = _diary(diary)
    last = max(logged.values())
    old = {step for step, at in logged.items() if at <= last - 1.0}
    kept = {int(point.value) for point in points(cluster, job, "pt")}
    assert old - kept == set()


def _diary(path: Path) -> dict[int, float]:
    """Return which steps were logged, and when."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {int(line.split()[0]): float(line.split()[1]) for line in lines if line.count(" ") == 1}


def test_on_line_the_server_gets_the_run_as_the_job_names_it(cluster: Cluster, server: WandbServer) -> None:
    job = cluster.python(LOGS_FIVE, "--name", "on-line", "--tag", "night", env=server.environment())
    done = cluster.ended(job)
    assert done.state is JobState.SUCCEEDED
    assert link_of(done) == ("online", "W&B credentials were found, and the server answers")
    assert done.wandb is not None
    run = server.runs[done.wandb.run_id]
    assert run.project == "raylaunch"
    assert run.fields["displayName"] == job
    assert run.fields["groupName"] == "on-line"
    assert run.fields["jobType"] == "train"
    assert set(run.fields["tags"]) == {"night", "raylaunch"}
    assert f"raylaunch show {job}" in run.fields["notes"]
    assert [row["loss"] for row in run.history] == [1 / (step + 1) for step in range(5)]
    assert run.complete


@pytest.mark.long
def test_an_online_job_shows_the_url_of_its_run(cluster: Cluster, server: WandbServer) -> None:
    job = cluster.python(LOGS_FIVE + "import time\ntime.sleep(600)\n", env=server.environment())
    running = cluster.until(job, lambda one: bool(one.wandb and one.wandb.url), 60, "it says its run's address")
    assert running.wandb is not None
    assert running.state is JobState.RUNNING
    assert running.wandb.url == f"{server.url}/team/raylaunch/runs/{running.wandb.run_id}"
    assert running.wandb.url in cluster.good("show", job)
    cluster.good("stop", job)
    cluster.ended(job)


@pytest.mark.long
def test_metrics_are_the_same_on_line_and_off(cluster: Cluster, server: WandbServer) -> None:
    jobs = [cluster.python(LOGS_FIVE), cluster.python(LOGS_FIVE, env=server.environment())]
    modes = [link_of(cluster.ended(job))[0] for job in jobs]
    assert modes == ["offline", "online"]
    off_line, on_line = ([(point.step, point.value) for point in points(cluster, job, "loss")] for job in jobs)
    assert on_line == off_line


def test_an_unreachable_server_makes_the_run_offline_with_a_reason(cluster: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        job = cluster.python(LOGS_FIVE, env={"WANDB_BASE_URL": url, "WANDB_API_KEY": "k" * 40})
        done = cluster.ended(job)
    assert done.state is JobState.SUCCEEDED
    mode, why = link_of(done)
    assert mode == "offline"
    assert why.startswith(f"W&B at {url} did not answer within 10 s")
    assert len(points(cluster, job, "loss")) == 5


@pytest.mark.long
def test_an_init_that_fails_online_restarts_the_training_offline(cluster: Cluster, server: WandbServer) -> None:
    server.status = 403
    job = cluster.python(LOGS_FIVE, env=server.environment())
    done = cluster.ended(job, 150)
    assert (done.state, len(done.attempts)) == (JobState.SUCCEEDED, 1)
    assert link_of(done) == ("offline", "wandb.init failed online, so the training was restarted offline")
    assert len(points(cluster, job, "loss")) == 5


@pytest.mark.long
def test_a_retry_continues_the_same_run(cluster: Cluster, server: WandbServer) -> None:
    job = cluster.python(FAILS_ONCE, "--retries", "1", env=server.environment())
    done = cluster.ended(job)
    assert (done.state, len(done.attempts)) == (JobState.SUCCEEDED, 2)
    assert done.wandb is not None
    run = server.runs[done.wandb.run_id]
    assert [row["_step"] for row in run.history] == list(range(10))
    assert [point.step for point in points(cluster, job, "loss")] == list(range(10))


@pytest.mark.long
def test_an_off_line_retry_draws_on_behind_the_first_attempt(cluster: Cluster) -> None:
    job = cluster.python(FAILS_ONCE, "--retries", "1")
    done = cluster.ended(job)
    assert (done.state, len(done.attempts)) == (JobState.SUCCEEDED, 2)
    drawn = [(point.step, point.value) for point in points(cluster, job, "loss")]
    assert drawn == list(zip(count(), [1 / (step + 1) for step in range(5)] * 2, strict=False))


@pytest.mark.long
def test_wandb_writes_nothing_outside_the_attempts_folder(cluster: Cluster, tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    elsewhere.mkdir()
    job = cluster.python(LOGS_AN_ARTIFACT, "--env", f"HOME={home}", "--env", f"TMPDIR={elsewhere}")
    assert cluster.ended(job).state is JobState.SUCCEEDED
    assert [str(path.relative_to(home)) for path in home.rglob("*")] == []
    assert [str(path.relative_to(elsewhere)) for path in elsewhere.rglob("*")] == []


def test_a_running_job_shows_its_progress_and_its_last_values(cluster: Cluster) -> None:
    job = cluster.python(REPORTS)
    cluster.until(job, lambda one: one.progress is not None, 60, "it shows its progress")
    shown = json.loads(cluster.good("show", "--json", job))
    assert shown["state"] == "running"
    assert (shown["progress"]["step"], shown["progress"]["total"]) == (3, 10)
    assert shown["last_metrics"] == {"accuracy": 0.5}
    assert "step 3 of 10" in cluster.good("show", job)
    cluster.good("stop", job)
    ended = cluster.ended(job)
    assert ended.progress is not None
    assert ended.progress.step == 3


@pytest.mark.long
def test_a_job_without_tracking_leaves_no_run(cluster: Cluster) -> None:
    job = cluster.python(LOGS_FIVE, "--tracking", "disabled")
    done = cluster.ended(job)
    assert (done.state, done.reason) == (JobState.SUCCEEDED, Reason.COMPLETED)
    assert link_of(done)[0] == "disabled"
    assert not points(cluster, job, "loss")
