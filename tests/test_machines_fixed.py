"""A whole `raylaunch up` where most of five hosts are in trouble, and another one when they are fixed.

Two are wrong from the beginning (an hour off; no Python), two become so while wheels are pushed (its disk is full; its
link is cut for a while). The words for hosts of which none can be used are in test_machines_refused.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from support.fittings import (
    bare_python,
    crowd_disk,
    hide_python,
    ray_processes,
    resize_disk,
    right_clock,
    shift_clock,
    show_python,
)
from support.hosts import World, world
from support.terminal import Laptop, WatchedRun

pytestmark = [pytest.mark.machines, pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]

NAMES = ("h1", "late", "bare", "full", "far")
FILE = f"name: lab\ngpus: 1\ncpus: 1\nhosts: [{', '.join(NAMES)}]\n"
UP_S = 400
QUIET_S = 10
DISK_MIB = 4096
CUT_S = 15.0
TROUBLE = {
    "late": ("late: its clock is 1 h 0 m ahead of this machine's", "sudo timedatectl set-ntp true"),
    "bare": ("bare: it has no Python from 3.10 to 3.14", "sudo apt install python3"),
    "full": (
        "full: the disk is full (push wheels): ",
        "free some space there, or give raylaunch a folder on another disk",
    ),
}
"""By host: what is wrong, and its fix."""


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with world() as made:
        for name in NAMES:
            bare_python(made.host(name, disk_mib=DISK_MIB if name == "full" else None))
        _, late, bare, *_ = made.hosts
        shift_clock(late)
        hide_python(bare)
        yield made


@pytest.fixture(scope="module")
def laptop(lab: World, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    return Laptop(lab, tmp_path_factory.mktemp("laptop"), FILE)


@pytest.fixture(scope="module")
def first(laptop: Laptop, lab: World) -> WatchedRun:
    """The first `up`; two hosts get into trouble as soon as something of their wheels has arrived."""
    *_, full, far = lab.hosts
    left = {"full", "far"}

    def trouble(line: str) -> bool:
        name, _, rest = line.partition(": ")
        if name in left and rest.startswith("push: pushed"):
            left.remove(name)
            if name == "full":
                crowd_disk(full)
            else:
                far.cut()
                threading.Timer(CUT_S, far.restore).start()
        return False

    result = laptop.watch("up", limit_s=UP_S, kill_at=trouble)
    assert not left, result.err
    far.restore()
    return result


@pytest.fixture(scope="module")
def left(lab: World, first: WatchedRun) -> dict[str, str]:
    """What is in raylaunch's folder on the hosts in trouble after the first `up`, environments included."""
    assert first.status == 1
    look = "cd /root/.raylaunch && for one in versions/* *; do [ ! -e $one ] || basename $one; done || true"
    return {host.name: host.out(look) for host in lab.hosts if host.name in TROUBLE}


@pytest.fixture(scope="module")
def second(laptop: Laptop, lab: World, left: dict[str, str]) -> WatchedRun:
    """The next `up`, after all is fixed."""
    assert left
    _, late, bare, full, _ = lab.hosts
    right_clock(late)
    show_python(bare)
    resize_disk(full, DISK_MIB)
    return laptop.watch("up", limit_s=UP_S)


@pytest.mark.parametrize("name", list(TROUBLE))
def test_a_host_with_problems_is_reported_with_its_fix_and_the_others_come_up(first: WatchedRun, name: str) -> None:
    wrong, mend = TROUBLE[name]
    lines = [line.strip() for line in first.err.splitlines()]
    at = max(number for number, line in enumerate(lines) if line.startswith(wrong))
    assert mend in lines[at + 1]
    assert first.status == 1
    assert "h1" in first.err.partition("hosts failed; ")[2].partition(" came up")[0]


def test_a_disk_that_becomes_full_is_reported_with_its_folder_and_free_space(first: WatchedRun) -> None:
    (words,) = {line.strip() for line in first.err.splitlines() if line.strip().startswith("full: the disk is full")}
    assert "/root/.raylaunch/wheels" in words
    assert words.endswith(" KiB free on /root")


def test_a_link_that_is_back_after_a_while_is_borne_or_its_host_is_named(first: WatchedRun) -> None:
    came_up = first.err.partition("hosts failed; ")[2].partition(" came up")[0].split(", ")
    assert "far" in came_up or "the connection to far was lost during: push" in first.err


def test_nothing_is_silent_for_ten_seconds_whatever_is_wrong(first: WatchedRun, second: WatchedRun) -> None:
    assert first.silence_s < QUIET_S, first.lines
    assert second.silence_s < QUIET_S, second.lines


def test_what_was_begun_on_a_host_in_trouble_is_not_taken_for_done(left: dict[str, str]) -> None:
    assert left == {"late": "", "bare": "", "full": "wheels"}


def test_the_next_up_has_all_of_them_and_leaves_what_was_well(second: WatchedRun, laptop: Laptop, lab: World) -> None:
    assert second.status == 0, second.err
    assert laptop.living() == set(NAMES)
    assert "h1: ray: starting" not in second.err
    laptop.call("down", limit_s=120)
    assert not any(ray_processes(host) for host in lab.hosts)
