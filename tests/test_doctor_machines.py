"""``raylaunch doctor`` on hosts that run nothing but sshd: what is wrong with each is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fittings import (
    DGX_H100,
    DGX_SPARK,
    add_user,
    break_gpus,
    fill_disk,
    give_gpus,
    no_python,
    noisy_shell,
    shift_clock,
)
from support.hosts import World, world
from support.trust import trusted

from raylaunch.cluster.doctor.examine import Findings

pytestmark = [pytest.mark.machines, pytest.mark.long, pytest.mark.timeout(300)]


def doctor(lab: World, folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor at the laptop."""
    folder.mkdir(exist_ok=True)
    (folder / "cluster.yaml").write_text(text)
    env = {key: value for key, value in os.environ.items() if key not in {"SSH_AUTH_SOCK", "RAYLAUNCH_CLUSTER_FILE"}}
    return subprocess.run(
        [sys.executable, "-m", "raylaunch", "doctor", *words],
        cwd=folder,
        env={**env, "HOME": str(lab.home), "RAYLAUNCH_HOME": str(folder / "rl"), **trusted(folder / "cluster.yaml")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture(scope="module")
def found(lab: World, tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Six hosts, each wrong in its own way but the first, looked at once."""
    dgx = lab.host("dgx")
    give_gpus(dgx, DGX_H100, users=[(3, 1, "sshd")])
    spark = lab.host("spark")
    give_gpus(spark, DGX_SPARK)
    no_python(spark)
    late = lab.host("late")
    shift_clock(late)
    noisy_shell(late)
    broken = lab.host("broken", shm_mib=64, disk_mib=512)
    break_gpus(broken, "Failed to initialize NVML: Driver/library version mismatch")
    fill_disk(broken, but_mib=100)
    shared = lab.host("shared")
    add_user(shared, "anna")
    lab.host("gone", boot=False)
    key = shared.users["anna"]
    text = f"""\
name: lab
hosts:
  - dgx
  - spark
  - late
  - broken
  - {{host: anna@shared, key: {key}, root: /opt/raylaunch}}
  - gone
"""
    done = doctor(lab, tmp_path_factory.mktemp("laptop"), text, "--json")
    assert done.returncode == 1, done.stderr
    return Findings.model_validate(json.loads(done.stdout))


def codes(found: Findings, host: str, level: str) -> set[str]:
    return {one.code for one in found.of(host) if one.level == level}


def test_a_healthy_dgx_is_ready_and_users_of_gpus_are_named(found: Findings) -> None:
    assert codes(found, "dgx", "blocking") == set()
    (busy,) = [one for one in found.of("dgx") if one.code == "gpus_busy"]
    assert busy.message.startswith("GPU 3 (NVIDIA H100 80GB HBM3) is used by sshd (pid 1, user root)")
    assert "index_unreachable" in codes(found, "dgx", "warning")


def test_a_host_without_python_is_checked_too(found: Findings) -> None:
    assert "python_missing" in codes(found, "spark", "blocking")
    (gpu,) = found.facts["spark"].gpus.gpus
    assert (gpu.name, gpu.memory_total) == ("NVIDIA GB10", None)
    assert found.facts["spark"].memory.unified


def test_a_clock_that_is_an_hour_ahead_blocks_behind_a_noisy_login_shell_too(found: Findings) -> None:
    (clock,) = [one for one in found.of("late") if one.code == "clock_off"]
    assert (clock.level, clock.message) == ("blocking", "its clock is 1 h 0 m ahead of this machine's")


def test_a_broken_driver_a_full_disk_and_little_shared_memory_are_all_reported(found: Findings) -> None:
    assert {"driver_broken", "disk_low"} <= codes(found, "broken", "blocking")
    assert "shm_small" in codes(found, "broken", "warning")


def test_an_ordinary_account_is_reported_with_its_missing_permissions(found: Findings) -> None:
    facts = found.facts["shared"]
    assert (facts.user, facts.sudo in {"no", None}) == ("anna", True)
    (wrong,) = [one for one in found.of("shared") if one.code == "root_not_writable"]
    assert wrong.message == (
        "/opt/raylaunch, or its nearest existing parent, cannot be written by anna (of root, mode 755)"
    )


def test_a_host_that_is_off_is_unreachable_and_the_others_are_reported(found: Findings) -> None:
    assert codes(found, "gone", "blocking") == {"unreachable"}
    assert set(found.facts) == {"dgx", "spark", "late", "broken", "shared"}


def test_each_host_was_reached_at_its_own_address(lab: World, found: Findings) -> None:
    assert {name: facts.reached_at for name, facts in found.facts.items()} == {
        host.name: host.address for host in lab.hosts if host.name in found.facts
    }


def test_hosts_that_share_a_kernel_are_counted_separately(found: Findings) -> None:
    assert not [one for one in found.problems if one.code in {"same_machine", "root_shared"}]


def test_no_files_remain_on_the_hosts(lab: World, found: Findings) -> None:
    assert found.facts
    for host in lab.hosts:
        if host.is_on:
            assert host.out("ls -A /tmp; ls -Ad /root/.raylaunch 2>/dev/null || true").split() == []
