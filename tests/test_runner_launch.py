"""How ranks are started: what is said to torchrun, `accelerate launch` and `deepspeed`, and what is left to them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from support.attempts import attempt_spec

from raylaunch.contract import AttemptSpec
from raylaunch.runner.environments.build import EnvironmentProblem
from raylaunch.runner.launchers.torchrun import LaunchPlan, NodeResources, Shim, plan, starts_ranks

SHIM = Shim(("py", "-I", "runner.pyz", "--rank"), "/attempt/tmp/rank-python")
NODE = NodeResources(cores=64, gpus=8, port=4321)


def planned(
    entrypoint: str,
    *,
    gpus: int = 0,
    processes: int | None = None,
    torch: str = "2.13",
    env: Mapping[str, str] | None = None,
) -> LaunchPlan:
    spec: AttemptSpec = {
        **attempt_spec("digits-a-1", entrypoint=entrypoint),
        "launcher": "torchrun",
        "gpus": gpus,
        "processes": processes,
        "grace_s": 90.5,
    }
    assert starts_ranks(spec)
    return plan(spec, env=env or {}, python="/env/bin/python", torch=torch, shim=SHIM, node=NODE)


def test_a_program_becomes_ranks_that_meet_on_a_port_of_their_own() -> None:
    launch = planned("python train.py", gpus=2)
    begin = "/env/bin/python -m torch.distributed.run --nproc-per-node=2 --no-python py -I runner.pyz --rank"
    assert launch.entrypoint == f"{begin} /env/bin/python train.py"
    assert launch.env == {
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "127.0.0.1:0",
        "PET_RDZV_ID": "digits-a-1",
        "PET_LOCAL_ADDR": "127.0.0.1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "91",
        "OMP_NUM_THREADS": "8",
    }


def test_what_a_person_has_set_stays() -> None:
    env = {"PET_RDZV_ENDPOINT": "10.0.0.1:29500", "OMP_NUM_THREADS": "3"}
    assert not planned("python train.py", gpus=2, env=env).env.keys() & env.keys()


@pytest.mark.parametrize(
    ("entrypoint", "spec", "ranks", "expected"),
    [
        ("torchrun train.py", {}, 1, None),
        ("torchrun train.py", {"gpus": 4}, 4, "4"),
        ("torchrun train.py", {"gpus": 4, "processes": 2}, 2, "2"),
        ("torchrun --nproc-per-node=3 train.py", {"gpus": 4}, 3, "4"),
        ("torchrun --nproc-per-node gpu train.py", {"gpus": 4}, 4, "4"),
        ("torchrun --nproc-per-node=$N train.py", {}, 0, None),
    ],
)
def test_a_pasted_torchrun_stays_and_is_told_how_many_ranks_where_it_names_none(
    entrypoint: str, spec: dict[str, int], ranks: int, expected: str | None
) -> None:
    launch = planned(entrypoint, torch="", gpus=spec.get("gpus", 0), processes=spec.get("processes"))
    assert (launch.entrypoint, launch.ranks, launch.env.get("PET_NPROC_PER_NODE")) == (entrypoint, ranks, expected)
    assert launch.env["PYTHON_EXEC"] == SHIM.python
    assert launch.env["PET_RDZV_ENDPOINT"] == "127.0.0.1:0"


def test_a_command_that_says_where_its_ranks_meet_is_told_nothing_of_it() -> None:
    launch = planned("torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 train.py")
    assert not [name for name in launch.env if name.startswith("PET_")]


def test_accelerate_is_made_to_meet_on_a_free_port() -> None:
    launch = planned("accelerate launch --main_process_port 29500 train.py", processes=2)
    assert launch.entrypoint == "accelerate launch --num_processes=2 --main_process_port 29500 train.py"
    assert (launch.env["PET_STANDALONE"], launch.env["PYTHON_EXEC"], launch.ranks) == ("1", SHIM.python, 2)


@pytest.mark.parametrize(
    ("entrypoint", "expected"),
    [
        ("deepspeed train.py", "deepspeed --master_port=4321 train.py"),
        ("deepspeed --master_port 29501 train.py", "deepspeed --master_port 29501 train.py"),
        ("deepspeed --hostfile hosts train.py", "deepspeed --hostfile hosts train.py"),
    ],
)
def test_deepspeed_gets_a_free_port_unless_it_names_one(entrypoint: str, expected: str) -> None:
    assert planned(entrypoint).entrypoint == expected


@pytest.mark.parametrize(
    ("kind", "value", "mend"),
    [
        ("pip", "requirements.txt", "add torch to its requirements"),
        ("uv", "", "uv add torch"),
        ("conda", "train", "conda install -n train pytorch"),
        ("venv", "/env", "/env/bin/python -m pip install torch"),
    ],
)
def test_an_environment_without_pytorch_is_refused_with_its_mend(kind: str, value: str, mend: str) -> None:
    spec = attempt_spec("digits-a-1", entrypoint="python train.py")
    spec["launcher"] = "torchrun"
    spec["environment"] = {"kind": kind, "value": value, "requirements": [], "packages": []}
    with pytest.raises(EnvironmentProblem, match=mend):
        plan(spec, env={}, python="/env/bin/python", torch="", shim=SHIM, node=NODE)


def test_a_script_starts_no_ranks() -> None:
    assert not starts_ranks(attempt_spec("digits-a-1", entrypoint="python train.py"))
