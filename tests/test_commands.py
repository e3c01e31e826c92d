"""Programs that are run on this machine to their end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from support.waiting import wait_until

from raylaunch.agent.processes import started_ticks
from raylaunch.cluster.commands import ProgramResult, run_program
from raylaunch.errors import ClusterStartError


def ran(tmp_path: Path, *argv: str, body: bytes = b"", limit_s: float = 30) -> ProgramResult:
    async def run() -> ProgramResult:
        return await run_program(argv, cwd=tmp_path, env=os.environ, limit_s=limit_s, step="a step", input=body)

    return anyio.run(run)


def test_a_command_gets_its_input_and_returns_all_output(tmp_path: Path) -> None:
    output = ran(tmp_path, "sh", "-c", "cat; echo $0 >&2; pwd; exit 3", "its name", body=b"given\n")
    assert (output.status, output.text) == (3, f"given\nits name\n{tmp_path}\n")


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterStartError, match="no-such-program cannot be started: No such file or directory"):
        ran(tmp_path, "no-such-program")


def test_one_that_does_not_end_is_ended_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(ClusterStartError, match="has not ended after 1 s"):
        ran(tmp_path, "sh", "-c", "sleep 1000 & echo $! > child; wait", limit_s=1)
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: started_ticks(child) is None, 60, "the child has ended")


def test_one_ends_when_who_waits_for_it_is_killed(tmp_path: Path) -> None:
    program = (
        "import anyio, functools, os; from pathlib import Path; from raylaunch.cluster.commands import run_program;"
        "run = functools.partial(run_program, ['sh', '-c', 'echo $$ > pid; exec sleep 1000']);"
        "anyio.run(functools.partial(run, cwd=Path.cwd(), env=os.environ, limit_s=60, step=''))"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environ) as waiting:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), 30, "the program runs")
        waiting.send_signal(signal.SIGKILL)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: started_ticks(pid) is None, 60, "the program has ended")
