"""A cluster that changes under its jobs: a drained host, going down while jobs run, another Ray, a newer raylaunch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import ROOT, UP_S, Cluster
from support.plain_ray import submit_plain
from support.waiting import wait_until

from raylaunch.cluster.ports import is_free
from raylaunch.cluster.processes import ProcessIdentity, identify, is_alive
from raylaunch.models.states import JobState, Reason
from raylaunch.version import __version__

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]

SAVES = (
    "import os, pathlib, signal, subprocess, sys, time\n"
    "kept = pathlib.Path(os.environ['RAYLAUNCH_CHECKPOINT_DIR'], 'at')\n"
    "def save(*_):\n"
    "    time.sleep(0.2)\n"
    "    kept.write_bytes(worker.communicate(b'7')[0])\n"
    "    print('saved', kept.read_text(), flush=True)\n"
    "    sys.exit(0)\n"
    "if kept.exists():\n"
    "    print('goes on at', kept.read_text(), flush=True)\n"
    "    sys.exit(0)\n"
    "worker = subprocess.Popen(['cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
    "signal.signal(signal.SIGTERM, save)\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)"
)
"""Saves, when it is asked to stop, what its own process has: that must have received no signal."""


@pytest.fixture(scope="module")
def last(broken: Cluster) -> Iterator[Cluster]:
    """The cluster, which ends with this file."""
    yield broken
    broken.cli("down", "--force", timeout_s=UP_S)


@pytest.fixture
def own(last: Cluster) -> Iterator[Cluster]:
    """The cluster, which takes jobs again after the test, however it ends."""
    yield last
    last.cli("drain", host_of(last), "--off")


def host_of(cluster: Cluster) -> str:
    return cluster.ask(lambda client: client.status()).nodes[0].hostname


def test_a_drained_host_finishes_its_jobs_and_starts_none_until_undrained(own: Cluster, tmp_path: Path) -> None:
    host = host_of(own)
    done = tmp_path / "done"
    runs = own.python(f"import os, time\nwhile not os.path.exists({str(done)!r}): time.sleep(0.1)", "--name", "before")
    own.runs(runs)
    output = own.good("drain", host, "--until", "2h")
    assert output.startswith(f"{host} is drained by ")
    assert f"1 running job: {runs}" in output
    waits = own.python("print('my turn')", "--name", "after")
    waiting = own.until(waits, lambda job: job.reason is Reason.WAITING_FOR_DRAIN, 60, "it says what it waits for")
    assert waiting.message.startswith(f"could run, but {host} is drained by ")
    done.touch()
    assert own.ended(runs).state is JobState.SUCCEEDED
    assert f"{host}, is drained by " in own.good("status")
    assert own.good("drain", host, "--off").startswith(f"{host} accepts jobs again\n")
    assert own.ended(waits).state is JobState.SUCCEEDED


def test_a_drain_that_stops_jobs_requeues_them_and_they_resume(own: Cluster) -> None:
    host = host_of(own)
    job = own.python(SAVES, "--name", "saves")
    own.ready(job)
    own.good("drain", host, "--stop", "--wait")
    queued = own.until(job, lambda seen: seen.state is JobState.QUEUED, 60, "it is queued again")
    assert queued.attempts[0].reason is Reason.HOST_DRAINED
    own.good("drain", host, "--off")
    assert own.ended(job).state is JobState.SUCCEEDED
    assert own.good("logs", job, "--attempt", "1").split() == ["ready", "saved", "7"]
    assert own.log(job) == b"goes on at 7\n"


def test_down_with_stop_ends_all_processes_and_the_next_up_resumes_the_jobs(own: Cluster, tmp_path: Path) -> None:
    job = own.python(SAVES, "--name", "stops")
    own.ready(job)
    refused = own.cli("down")
    assert refused.status == 1
    assert "raylaunch down --stop" in refused.err
    left = process_that_a_plain_job_leaves(own, tmp_path / "left.pid")
    record = own.record()
    assert "is down" in own.good("down", "--stop")
    assert not is_alive(left)
    assert not own.processes()
    assert all(is_free(port) for port in record.ports.values())
    assert Path(record.store, "tokens.json").exists()
    assert json.loads(own.good("status", "--json"))["state"] == "stopped"
    own.good("up")
    assert own.ended(job, timeout_s=120).state is JobState.SUCCEEDED
    assert own.good("logs", job, "--attempt", "1").split() == ["ready", "saved", "7"]
    assert own.job(job).attempts[0].reason is Reason.CLUSTER_DOWN


def process_that_a_plain_job_leaves(cluster: Cluster, written: Path) -> ProcessIdentity:
    """Submit a job to Ray itself whose child has a session of its own, and return that child."""
    script = f"setsid sh -c 'echo $$ > {written}.new; mv {written}.new {written}; exec sleep 1000' & exec sleep 1000"
    submit_plain(cluster, "leaves", ["sh", "-c", script])
    wait_until(written.exists, 120, "the job's child")
    child = identify(int(written.read_text()))
    assert child is not None
    return child


@pytest.mark.long
def test_another_ray_version_is_started_only_on_request_and_without_running_jobs(own: Cluster) -> None:
    job = own.python(SAVES, "--name", "runs")
    own.ready(job)
    before = own.ray_pid()
    text = own.paths.record.read_text()
    installed = own.record().versions.ray
    own.paths.record.write_text(text.replace(f'"ray": "{installed}"', '"ray": "2.59.1"'))
    refused = own.cli("up")
    assert refused.status == 1
    assert f"runs Ray 2.59.1, but Ray {installed} is installed here" in refused.err
    assert "raylaunch up --upgrade" in refused.err
    assert own.ray_pid() == before
    own.good("up", "--upgrade", "--stop", timeout_s=240)
    assert own.record().versions.ray == installed
    assert own.ray_pid() != before
    assert own.ended(job, timeout_s=120).state is JobState.SUCCEEDED
    assert own.job(job).attempts[0].reason is Reason.CLUSTER_DOWN


def test_a_newer_raylaunch_replaces_the_controller_and_the_node_agents_while_a_job_runs(
    own: Cluster, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "raylaunch", tmp_path / "raylaunch", ignore=shutil.ignore_patterns("__pycache__"))
    version = tmp_path / "raylaunch" / "version.py"
    version.write_text(version.read_text().replace(f'"{__version__}"', '"99.0.0"'))
    go_on = tmp_path / "go on"
    waits = f"import os, time\nprint('ready', flush=True)\nwhile not os.path.exists({str(go_on)!r}): time.sleep(0.1)"
    job = own.python(waits, "--name", "upgraded")
    own.ready(job)
    ray, controller = own.ray_pid(), own.controller_pid()
    newer = own.cli("up", env={"PYTHONPATH": str(tmp_path)}, timeout_s=240)
    assert newer.status == 0, newer.err
    assert own.ray_pid() == ray
    assert own.controller_pid() != controller
    assert own.ask(lambda client: client.status()).version == "99.0.0"
    go_on.touch()
    ended = own.ended(job)
    assert (ended.state, len(ended.attempts)) == (JobState.SUCCEEDED, 1)
    after = own.python("print('after')", "--name", "after")
    assert own.ended(after).state is JobState.SUCCEEDED
    older = own.cli("up")
    assert older.status == 1
    assert f"cluster local was started by raylaunch 99.0.0, and this is {__version__}" in older.err
