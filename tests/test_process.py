"""Processes that outlive us: started apart, recognised, and ended for certain."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import anyio
import psutil
import pytest
from support.signals import kill, send
from support.waiting import wait_until

from raylaunch.cluster.processes import ProcessIdentity, end, identify, is_alive, last_lines, matching, start_apart
from raylaunch.errors import ClusterStartError, StorageError

STAYS = (sys.executable, "-I", "-S", "-c", "import signal; print('up', flush=True); signal.pause()")
DEAF = (
    sys.executable,
    "-I",
    "-S",
    "-c",
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\nwhile True: signal.pause()",
)


class Starter:
    """Starts programs apart, and ends them after the test."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.started: list[ProcessIdentity] = []

    def __call__(self, *argv: str) -> ProcessIdentity:
        start = partial(start_apart, argv, env={"PATH": "/usr/bin:/bin", "MARK": "x"}, cwd=Path("/"), log=self.log)
        process = anyio.run(start)
        self.started.append(process)
        return process


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    starter = Starter(tmp_path / "log")
    yield starter
    for process in starter.started:
        send(process)


def wait_for_output(start: Starter) -> None:
    wait_until(lambda: "up" in last_lines(start.log), 60, "the program's first line")


def test_a_program_started_apart_leads_a_session_of_its_own_and_is_nobodys_child(start: Starter) -> None:
    process = start(*STAYS)
    assert os.getsid(process.pid) == process.pid
    wait_until(lambda: psutil.Process(process.pid).ppid() != os.getpid(), 60, "its launcher's end")
    assert process.pid not in [child.pid for child in psutil.Process().children()]


def test_what_it_prints_is_appended_to_a_log_that_only_we_can_read(start: Starter) -> None:
    start.log.write_text("before\n")
    start.log.unlink()
    start(*STAYS)
    wait_for_output(start)
    assert start.log.stat().st_mode & 0o777 == 0o600


def test_it_makes_files_that_only_we_can_read(start: Starter, tmp_path: Path) -> None:
    made = tmp_path / "made"
    program = f"import time; open({str(made)!r}, 'w').write('x'); time.sleep(60)"
    start(sys.executable, "-I", "-S", "-c", program)
    wait_until(made.exists, 60, "the file that it makes")
    assert made.stat().st_mode & 0o077 == 0


def test_it_gets_the_environment_that_is_given_and_no_other(start: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "secret")
    process = start(*STAYS)
    wait_for_output(start)
    environ = psutil.Process(process.pid).environ()
    assert environ["MARK"] == "x"
    assert "PLANTED" not in environ


def test_a_process_is_alive_until_it_is_killed(start: Starter) -> None:
    process = start(*STAYS)
    assert is_alive(process)
    kill(process)


def test_another_process_with_the_same_pid_is_not_taken_for_it() -> None:
    me = identify(os.getpid())
    assert me is not None
    assert is_alive(me)
    assert not is_alive(me.model_copy(update={"ticks": me.ticks - 1}))


def test_a_record_of_before_the_reboot_is_not_alive() -> None:
    me = identify(os.getpid())
    assert me is not None
    assert not is_alive(me.model_copy(update={"boot_id": "another boot"}))


def test_a_zombie_is_dead() -> None:
    with subprocess.Popen(["/bin/true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert identify(child.pid) is None


def test_a_process_that_heeds_sigterm_is_ended_by_it(start: Starter) -> None:
    process = start(*STAYS)
    wait_for_output(start)
    assert anyio.run(partial(end, [process], grace_s=20)) == {process.pid: "SIGTERM"}
    assert not is_alive(process)


def test_a_process_that_ignores_sigterm_is_killed(start: Starter) -> None:
    process = start(*DEAF)
    wait_for_output(start)
    assert anyio.run(partial(end, [process], grace_s=0.2)) == {process.pid: "SIGKILL"}
    assert not is_alive(process)


def test_ending_an_exited_process_is_no_error_and_ends_no_other(start: Starter) -> None:
    process = start(*STAYS)
    imposter = process.model_copy(update={"ticks": process.ticks + 1})
    assert anyio.run(partial(end, [imposter], grace_s=1)) == {process.pid: "already gone"}
    assert is_alive(process)


def test_processes_are_found_by_their_environment(start: Starter) -> None:
    process = start(*STAYS)
    found = matching(lambda one: one.environ().get("MARK") == "x", uid=os.getuid())
    assert [one.pid for one in found] == [process.pid]


def test_a_program_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    start = partial(start_apart, ["/nowhere/python"], env={}, cwd=Path("/"), log=tmp_path / "log")
    with pytest.raises(ClusterStartError, match="cannot start /nowhere/python: No such file or directory"):
        anyio.run(start)


def test_a_log_that_cannot_be_written_is_an_error_of_storage(tmp_path: Path) -> None:
    start = partial(start_apart, STAYS, env={}, cwd=Path("/"), log=tmp_path / "missing" / "log")
    with pytest.raises(StorageError, match=r"cannot use .*/missing/log: No such file or directory"):
        anyio.run(start)


def test_the_last_lines_are_those_after_a_given_byte(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"old\n" + b"".join(b"line %d\n" % n for n in range(100)) + b"\xff\n")
    assert last_lines(log, count=2) == "line 99\n\ufffd"
    assert last_lines(log, start=log.stat().st_size) == ""
    assert last_lines(tmp_path / "none") == ""
