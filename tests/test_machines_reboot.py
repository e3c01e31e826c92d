"""Hosts are switched off and on again: cluster, queue and interrupted jobs come back, and nobody runs `up`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.fittings import bare_world
from support.hosts import World
from support.terminal import Laptop
from support.waiting import wait_until

pytestmark = [pytest.mark.machines, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(1500)]

FILE = """\
name: lab
cpus: 4
hosts:
  - {host: h1, gpus: 0}
  - {host: h2, gpus: 2}
"""
COUNTS = "for step in $(seq 100000); do echo $RAYLAUNCH_ATTEMPT:$step; sleep 0.5; done"


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with bare_world(2) as made:
        yield made


@pytest.fixture(scope="module")
def laptop(lab: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    made = Laptop(lab, tmp_path_factory.mktemp("laptop"), FILE)
    made.call("up", limit_s=600)
    yield made
    made.call("down", "--force", limit_s=300, check=False)


def job(laptop: Laptop, ref: str) -> dict[str, Any]:
    """Return what is said of a job; nothing while the cluster cannot be asked."""
    done = laptop.call("show", ref, "--json", check=False)
    found = json.loads(done.stdout) if done.returncode == 0 else {}
    assert found.get("state") != "lost", found
    assert isinstance(found, dict)
    return found


def running(laptop: Laptop, ref: str, attempt: int) -> bool:
    found = job(laptop, ref)
    return found.get("state") == "running" and not found["unreachable"] and found["attempts"][-1]["n"] == attempt


def last_step(laptop: Laptop, ref: str) -> tuple[int, int]:
    """Return the attempt and the step that the job's log ends with."""
    lines = laptop.call("logs", ref, "--tail", "1", check=False).stdout.split()
    attempt, _, step = (lines[-1] if lines else "0:0").partition(":")
    return int(attempt), int(step)


def test_a_head_that_is_switched_off_and_on_brings_back_cluster_queue_and_jobs(laptop: Laptop, lab: World) -> None:
    head = lab.hosts[0]
    count = ("submit", "--host", "h2", "--gpus", "2", "--retries", "1", "--shell", COUNTS)
    goes_on = laptop.call(*count, "--name", "goes-on").stdout.strip()
    waits = laptop.call(*count, "--name", "waits").stdout.strip()
    wait_until(lambda: running(laptop, goes_on, 1), 120, "the first runs")
    assert job(laptop, waits)["state"] == "queued"

    head.power_off()
    reported = laptop.call("status", limit_s=60, check=False)
    assert "degraded" in reported.stdout
    assert "h1" in reported.stdout + reported.stderr
    assert "lost" not in (reported.stdout + reported.stderr).replace("connection to h1 was lost", "").replace(
        "lost the connection to h1", ""
    )
    time.sleep(10)  # the worker's Ray and its job must outlast a while without a head, not a moment
    head.boot()

    wait_until(lambda: laptop.living() == {"h1", "h2"}, 300, "the cluster is back")
    wait_until(lambda: running(laptop, goes_on, 1), 120, "the first runs in the same attempt")
    before = last_step(laptop, goes_on)
    wait_until(lambda: last_step(laptop, goes_on) > before, 120, "it goes on")
    assert before[1] > 20, "it went on while the head was off"
    assert job(laptop, waits)["state"] == "queued"
    laptop.call("stop", goes_on)
    wait_until(lambda: running(laptop, waits, 1), 120, "the one that waited has its turn")


def test_a_worker_that_is_switched_off_and_on_has_its_interrupted_job_tried_again(laptop: Laptop, lab: World) -> None:
    worker = lab.hosts[1]
    wait_until(lambda: last_step(laptop, "waits") > (1, 3), 60, "it has come some way")
    worker.power_off()
    wait_until(lambda: not running(laptop, "waits", 1), 180, "it is seen that the worker is gone")
    worker.boot()
    wait_until(lambda: laptop.living() == {"h1", "h2"}, 300, "the worker is back")
    wait_until(lambda: running(laptop, "waits", 2), 300, "it is tried again")
    wait_until(lambda: last_step(laptop, "waits") > (2, 3), 60, "its second attempt counts")
    laptop.call("stop", "waits")
