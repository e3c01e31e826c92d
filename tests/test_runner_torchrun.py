"""Ranks: the runner starts a real torchrun, each rank has its log, and the one that fails is named."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.running import Attempt
from support.store import job_view
from support.waiting import wait_until

from raylaunch import contract
from raylaunch.controller.metrics.reader import MetricsStore

Make = Callable[..., Attempt]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None, reason="needs PyTorch, which could not be installed here"
    ),
]

TELLS = """
import json, os, sys
names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "WANDB_RUN_ID", "WANDB_NAME", "PYTHON_EXEC")
print(json.dumps({**{name: os.environ.get(name) for name in names}, "argv": sys.argv[1:]}))
print("and this is an error", file=sys.stderr)
"""
FAILS = """
import os, signal, sys, time
if os.environ["RANK"] == sys.argv[1]:
    print("my last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "killed" else sys.exit(int(sys.argv[2]))
time.sleep(300)
"""
SAVES = """
import os, signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("up", flush=True)
while True:
    time.sleep(0.1)
"""
TRACKS = """
import os, time, wandb
rank = int(os.environ["RANK"])
time.sleep(0 if rank else 2)
with wandb.init() as run:
    for step in range(3):
        run.log({"loss": 10.0 * rank + step})
"""
MEETS = """
import os, pathlib, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
number = torch.tensor([float(os.environ["RANK"]) + 1])
dist.all_reduce(number)
pathlib.Path(sys.argv[1]).touch()
while not pathlib.Path(sys.argv[2]).exists():
    time.sleep(0.05)
dist.barrier()
print("sum", number.item(), "port", os.environ["MASTER_PORT"])
dist.destroy_process_group()
"""


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make attempts whose working directory has a train.py, and end what they left."""
    made: list[Attempt] = []

    def one(entrypoint: str | list[str], script: str, **changes: object) -> Attempt:
        wandb = {
            "mode": "disabled",
            "run_id": "run1",
            "name": "job",
            "tags": [],
            "notes": "",
            "job_type": "train",
            "earlier": [],
        }
        spec = {"launcher": "torchrun", "wandb": {**wandb, "project": "p", "entity": "", "group": "g"}, **changes}
        made.append(Attempt(tmp_path / str(len(made)), entrypoint, **spec))
        made[-1].file("train.py", script)
        return made[-1]

    yield one
    for attempt in made:
        attempt.close()


def log_of(attempt: Attempt, rank: int) -> str:
    log = attempt.folder / contract.RANK_LOG.format(rank=rank)
    return log.read_text() if log.exists() else ""


def env_of_rank(attempt: Attempt, rank: int) -> dict[str, object]:
    return {**json.loads(next(line for line in log_of(attempt, rank).splitlines() if line.startswith("{")))}


@pytest.mark.parametrize(
    ("entrypoint", "spec"),
    [
        ("python train.py --lr $RATE 'a b'", {"processes": 2, "cpus": 14.0}),
        (["train.py", "--lr", "0.1", "a b"], {"gpus": 2, "env": {"OMP_NUM_THREADS": "7"}}),
        ("cd . && torchrun --nproc-per-node=2 train.py --lr 0.1 'a b'", {"launcher": "script", "cpus": 14.0}),
    ],
    ids=["text", "list", "pasted"],
)
def test_each_rank_has_its_log_and_only_rank_0_the_jobs_run(
    entrypoint: str | list[str], spec: dict[str, object], make: Make
) -> None:
    attempt = make(entrypoint, TELLS, **{"env": {"RATE": "0.1"}, **spec})
    assert attempt.run(CUDA_VISIBLE_DEVICES="0,1")["ended"] == "completed"
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "7", "PYTHON_EXEC": None}
    args = ["--lr", "0.1", "a b"]
    assert env_of_rank(attempt, 0) == {**common, "RANK": "0", "argv": args, "WANDB_RUN_ID": None, "WANDB_NAME": "job"}
    assert env_of_rank(attempt, 1) == {
        **common,
        "RANK": "1",
        "argv": args,
        "WANDB_RUN_ID": None,
        "WANDB_NAME": "job-rank-1",
    }
    for rank in (0, 1):
        assert log_of(attempt, rank).count("\n") == 2
        assert log_of(attempt, rank).endswith("and this is an error\n")
    assert json.loads((attempt.folder / contract.STARTED).read_text())["ranks"] == 2


def test_the_rank_that_failed_is_named_with_its_own_exit_code(make: Make) -> None:
    attempt = make("python train.py 1 3", FAILS, processes=2)
    end = attempt.run()
    assert (end["ended"], end["failed_rank"], end["exit_code"], end["message"]) == (
        "exit_code",
        1,
        3,
        "rank 1 exited with status 3",
    )
    assert log_of(attempt, 1) == "my last words\n"
    assert attempt.runner is not None
    assert attempt.runner.returncode == 3
    assert attempt.processes() == []


def test_the_signal_that_killed_a_rank_is_named(make: Make) -> None:
    end = make("torchrun --nproc-per-node=2 train.py 0 killed", FAILS).run()
    assert (end["ended"], end["failed_rank"], end["exit_code"], end["signal"]) == ("signal", 0, 137, "SIGKILL")
    assert end["message"] == "rank 0 was ended by SIGKILL"


def test_a_script_that_is_not_there_is_said_with_the_nearest(make: Make) -> None:
    end = make("python trian.py", TELLS, processes=2).run()
    assert (end["ended"], end["exit_code"]) == ("entrypoint_not_found", 2)
    assert end["message"] == "python did not find 'trian.py' in the working directory; did you mean 'train.py'?"


def test_a_stop_gives_every_rank_its_grace(make: Make) -> None:
    attempt = make("python train.py", SAVES, processes=2)
    attempt.start()
    wait_until(lambda: all("up" in log_of(attempt, rank) for rank in (0, 1)), 60, "both ranks are up")
    end = attempt.stop(grace_s=20)
    assert (end["ended"], end["killed"]) == ("stopped", 0)
    assert "\nsaved\n" in log_of(attempt, 0)
    assert log_of(attempt, 1) == "up\nsaved\n"
    assert attempt.processes() == []


@pytest.mark.long
def test_two_jobs_on_a_node_do_not_meet_on_one_port(make: Make, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    command = "torchrun --nproc-per-node=2 --master_port=29500 train.py"
    attempts = [
        make(f"{command} {here} {there}", MEETS, launcher="script"),
        make(f"{command} {there} {here}", MEETS, launcher="script"),
    ]
    for attempt in attempts:
        attempt.start()
    ends = [attempt.exit(timeout_s=120) for attempt in attempts]
    assert [end["ended"] for end in ends] == ["completed", "completed"], [log_of(attempt, 0) for attempt in attempts]
    ports = []
    for attempt in attempts:
        found = re.search(r"^sum 3\.0 port (\d+)$", log_of(attempt, 1), re.MULTILINE)
        assert found is not None
        ports.append(found.group(1))
    assert len({*ports, "29500"}) == 3


def test_without_pytorch_it_says_what_to_install(make: Make) -> None:
    bare = os.path.realpath(sys.executable)
    attempt = make(
        "python train.py", TELLS, environment={"kind": "python", "value": bare, "requirements": [], "packages": []}
    )
    end = attempt.run()
    assert end["ended"] == "environment"
    assert end["message"].startswith(f"launcher: torchrun needs PyTorch, and the job's environment ({bare}) has none: ")
    assert f"{bare} -m pip install torch" in end["message"]
    assert not attempt.log.exists()


def test_a_pasted_torchrun_that_is_not_there_says_where_it_comes_from(make: Make) -> None:
    bare = {"kind": "python", "value": os.path.realpath(sys.executable), "requirements": [], "packages": []}
    end = make("torchrun train.py", TELLS, launcher="script", environment=bare, env={"PATH": "/usr/bin:/bin"}).run()
    assert end["ended"] == "entrypoint_not_found"
    expected = "the shell did not find 'torchrun'; it comes with PyTorch, which the job's environment does not have"
    assert end["message"] == expected


@pytest.mark.wandb
@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the wandb package")
def test_where_every_rank_tracks_the_job_is_what_rank_0_logged(make: Make, tmp_path: Path) -> None:
    wandb = {
        "mode": "offline",
        "run_id": "own",
        "name": "job",
        "tags": [],
        "notes": "",
        "job_type": "train",
        "earlier": [],
    }
    attempt = make("python train.py", TRACKS, processes=2, wandb={**wandb, "project": "p", "entity": "", "group": "g"})
    assert attempt.run(timeout_s=120)["ended"] == "completed"
    (tmp_path / "jobs" / "job-aaaaaa").mkdir(parents=True)
    (tmp_path / "jobs" / "job-aaaaaa" / "attempt-1").symlink_to(attempt.folder)
    page = MetricsStore(tmp_path).page(job_view("job-aaaaaa"))
    last = page.last
    assert (next(iter(last.items())), page.last_step) == (("loss", 2.0), 2)
    (other,) = (key for key in last if key.endswith("/loss"))
    assert last[other] == 12.0
