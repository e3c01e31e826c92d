"""A drained host on a real cluster; and a cluster that goes down while jobs run, which stop as they wish."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.cluster import Cluster, running_cluster

from raylaunch.reasons import Reason
from raylaunch.state import JobState

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]

SAVES = (
    "import os, pathlib, signal, sys, time\n"
    "kept = pathlib.Path(os.environ['RAYLAUNCH_CHECKPOINT_DIR'], 'at')\n"
    "def save(*_):\n"
    "    kept.write_text('7')\n"
    "    print('saved', flush=True)\n"
    "    sys.exit(0)\n"
    "if kept.exists():\n"
    "    print('goes on at', kept.read_text(), flush=True)\n"
    "    sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, save)\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)"
)


@pytest.fixture(scope="module")
def own() -> Iterator[Cluster]:
    """A cluster of this file's own: what is drained here would stand in others' way."""
    with running_cluster() as made:
        yield made


def host_of(cluster: Cluster) -> str:
    return cluster.ask(lambda client: client.status()).nodes[0].hostname


def test_a_drained_host_lets_jobs_end_and_begins_none_until_it_takes_jobs_again(own: Cluster) -> None:
    host = host_of(own)
    done = own.work / "done"
    runs = own.python(f"import os, time\nwhile not os.path.exists({str(done)!r}): time.sleep(0.1)", "--name", "before")
    own.runs(runs)
    said = own.good("drain", host, "--until", "2h")
    assert said.startswith(f"{host} is drained by ")
    assert f"there 1 job runs: {runs}" in said
    waits = own.python("print('my turn')", "--name", "after")
    waiting = own.until(waits, lambda job: job.reason is Reason.WAITING_FOR_DRAIN, 20, "it says what it waits for")
    assert waiting.message.startswith(f"could run, but {host} is drained by ")
    done.touch()
    assert own.ended(runs).state is JobState.SUCCEEDED
    assert f"{host}, is drained by " in own.good("status")
    assert own.good("drain", host, "--off") == f"{host} takes jobs again\n"
    assert own.ended(waits).state is JobState.SUCCEEDED


def test_a_drain_that_stops_jobs_queues_them_again_and_they_go_on_where_they_were(own: Cluster) -> None:
    host = host_of(own)
    job = own.python(SAVES, "--name", "saves")
    own.until(job, lambda seen: b"ready" in own.log(seen.id) if seen.attempts else False, 60, "it is ready")
    own.good("drain", host, "--stop", "--wait")
    queued = own.until(job, lambda seen: seen.state is JobState.QUEUED, 60, "it is queued again")
    assert queued.attempts[0].reason is Reason.HOST_DRAINED
    own.good("drain", host, "--off")
    assert own.ended(job).state is JobState.SUCCEEDED
    assert own.good("logs", job, "--attempt", "1").split() == ["ready", "saved"]
    assert own.log(job) == b"goes on at 7\n"


def test_down_with_stop_ends_jobs_as_they_wish_and_the_next_up_goes_on_with_them(own: Cluster) -> None:
    job = own.python(SAVES, "--name", "stops")
    own.until(job, lambda seen: b"ready" in own.log(seen.id) if seen.attempts else False, 60, "it is ready")
    refused = own.cli("down")
    assert refused.status == 1
    assert "raylaunch down --stop" in refused.err
    assert "is down" in own.good("down", "--stop")
    own.good("up")
    assert own.ended(job, timeout_s=120).state is JobState.SUCCEEDED
    assert own.good("logs", job, "--attempt", "1").split() == ["ready", "saved"]
    assert own.job(job).attempts[0].reason is Reason.HOST_DRAINED
