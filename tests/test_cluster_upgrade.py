"""A cluster on this machine that was started by raylaunch 0.1.0 is taken over by this one, with its jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import older
from support.cluster import UP_S, Cluster, argv, unstarted_cluster

from raylaunch.client.client import Client
from raylaunch.models.job import JobView
from raylaunch.models.states import JobState
from raylaunch.version import __version__

pytestmark = [pytest.mark.ray, pytest.mark.wandb, pytest.mark.long, pytest.mark.timeout(420)]


@dataclass(frozen=True)
class Upgraded:
    """The cluster after its upgrade, and the jobs that it had before: ended, running, running to fail, and queued.

    `early` was submitted by this raylaunch before its `up`.
    """

    cluster: Cluster
    ray: int
    old: frozenset[int]
    done: str
    runs: str
    fails: str
    waits: str
    early: str


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgraded]:
    folder = tmp_path_factory.mktemp("older")
    go_on = folder / "go-on"
    code = folder / "code"
    code.mkdir()
    (code / "train.py").write_text(older.TRAINS)
    with unstarted_cluster() as cluster:
        cluster.interpreter = str(older.install(folder / "env"))
        cluster.good("up", timeout_s=UP_S)
        assert cluster.record().versions.raylaunch == older.VERSION

        def submit(name: str, *options: str, go: Path) -> str:
            words = ("--name", name, "--gpus", "2", "--env", f"GO_ON={go}", *options, "--", "python", "train.py")
            return cluster.submit(*words, cwd=code)

        done = submit("done", go=code)
        assert json.loads(cluster.good("wait", done, "--json"))["state"] == "succeeded"
        runs = submit("runs", go=go_on)
        fails = submit("fails", "--retries", "1", "--env", "FAILS=1", go=go_on)
        waits = submit("waits", go=go_on)
        for job in (runs, fails):
            cluster.ready(job, b"halfway", timeout_s=120)
        ray, old = cluster.ray_pid(), frozenset({cluster.controller_pid(), agent(cluster)})
        cluster.interpreter = Cluster(cluster.home, cluster.work).interpreter
        assert {done, runs, fails, waits} <= set(cluster.good("list", "--json").replace('"', " ").split())
        early = cluster.submit("--working-dir", "", "--", "true")
        cluster.good("up", timeout_s=UP_S)
        go_on.touch()
        yield Upgraded(cluster, ray, old, done, runs, fails, waits, early)


def agent(cluster: Cluster) -> int:
    """Return the pid of the node agent of 0.1.0."""
    (found,) = (
        process
        for process in cluster.processes()
        if "".join(argv(process)[:1]).startswith(("ray::NodeAgent", "ray::Steward"))
    )
    return found.pid


def losses(cluster: Cluster, job: str) -> list[float]:
    """Return the metric that a job gave to W&B, step by step."""
    page = cluster.ask(lambda client: client.metrics(job, keys=["loss"], max_points=older.STEPS))
    return [point.value for point in page.series[0].points]


def trained(job: JobView) -> None:
    assert job.state is JobState.SUCCEEDED, job.message


def test_the_controller_and_the_node_agent_are_replaced_and_ray_is_not(upgraded: Upgraded) -> None:
    cluster = upgraded.cluster
    assert cluster.ray_pid() == upgraded.ray
    assert cluster.ask(lambda client: client.status()).version == __version__
    assert not upgraded.old & {process.pid for process in cluster.processes()}
    assert all(node.steward for node in cluster.ask(lambda client: client.status()).nodes)


def test_a_job_that_ran_meanwhile_succeeds_with_all_its_lines_and_metrics(upgraded: Upgraded) -> None:
    cluster, job = upgraded.cluster, upgraded.cluster.ended(upgraded.runs, timeout_s=120)
    trained(job)
    assert len(job.attempts) == 1
    assert older.output(cluster.log(job.id).decode()) == older.lines(0)
    assert losses(cluster, job.id) == pytest.approx(older.LOSSES)
    assert job.progress is not None
    assert job.progress.step == older.STEPS - 1


def test_a_job_that_fails_after_it_is_tried_again_from_its_checkpoint(upgraded: Upgraded) -> None:
    cluster, job = upgraded.cluster, upgraded.cluster.ended(upgraded.fails, timeout_s=120)
    trained(job)
    assert [attempt.exit_code for attempt in job.attempts] == [3, 0]
    assert older.output(cluster.good("logs", job.id, "--attempt", "1")) == older.lines(0, trained=False)
    assert older.output(cluster.log(job.id).decode()) == older.lines(older.HALF)
    assert losses(cluster, job.id) == pytest.approx(older.LOSSES)


def test_a_job_that_waited_meanwhile_runs(upgraded: Upgraded) -> None:
    trained(upgraded.cluster.ended(upgraded.waits, timeout_s=180))
    assert older.output(upgraded.cluster.log(upgraded.waits).decode()) == older.lines(0)
    trained(upgraded.cluster.ended(upgraded.early))


def test_a_job_that_had_ended_is_listed_shown_and_fetched_as_before(upgraded: Upgraded, tmp_path: Path) -> None:
    cluster, job = upgraded.cluster, upgraded.cluster.job(upgraded.done)
    trained(job)
    assert {upgraded.done, upgraded.runs, upgraded.waits} <= {one.id for one in cluster.ask(Client.jobs).jobs}
    assert older.output(cluster.log(job.id).decode()) == older.lines(0)
    assert losses(cluster, job.id) == pytest.approx(older.LOSSES)
    cluster.good("get", job.id, "--to", str(tmp_path))
    assert (tmp_path / "model.txt").read_text() == "trained"


def test_the_older_raylaunch_is_then_refused_and_stops_nothing(upgraded: Upgraded, tmp_path: Path) -> None:
    cluster = upgraded.cluster
    before = (cluster.ray_pid(), cluster.controller_pid())
    cluster.interpreter = str(older.install(tmp_path / "env"))
    refused = cluster.cli("up")
    listed = cluster.cli("list")
    cluster.interpreter = Cluster(cluster.home, cluster.work).interpreter
    assert (cluster.ray_pid(), cluster.controller_pid()) == before
    assert (refused.status, listed.status) == (1, 1)
    assert f"was started by raylaunch {__version__}" in refused.err
    assert cluster.job(upgraded.done).state is JobState.SUCCEEDED
