"""The check of a cluster's network between its hosts: real processes on addresses of loopback, and what they say."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raylaunch.runner.archive import runner_zip
from raylaunch.runner.netcheck import MARK, OPTION

QUICK = {"run": "test", "interface": "lo", "bytes": 3_000_000, "meet_s": 4, "quiet_s": 2, "whole_s": 20}
NO_TORCH = "import sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv.pop(1)); "
MAIN = "from raylaunch.runner.netcheck import main; main(sys.argv[1:])"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runner") / "runner.pyz"
    path.write_bytes(runner_zip())
    return path


class Run:
    """Members that meet, as processes. Each is on an address of its own: rank 0 on 127.0.0.11, and so on."""

    def __init__(self, archive: Path, count: int) -> None:
        self.archive = archive
        self.members = [
            [f"h{rank}", f"127.0.0.{11 + rank}", free_port(f"127.0.0.{11 + rank}")] for rank in range(count)
        ]
        self.started: dict[int, subprocess.Popen[str]] = {}

    def start(self, rank: int, program: str = NO_TORCH + MAIN, **changes: object) -> subprocess.Popen[str]:
        plan = {**QUICK, "rank": rank, "members": self.members, **changes}
        words = [sys.executable, "-c", program, str(self.archive), OPTION, json.dumps(plan)]
        env = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
        self.started[rank] = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        return self.started[rank]

    def ended(self, rank: int) -> dict[str, Any]:
        out, err = self.started[rank].communicate(timeout=120)
        assert MARK in out, f"rank {rank} said {out!r} and {err!r}"
        found = json.loads(out.rsplit(MARK, 1)[1])
        assert self.started[rank].returncode == (0 if found["kind"] == "done" else 1)
        assert isinstance(found, dict)
        return found


@contextmanager
def running(archive: Path, count: int) -> Iterator[Run]:
    run = Run(archive, count)
    try:
        yield run
    finally:
        for process in run.started.values():
            process.kill()
            process.communicate()


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_pair_exchanges_bytes_over_tcp(archive: Path, count: int) -> None:
    with running(archive, count) as run:
        for rank in range(count):
            run.start(rank)
        ends = [run.ended(rank) for rank in range(count)]
    assert [end["kind"] for end in ends] == ["done"] * count
    assert {end["over"] for end in ends} == {"TCP"}
    assert all(end["bytes_per_s"] > 0 for end in ends)


def test_a_member_that_never_comes_is_named_by_all_others(archive: Path) -> None:
    with running(archive, 3) as run:
        run.start(0)
        run.start(1)
        for rank in (0, 1):
            end = run.ended(rank)
            assert end["kind"] == "unmet"
            assert end["unreached"] == {"h2": "connection refused"}
            assert end["absent"] == ["h2"]


def test_of_a_pair_that_cannot_connect_both_say_so_and_the_third_names_no_address(archive: Path) -> None:
    """Each has the other's address wrong, as behind a firewall; both reach the third."""
    with running(archive, 3) as run:
        right = [list(member) for member in run.members]
        for rank, other in ((1, 2), (2, 1)):
            members = [list(member) for member in right]
            members[other][2] = free_port("127.0.0.1")
            run.start(rank, members=members)
        run.start(0)
        ends = [run.ended(rank) for rank in range(3)]
    assert [end["kind"] for end in ends] == ["unmet"] * 3
    assert ends[0]["unreached"] == {}
    assert ends[1]["unreached"] == {"h2": "connection refused"}
    assert ends[1]["absent"] == ["h2"]
    assert ends[2]["unreached"] == {"h1": "connection refused"}


def test_a_member_that_takes_connections_and_says_nothing_is_not_taken_for_one_that_has_come(archive: Path) -> None:
    with running(archive, 2) as run, socket.create_server(("127.0.0.12", run.members[1][2])):
        run.start(0, meet_s=1)
        assert run.ended(0)["unreached"] == {"h1": "it accepts the connection but sends nothing"}


def test_a_member_that_falls_silent_is_named_with_the_pair(archive: Path) -> None:
    silent = NO_TORCH + (
        "import os, signal; from raylaunch.runner import netcheck; "
        "netcheck.exchange = lambda *_: os.kill(os.getpid(), signal.SIGSTOP); " + MAIN
    )
    with running(archive, 3) as run:
        for rank in (0, 1):
            run.start(rank)
        stopped = run.start(2, silent)
        ends = [run.ended(rank) for rank in (0, 1)]
        stopped.send_signal(signal.SIGKILL)
    first = min(ends, key=lambda end: int(end["step"]))
    assert first["kind"] == "hop"
    assert "h2" in first["hop"]
    assert "nothing passed for 2 s, after 0 of" in first["why"]


def test_a_port_that_is_taken_is_said(archive: Path) -> None:
    with running(archive, 2) as run, socket.create_server(("127.0.0.11", run.members[0][2])):
        run.start(0)
        assert run.ended(0) == {"kind": "listen", "why": "address already in use"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch, which is not installed here")
def test_where_all_have_pytorch_it_adds_them_up_with_gloo(archive: Path) -> None:
    with running(archive, 2) as run:
        for rank in (0, 1):
            run.start(rank, "import sys; sys.path.insert(0, sys.argv.pop(1)); " + MAIN, meet_s=60)
        ends = [run.ended(rank) for rank in (0, 1)]
    assert [(end["kind"], end["over"]) for end in ends] == [("done", "gloo")] * 2, ends


def test_one_without_pytorch_makes_all_go_over_tcp(archive: Path) -> None:
    says_it_has = NO_TORCH + (
        "from raylaunch.runner import netcheck; netcheck.capabilities = lambda: {'torch': True, 'cuda': True}; " + MAIN
    )
    with running(archive, 2) as run:
        run.start(0, says_it_has)
        run.start(1)
        assert [run.ended(rank)["over"] for rank in (0, 1)] == ["TCP", "TCP"]
