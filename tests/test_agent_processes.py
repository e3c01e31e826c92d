from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from support.waiting import wait_until

from raylaunch.agent.processes import end_processes, processes_of, runner_alive, started_ticks
from raylaunch.contract import VAR_ATTEMPT, Claim
from raylaunch.runner.processes import boot_id

FAMILY = """
import os, sys, time
for depth in range(3):
    if os.fork() == 0:
        os.setsid()
time.sleep(600)
"""


@pytest.fixture
def tag() -> Iterator[str]:
    name = f"test-{os.getpid()}/job-1"
    yield name
    end_processes(name, None)


def start(tag: str, program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], env={**os.environ, VAR_ATTEMPT: tag})


def claim_of(pid: int) -> Claim:
    ticks = started_ticks(pid)
    assert ticks is not None
    return Claim(epoch="e", pid=pid, started_ticks=ticks, boot_id=boot_id(), at=time.time())


def test_children_that_called_setsid_are_ended_with_their_attempt(tag: str) -> None:
    first = start(tag, FAMILY)
    wait_until(lambda: len(set(processes_of(tag))) == 8, 60, "eight processes in sessions of their own")
    assert end_processes(tag, None) == 8
    first.wait(10)
    assert not set(processes_of(tag))


def test_a_process_of_another_attempt_is_left_alone(tag: str) -> None:
    other = start(f"{tag}2", "import time; time.sleep(600)")
    wait_until(lambda: set(processes_of(f"{tag}2")), 60, "the other attempt's process")
    assert end_processes(tag, None) == 0
    assert other.poll() is None
    end_processes(f"{tag}2", None)
    other.wait(10)


def test_the_runner_named_by_the_claim_is_ended_though_it_has_no_tag(tag: str) -> None:
    runner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    claim = claim_of(runner.pid)
    assert runner_alive(claim)
    assert end_processes(tag, claim) == 1
    runner.wait(10)
    assert not runner_alive(claim)


def test_a_claim_of_a_runner_of_0_1_0_names_the_boot_alone() -> None:
    claim = claim_of(os.getpid())
    claim["boot_id"] = claim["boot_id"].partition(":")[0]
    assert runner_alive(claim)


@pytest.mark.parametrize(
    "change", [{"started_ticks": 1}, {"boot_id": "another boot"}, {"boot_id": f"{boot_id()}of-another-namespace"}]
)
def test_a_pid_that_was_used_again_is_not_the_runner(tag: str, change: dict[str, object]) -> None:
    innocent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    claim: Claim = {**claim_of(innocent.pid), **change}  # type: ignore[typeddict-item]  # one field is wrong on purpose
    assert not runner_alive(claim)
    assert end_processes(tag, claim) == 0
    assert innocent.poll() is None
    innocent.kill()
    innocent.wait(10)


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: started_ticks(child.pid) is None, 60, "the child is a zombie")
    child.wait(10)
