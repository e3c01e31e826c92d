"""``raylaunch doctor``: of this machine, of hosts over a real sshd, and what is printed of what was found."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.cli import run_cli
from support.facts import facts
from support.nvidia import dgx_h100
from support.sshd import Sshd, free_port, sshd
from support.trust import trusted

from raylaunch.cli.doctor import doctor_lines
from raylaunch.cluster.doctor.examine import Findings
from raylaunch.cluster.doctor.problem import Problem, blocking, warning

NO_PIP = str(Path(__file__).parent / "data/no_pip")


def doctor(folder: Path, *words: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAYLAUNCH_")}
    accepted = trusted(folder / "cluster.yaml")
    environ = {**kept, "RAYLAUNCH_HOME": str(folder / "rl"), "PYTHONPATH": NO_PIP, **accepted, **(env or {})}
    return run_cli(words, cwd=folder, env=environ, timeout_s=120)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Sshd]:
    """A host, which the account that runs the test reaches as ``here`` by its ``~/.ssh/config``."""
    with sshd(tmp_path / "sshd") as served:
        served.trust()
        served.config(
            f"Host here again\n  HostName 127.0.0.1\n  Port {served.port}\n  User {served.user}\n"
            f"  IdentityFile {served.key}\n"
        )
        yield served


def test_an_embedded_cluster_is_this_machine(tmp_path: Path) -> None:
    done = doctor(tmp_path, "doctor")
    assert (done.returncode, done.stderr) == (0, "")
    first, blank, titles, row, *_ = done.stdout.splitlines()
    assert first.startswith("cluster local: 1 host, nothing blocking")
    assert not blank
    assert titles.split() == ["HOST", "SYSTEM", "GPUS", "MEMORY", "FREE", "DISK", "PYTHON"]
    assert " ready " in row


def test_a_gpu_that_the_file_lists_and_this_machine_lacks_blocks_with_exit_status_1(tmp_path: Path) -> None:
    dgx_h100().install(tmp_path / "bin")
    (tmp_path / "cluster.yaml").write_text("gpus: [0, 11]\n")
    done = doctor(tmp_path, "doctor", env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert "it has no GPU 11; it has 0 (NVIDIA H100 80GB HBM3), 1 (" in done.stdout
    assert "[gpus_missing]\n    → list ids or UUIDs from: nvidia-smi -L\n" in done.stdout


def test_hosts_over_ssh_are_checked_in_parallel_and_a_bad_one_does_not_hide_the_others(
    host: Sshd, tmp_path: Path
) -> None:
    closed = free_port()
    text = f"name: lab\nhosts: [here, {{host: again, root: {tmp_path}/r}}, 'shut@127.0.0.1:{closed}']\n"
    (tmp_path / "cluster.yaml").write_text(text)
    done = doctor(tmp_path, "doctor", "--json", env={"HOME": str(host.home)})
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["hosts"] == ["here", "again", "127.0.0.1"]
    assert set(found["facts"]) == {"here", "again"}
    assert found["facts"]["here"]["user"] == host.user
    codes = {(one["host"], one["code"], one["level"]) for one in found["problems"]}
    assert {("127.0.0.1", "unreachable", "blocking"), ("again", "same_machine", "blocking")} <= codes
    assert [one["level"] for one in found["problems"]] == sorted(one["level"] for one in found["problems"])


def test_an_unknown_host_key_is_shown_and_the_host_is_not_queried(host: Sshd, tmp_path: Path) -> None:
    host.known_hosts.write_text("")
    (tmp_path / "cluster.yaml").write_text("name: lab\nhosts: [here]\n")
    done = doctor(tmp_path, "doctor", env={"HOME": str(host.home)})
    assert done.returncode == 1
    assert "here  blocked  not checked" in done.stdout
    assert "[host_key]" in done.stdout
    assert "SHA256:" in done.stdout


def test_ignored_keys_of_rays_own_file_are_reported_with_the_findings(host: Sshd, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(
        "cluster_name: lab\nprovider: {type: local, head_ip: here}\nsetup_commands: [pip install torch]\n"
    )
    done = doctor(tmp_path, "doctor", env={"HOME": str(host.home)})
    assert done.stdout.startswith("cluster lab: 1 host, ")
    assert done.stderr.startswith("cluster.yaml:3: setup_commands is ignored: it is not run")


def findings(*problems: Problem) -> Findings:
    return Findings(
        cluster="lab",
        kind="ssh",
        hosts=("dgx-1", "spark-1", "gone"),
        facts={"dgx-1": facts(), "spark-1": facts("spark")},
        problems=problems,
    )


def test_the_table_lists_the_hosts_and_problems_follow_with_their_fixes() -> None:
    lines = list(
        doctor_lines(
            findings(
                blocking("gone", "unreachable", "nobody listens on port 22", "is sshd running there?"),
                warning("spark-1", "reboot_due", "it waits for a reboot", "reboot it"),
                warning("", "architectures_differ", "the hosts are of different architectures"),
            )
        )
    )
    cells = [re.split(r"  +", line) for line in lines[2:6]]
    assert lines[0] == "cluster lab: 3 hosts, 1 blocking problem, 2 warnings"
    assert cells == [
        ["HOST", "SYSTEM", "GPUS", "MEMORY", "FREE DISK", "PYTHON"],
        [
            *("dgx-1", "ready", "DGX OS 6.2.1, x86_64", "8 NVIDIA H100 80GB HBM3 (driver 550.54.15)"),
            *("2.0 TiB", "1.2 TiB", "3.10, 3.12"),
        ],
        [
            *("spark-1", "ready", "DGX OS 7.2.3, aarch64", "1 NVIDIA GB10 (driver 580.95.05)"),
            *("119.0 GiB unified", "2.9 TiB", "3.12"),
        ],
        ["gone", "blocked", "not checked"],
    ]
    assert lines[7:] == [
        "✗ gone: nobody listens on port 22 [unreachable]",
        "    → is sshd running there?",
        "! spark-1: it waits for a reboot [reboot_due]",
        "    → reboot it",
        "! the hosts are of different architectures [architectures_differ]",
    ]
