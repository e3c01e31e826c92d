"""The test world itself: that its hosts are what tests take them for."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fittings
from support.hosts import Host, World, world
from support.waiting import wait_until

from raylaunch.ssh.host import machine

pytestmark = [pytest.mark.machines, pytest.mark.long]


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with world(2) as made:
        yield made


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def answers(host: Host) -> bool:
    """Whether its sshd can be reached from here."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex((host.address, 22)) == 0


@pytest.mark.anyio
async def test_a_host_is_entered_over_ssh_with_the_laptops_configuration_alone(lab: World) -> None:
    async with machine(lab.hosts[0].target()) as there:
        assert (await there.run(["hostname"], limit_s=10)).text == "h1"


def test_hosts_know_each_others_names_and_have_no_route_out(lab: World) -> None:
    first, second = lab.hosts
    assert first.out("getent hosts h2").split()[0] == second.address
    assert "default" not in first.out("ip route; ip -6 route")


def test_a_host_sees_nothing_of_this_machines_own(lab: World) -> None:
    host = lab.hosts[0]
    host.write("/root/mine", "x")
    assert host.out("ls -A /root /home /work /opt 2>/dev/null | grep -v '^/' | sort -u").split() == [
        ".bashrc",
        ".profile",
        ".ssh",
        "mine",
    ]
    assert lab.hosts[1].run("ls /root/mine", check=False).status != 0


def test_a_host_that_was_powered_off_has_its_files_again_and_nothing_else() -> None:
    with world(1) as own:
        host = own.hosts[0]
        host.run("echo kept > /root/a; echo kept > /etc/b; echo gone > /tmp/c; sleep 1000 >/dev/null 2>&1 &")
        host.power_off()
        assert not answers(host)
        host.boot()
        assert answers(host)
        assert host.out("cat /root/a /etc/b; ls /tmp") == "kept\nkept"
        assert "sleep 1000" not in host.out("ps -ef | grep -v grep")


def test_a_cut_link_loses_everything_in_both_directions_until_it_is_mended() -> None:
    with world(1) as own:
        host = own.hosts[0]
        host.cut()
        assert not answers(host)
        assert host.run(f"timeout 2 bash -c 'echo > /dev/tcp/{own.front.four}.1/22'", check=False).status == 124
        host.restore()
        assert answers(host)


def test_a_slowed_link_takes_the_time_it_was_given_and_carries_everything(lab: World) -> None:
    host = lab.hosts[0]
    host.slow(rtt_ms=200)
    started = time.monotonic()
    assert answers(host)
    assert time.monotonic() - started >= 0.2
    copied = subprocess.run(
        ["ssh", "-F", str(lab.config), "h1", "head -c 3000000 /dev/zero | tee /root/zeros"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert len(copied.stdout) == 3_000_000
    host.cut()
    assert not answers(host)
    host.fast()
    wait_until(lambda: answers(host), 20, "the plain link is whole again")


@pytest.mark.anyio
async def test_a_host_of_the_back_network_is_reached_by_way_of_the_front_one_alone() -> None:
    with world() as own:
        own.host("gate", networks=("front", "back"))
        inner = own.host("inner", networks=("back",), jump="gate")
        assert not answers(inner)
        async with machine(inner.target()) as there:
            assert (await there.run(["hostname"], limit_s=10)).text == "inner"


@pytest.mark.anyio
async def test_an_ordinary_user_has_her_own_key_and_home_and_no_rights(lab: World) -> None:
    host = lab.hosts[0]
    fittings.add_user(host, "alice")
    async with machine(host.target("alice")) as there:
        assert (await there.run(["id", "-un"], limit_s=10)).text == "alice"
        assert (await there.run(["ls", "/root"], limit_s=10, check=False)).status != 0


@pytest.mark.anyio
async def test_a_hosts_clock_is_off_for_all_that_is_started_over_ssh() -> None:
    with world(1) as own:
        fittings.shift_clock(own.hosts[0], "-90m")
        async with machine(own.hosts[0].target()) as there:
            seen = float((await there.run(["date", "+%s"], limit_s=10)).text)
        assert seen == pytest.approx(time.time() - 5400, abs=30)


def test_a_host_has_the_one_python_it_was_given_or_none() -> None:
    prefix = fittings.find_python("3.10")
    with world() as own:
        other = own.host(share={prefix: fittings.PYTHON})
        fittings.only_python(prefix, other)
        assert other.out("python3 -c 'import ssl, sys; print(sys.version_info[:2])'") == "(3, 10)"
        assert other.out("ls /usr/bin/python3* | wc -l") == "2"
        none = own.host()
        fittings.no_python(none)
        assert none.run("command -v python3 python", check=False).status != 0


def test_a_host_shows_the_gpus_of_a_dgx_to_whom_asks_nvidia_smi(lab: World) -> None:
    host = lab.hosts[1]
    fittings.give_gpus(host, fittings.DGX_SPARK, users=[(0, 1, "python")])
    asked = "nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader,nounits"
    assert host.out(asked) == "0, NVIDIA GB10, [N/A]"
    assert fittings.gpu_uuid(host, 0) in host.out("nvidia-smi -L")
    fittings.break_gpus(host, "Failed to initialize NVML: Driver/library version mismatch", 18)
    assert host.run(asked, check=False).status == 18


def test_a_small_disk_can_be_filled_and_keeps_its_files_over_a_reboot() -> None:
    with world() as own:
        host = own.host(disk_mib=24)
        host.write("/root/kept", "kept")
        fittings.fill_disk(host, but_mib=1)
        assert "No space left" in host.run("head -c 3000000 /dev/zero > /root/more", check=False).err
        host.reboot()
        assert host.out("cat /root/kept") == "kept"


def test_somebody_elses_ray_runs_on_a_host_and_on_no_other(lab: World) -> None:
    with world() as own:
        host = own.host(share=fittings.this_python())
        fittings.add_user(host, "bob")
        fittings.start_foreign_ray(host, user="bob")
        assert len(fittings.ray_processes(host)) == 2
    assert not fittings.ray_processes(lab.hosts[0])


_KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from support.hosts import world
with world(1) as made:
    print(made.folder, made.hosts[0].pid, made.front.bridge, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_test_run_left_is_gone_when_the_next_begins(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    words = [sys.executable, str(script), str(Path(__file__).parent)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        folder, pid, bridge = run.stdout.readline().split()
        run.send_signal(signal.SIGKILL)
        run.wait(10)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), 20, "the host has ended with the test run")
    with world():
        assert not Path(folder).exists()
        assert not Path(f"/sys/class/net/{bridge}").exists()
