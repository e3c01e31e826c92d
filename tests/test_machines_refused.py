"""`raylaunch up` where no host can be used: each is reported with what is wrong there, and nothing is done on any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fittings import fill_disk, no_python, noisy_shell, shift_clock
from support.hosts import World, world
from support.sshd import make_key
from support.terminal import Laptop, WatchedRun

pytestmark = [pytest.mark.machines, pytest.mark.timeout(300)]

QUIET_S = 10
WORDS = {
    "stranger": ("stranger refuses root: offered ", "ssh-copy-id -i "),
    "changed": ("changed ({address}:22) shows another host key than before: ED25519 SHA256:", "ssh-keygen -R"),
    "closed": ("closed ({address}:22) refuses connections: nothing listens on that port", "systemctl status ssh"),
    "gone": ("gone ({address}:22) cannot be reached: there is no route to it from here", "is it on"),
    "bare": ("bare: it has no Python from 3.10 to 3.14", "sudo apt install python3"),
    "late": ("late: its clock is 1 h 0 m ahead of this machine's", "sudo timedatectl set-ntp true"),
    "full": ("full: only 100 MiB are free on /root for raylaunch's folder, and 2.0 GiB are needed", "free some"),
}
"""By host: what is wrong, and the start of its fix."""


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with world() as made:
        made.host("stranger").run("rm /root/.ssh/authorized_keys")
        other = make_key(made.folder / "other_key")
        made.host("changed")
        key = other.with_name("other_key.pub").read_text().rsplit(" ", 1)[0]
        made.known_hosts.write_text(
            "".join(
                f"{line.split()[0]} {key}\n" if ",changed " in line else f"{line}\n"
                for line in made.known_hosts.read_text().splitlines()
            )
        )
        made.host("closed").run("kill $(cat /run/sshd.pid)")
        made.host("gone", boot=False)
        no_python(made.host("bare"))
        late = made.host("late")
        shift_clock(late)
        noisy_shell(late)
        full = made.host("full", disk_mib=512)
        fill_disk(full, but_mib=100)
        yield made


@pytest.fixture(scope="module")
def result(lab: World, tmp_path_factory: pytest.TempPathFactory) -> WatchedRun:
    names = [host.name for host in lab.hosts]
    laptop = Laptop(lab, tmp_path_factory.mktemp("laptop"), f"name: lab\nhosts: [{', '.join(names)}]\n")
    return laptop.watch("up", limit_s=120)


@pytest.mark.parametrize("name", list(WORDS))
def test_what_is_wrong_with_a_host_is_reported_with_its_fix(result: WatchedRun, lab: World, name: str) -> None:
    wrong, fix = WORDS[name]
    address = next(host.address for host in lab.hosts if host.name == name)
    lines = [line.strip() for line in result.err.splitlines()]
    at = max(number for number, line in enumerate(lines) if line.startswith(wrong.format(address=address)))
    assert lines[at + 1].startswith("→ ")
    assert fix in lines[at + 1]


def test_all_are_counted_and_the_exit_status_is_that_of_a_failure(result: WatchedRun) -> None:
    assert result.status == 1
    assert f"cluster lab: {len(WORDS)} of {len(WORDS)} hosts failed\n" in result.err
    assert result.silence_s < QUIET_S, result.lines


def test_nothing_was_done_on_any_host(result: WatchedRun, lab: World) -> None:
    assert result.status == 1
    for host in lab.hosts:
        if host.is_on:
            assert host.out("ls -A /root | grep raylaunch || true") == ""
