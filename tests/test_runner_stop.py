"""Stopping a training: which of its processes receive SIGTERM, and what is left to the program until it has exited."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.running import Attempt
from support.waiting import wait_until

from raylaunch import contract
from raylaunch.runner.shutdown import Process, choose

Make = Callable[..., Attempt]

TERM, WORKER, LAUNCHER = 1 << 14, 1 << 14 | 1 << 10 | 1 << 7 | 1 << 6, 1 << 14 | 1 << 1
TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs PyTorch, which could not be installed here"
)

LOADS = """
import signal, sys, time
from torch.utils.data import DataLoader
asked = []
def main():
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    batches = 0
    while True:
        for batch in DataLoader(range(1000), num_workers=2, batch_size=10):
            if not batches:
                print("up", flush=True)
            batches += 1
            time.sleep(0.01)
            if asked:
                print("asked", len(asked), flush=True)
                asked.append(batches)
                break
        if asked:
            break
    for batch in DataLoader(range(100), num_workers=2, batch_size=10):
        pass
    print("saved", flush=True)
if __name__ == "__main__":
    main()
"""
SAVES = """
import os, signal, sys, time
rank = os.environ.get("RANK", "0")
def save(*_):
    if rank == "0":
        time.sleep(1)
        %s
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
%s
print("up", flush=True)
while True:
    time.sleep(0.1)
"""
IGNORES = """
import signal
signal.signal(signal.SIGTERM, lambda *_: print("no", flush=True))
print("up", flush=True)
while True:
    signal.pause()
"""
ENDS = IGNORES.replace('print("no", flush=True)', 'exit(print("saved"))')
PLAIN = SAVES % ("pass", "")
STORE = SAVES % (
    'store.set("key", "value"); store.get("key")',
    """import torch.distributed as dist
dist.init_process_group("gloo")
store = dist.distributed_c10d._get_default_store()""",
)
AGENT = """
import os, signal, subprocess, sys, time
ranks = [
    subprocess.Popen([sys.executable, sys.argv[-1]], env={**os.environ, "RANK": str(rank)}, start_new_session=True)
    for rank in range(2)
]
def close(*_):
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGKILL)
    sys.exit(1)
signal.signal(signal.SIGTERM, close)
while any(rank.poll() is None for rank in ranks):
    if any(rank.returncode for rank in ranks):
        close()
    time.sleep(0.01)
"""


def process(pid: int, parent: int, command: str, *, handles: int = 0, rank: bool = False) -> Process:
    argv = tuple(command.split())
    return Process(pid, parent, 0, argv[0].rpartition("/")[2][:15], argv, handles, rank)


def chosen(*processes: Process) -> tuple[list[int], list[int]]:
    plan = choose(processes, processes[0].pid)
    return [target.pid for target in plan.targets], [held.pid for held in plan.held]


def test_the_program_receives_it_and_not_what_it_has_forked() -> None:
    assert chosen(
        process(1, 0, "bash -c python_train.py|tee_log"),
        process(2, 1, "python train.py", handles=TERM),
        process(3, 2, "python train.py", handles=TERM),
        process(4, 1, "tee log"),
    ) == ([2], [1])


def test_the_handlers_of_a_data_loaders_workers_do_not_count() -> None:
    tree = [process(1, 0, "python train.py"), process(2, 1, "python train.py", handles=WORKER)]
    assert chosen(*tree) == ([1], [])
    assert chosen(tree[0], tree[1]._replace(handles=TERM, name="pt_data_worker")) == ([1], [])


def test_what_a_program_without_a_handler_starts_may_handle_it() -> None:
    spawned = [process(pid, 1, "python -c from_multiprocessing.spawn", handles=TERM) for pid in (2, 3)]
    assert chosen(process(1, 0, "python sweep.py"), *spawned) == ([2, 3], [1])


@pytest.mark.parametrize(
    "before", ["uv run python train.py", "timeout 3600 python train.py", "python /bin/conda run x"]
)
def test_what_only_runs_another_program_is_passed_over(before: str) -> None:
    assert chosen(process(1, 0, before, handles=TERM), process(2, 1, "python train.py", handles=TERM)) == ([2], [1])


def test_each_rank_receives_it_and_its_launchers_are_held_innermost_first() -> None:
    assert chosen(
        process(1, 0, "bash run.sh"),
        process(2, 1, "python /venv/bin/deepspeed train.py", handles=LAUNCHER),
        process(3, 2, "python -m deepspeed.launcher.launch train.py", handles=LAUNCHER),
        process(4, 3, "python train.py", handles=TERM, rank=True),
        process(5, 3, "bash rank.sh", rank=True),
        process(6, 5, "python train.py", rank=True),
        process(7, 6, "python train.py", handles=WORKER, rank=True),
    ) == ([4, 6], [5, 3, 2, 1])


def test_a_shell_receives_it_where_it_runs_nothing() -> None:
    assert chosen(process(1, 0, "bash -c :", handles=TERM)) == ([1], [])


def test_wandbs_core_is_spared() -> None:
    core = process(2, 1, "/site-packages/wandb/bin/wandb-core", handles=TERM)
    assert chosen(process(1, 0, "python train.py"), core) == ([1], [])


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make attempts whose working directory has a train.py, and end what they left."""
    made: list[Attempt] = []

    def one(entrypoint: str | list[str], script: str, **changes: object) -> Attempt:
        made.append(Attempt(tmp_path / str(len(made)), entrypoint, **changes))
        made[-1].file("train.py", script)
        return made[-1]

    yield one
    for attempt in made:
        attempt.close()


def log_of(attempt: Attempt, rank: int) -> str:
    log = attempt.folder / contract.RANK_LOG.format(rank=rank)
    return log.read_text() if log.exists() else ""


@TORCH
@pytest.mark.slow
def test_a_program_with_data_loaders_saves_before_it_exits(make: Make) -> None:
    uv = shutil.which("uv", path=str(Path(sys.executable).parent))
    attempt = make(f"{f'{uv} run --no-project' if uv else 'env'} python train.py | tee out; echo next", LOADS)
    attempt.start()
    attempt.wait_log("up", 60)
    end = attempt.stop(grace_s=60)
    assert end["ended"] == "stopped"
    assert attempt.log.read_text() == "up\nasked 1\nsaved\n"
    assert attempt.processes() == []


@TORCH
@pytest.mark.slow
def test_a_program_with_data_loaders_that_does_not_handle_it_ends_by_it(make: Make) -> None:
    attempt = make("python train.py", LOADS.replace("signal.signal(", "print("))
    attempt.start()
    attempt.wait_log("up", 60)
    end = attempt.stop(grace_s=60)
    assert (end["ended"], end["signal"]) == ("stopped", "SIGTERM")
    assert "killed by signal" not in attempt.log.read_text()


@TORCH
@pytest.mark.slow
def test_torchrun_ends_no_rank_that_still_saves_and_serves_its_store(make: Make) -> None:
    attempt = make("torchrun --nproc-per-node=2 train.py && echo next", STORE)
    attempt.start()
    wait_until(lambda: all("up" in log_of(attempt, rank) for rank in (0, 1)), 60, "both ranks are up")
    end = attempt.stop(grace_s=60)
    assert end["ended"] == "stopped"
    assert "\nsaved\n" in log_of(attempt, 0)
    assert "next" not in log_of(attempt, 0)
    assert log_of(attempt, 1) == "up\nsaved\n"
    assert attempt.processes() == []


@pytest.mark.parametrize(
    ("name", "entrypoint"),
    [("deepspeed", "deepspeed train.py"), ("accelerate", "accelerate launch --num_processes 2 train.py")],
)
def test_a_launcher_that_ends_all_ranks_with_the_first_does_not_get_to_that(
    name: str, entrypoint: str, make: Make, tmp_path: Path
) -> None:
    attempt = make(entrypoint, PLAIN, env={"PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"})
    (tmp_path / name).write_text(f"#!{sys.executable}\n{AGENT}")
    (tmp_path / name).chmod(0o755)
    attempt.start()
    wait_until(lambda: attempt.log.exists() and attempt.log.read_text().count("up") == 2, 30, "both ranks are up")
    attempt.stop(grace_s=60)
    assert attempt.log.read_text().count("saved") == 2
    assert attempt.processes() == []


def test_after_the_grace_nothing_survives_and_nothing_held_stays(make: Make) -> None:
    attempt = make("(python train.py; echo next) | tee out", IGNORES)
    attempt.start()
    attempt.wait_log("up")
    end = attempt.stop(grace_s=0.5)
    assert end["ended"] == "stopped"
    assert attempt.log.read_text() == "up\nno\n"
    assert attempt.processes() == []


def test_a_shells_own_handler_is_run_after_its_program_has_exited(make: Make) -> None:
    attempt = make("trap 'echo cleaned; exit' TERM; python train.py; echo next", ENDS)
    attempt.start()
    attempt.wait_log("up")
    attempt.stop(grace_s=60)
    assert attempt.log.read_text() == "up\nsaved\ncleaned\n"


def test_a_timeout_lets_the_program_save_too(make: Make) -> None:
    attempt = make("python train.py; echo next", PLAIN, timeout_s=2.0, grace_s=60.0)
    attempt.start()
    attempt.wait_log("up")
    assert attempt.exit()["ended"] == "timed_out"
    assert json.loads((attempt.folder / contract.EXIT).read_text())["killed"] == 0
    assert attempt.log.read_text() == "up\nsaved\n"
