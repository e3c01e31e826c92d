"""What an entrypoint starts: a Python program that torchrun can start as ranks, or a launcher that was pasted."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylaunch.config.load import Flag, job_spec_from_flags
from raylaunch.entrypoint import pasted, problem_of, python_word, with_options, wrapped
from raylaunch.errors import SpecError
from raylaunch.runner.command import EntrypointProblem, command, explain_missing, shell_line_ends

LAUNCHER = ("env/python", "-m", "torch.distributed.run", "--nproc-per-node=2")
BEGIN = "env/python -m torch.distributed.run --nproc-per-node=2"


def started(entrypoint: str | list[str]) -> str | list[str]:
    """Return the entrypoint as it is started under torchrun; `PY` stands for the environment's interpreter."""
    assert problem_of(entrypoint) == ""
    assert pasted(entrypoint) is None
    return wrapped(entrypoint, LAUNCHER, python_word(entrypoint) or "PY")


@pytest.mark.parametrize(
    ("entrypoint", "expected"),
    [
        ("python train.py --lr 0.1", f"{BEGIN} PY train.py --lr 0.1"),
        ("python3 -u -X dev train.py", f"{BEGIN} PY -u -X dev train.py"),
        ("python -m pkg.train --lr 0.1", f"{BEGIN} PY -m pkg.train --lr 0.1"),
        ("python -c 'print(1)'", f"{BEGIN} PY -c 'print(1)'"),
        ("train.py --lr 0.1", f"{BEGIN} PY train.py --lr 0.1"),
        ("./src/train.py", f"{BEGIN} PY ./src/train.py"),
        ("/opt/env/bin/python3.11 train.py", f"{BEGIN} /opt/env/bin/python3.11 train.py"),
        ("python3.12 train.py", f"{BEGIN} python3.12 train.py"),
        ("uv run python train.py", f"uv run {BEGIN} python train.py"),
        ("uv run --python 3.12 --with rich train.py", f"uv run --python 3.12 --with rich {BEGIN} python train.py"),
        ("conda run -n python python train.py", f"conda run -n python {BEGIN} python train.py"),
        ("A=1 B='x y' python train.py", f"A=1 B='x y' {BEGIN} PY train.py"),
        ("env A=1 python train.py", f"env A=1 {BEGIN} PY train.py"),
        ("exec python train.py", f"exec {BEGIN} PY train.py"),
        ("numactl --cpunodebind 0 python train.py", f"numactl --cpunodebind 0 {BEGIN} PY train.py"),
        ("cd src && python train.py\n", f"cd src && {BEGIN} PY train.py\n"),
        ("source x.sh; python train.py", f"source x.sh; {BEGIN} PY train.py"),
        ("pip install accelerate && python t.py", f"pip install accelerate && {BEGIN} PY t.py"),
        ("python train.py $ARGS \"$(date)\" 'a b'", f"{BEGIN} PY train.py $ARGS \"$(date)\" 'a b'"),
        ("python train.py > out.txt 2>&1", f"{BEGIN} PY train.py > out.txt 2>&1"),
        ("python train.py \\\n  --lr 0.1", f"{BEGIN} PY train.py \\\n  --lr 0.1"),
        ("python train.py  # | not a pipe", f"{BEGIN} PY train.py  # | not a pipe"),
        ("python train.py '|' \"&\" \\;", f"{BEGIN} PY train.py '|' \"&\" \\;"),
        (["python", "train.py", "a b", "|"], [*LAUNCHER, "PY", "train.py", "a b", "|"]),
        (["python3", "-m", "pkg"], [*LAUNCHER, "PY", "-m", "pkg"]),
        (["train.py", "--lr", "1"], [*LAUNCHER, "PY", "train.py", "--lr", "1"]),
        (["uv", "run", "train.py"], ["uv", "run", *LAUNCHER, "python", "train.py"]),
    ],
)
def test_torchrun_is_put_before_the_python_program_and_all_else_stays(
    entrypoint: str | list[str], expected: str | list[str]
) -> None:
    assert started(entrypoint) == expected


@pytest.mark.parametrize(
    ("entrypoint", "what"),
    [
        ("cat data.txt | python train.py", "this is a shell command with '|'"),
        ("python train.py | tee log.txt", "this is a shell command with '|'"),
        ("python train.py &", "this is a shell command with '&'"),
        ("(python train.py)", "this is a shell command with '('"),
        ("python train.py || true", "this is a shell command with '||'"),
        ("python - <<EOF\nprint(1)\nEOF", "this is a shell command with '<<'"),
        ("python 'train.py", "this is a shell command with invalid syntax"),
        ("python prepare.py && python train.py", "this names 2"),
        ("./train.sh", "this names none"),
        ("bash train.sh", "this names none"),
        ("bash -c 'python train.py'", "this names none"),
        ("mpirun -np 2 python train.py", "this names none"),
        ("python", "this names none"),
        ("accelerate test", "this names none"),
        (["make", "train"], "this names none"),
    ],
)
def test_what_torchrun_cannot_start_is_refused_with_what_to_write(entrypoint: str | list[str], what: str) -> None:
    message = problem_of(entrypoint)
    assert what in message
    assert message.endswith(
        "write the program alone (python train.py), or with launcher: script a command that starts the ranks itself "
        "(torchrun --nproc-per-node=2 train.py)"
    )


@pytest.mark.parametrize(
    ("entrypoint", "launcher", "ranks"),
    [
        ("torchrun train.py", "torchrun", ""),
        ("torchrun --nproc_per_node=2 train.py --num_gpus 9", "torchrun", "2"),
        ("torchrun --standalone --nproc-per-node gpu train.py", "torchrun", "gpu"),
        ("torchrun --nproc-per-node=$N -m pkg.train", "torchrun", "$N"),
        ("/opt/env/bin/torchrun --nproc_per_node 4 train.py", "torchrun", "4"),
        ("python /opt/env/bin/torchrun --nproc_per_node 4 train.py", "torchrun", "4"),
        ("python -m torch.distributed.run --nproc-per-node=3 train.py", "torchrun", "3"),
        ("python3 -u -m torch.distributed.launch --nproc_per_node=2 train.py", "torchrun", "2"),
        ("OMP_NUM_THREADS=4 torchrun train.py", "torchrun", ""),
        ("env NCCL_DEBUG=INFO torchrun train.py", "torchrun", ""),
        ("uv run torchrun --nproc-per-node=2 train.py", "torchrun", "2"),
        ("uv run --with torch python -m torch.distributed.run train.py", "torchrun", ""),
        ("cd src && torchrun --nproc-per-node=2 train.py | tee log", "torchrun", "2"),
        ("bash -c 'cd src; torchrun --nproc-per-node=2 train.py'", "torchrun", "2"),
        ("accelerate launch train.py", "accelerate", ""),
        ("accelerate launch --multi_gpu --num_processes=2 train.py --num_processes 7", "accelerate", "2"),
        ("accelerate-launch --num_processes 2 train.py", "accelerate", "2"),
        ("python -m accelerate.commands.launch --num_processes 2 train.py", "accelerate", "2"),
        ("deepspeed train.py --deepspeed ds.json", "deepspeed", ""),
        ("poetry run deepspeed --num_gpus=4 train.py", "deepspeed", "4"),
        (["torchrun", "--nproc-per-node=2", "train.py"], "torchrun", "2"),
        (["bash", "-lc", "torchrun train.py"], "torchrun", ""),
    ],
)
def test_a_pasted_launcher_is_found(entrypoint: str | list[str], launcher: str, ranks: str) -> None:
    found = pasted(entrypoint)
    assert found is not None
    assert (found.launcher, found.ranks) == (launcher, ranks)
    assert problem_of(entrypoint) == ""


@pytest.mark.parametrize(
    "entrypoint",
    [
        "python train.py --launcher torchrun",
        "pip install deepspeed",
        "echo torchrun train.py",
        "python train.py # torchrun",
        "accelerate config",
        "bash train.sh torchrun",
        ["python", "torchrun.py"],
        "",
    ],
)
def test_what_only_names_a_launcher_is_none(entrypoint: str | list[str]) -> None:
    assert pasted(entrypoint) is None


@pytest.mark.parametrize(
    ("entrypoint", "own"),
    [
        ("torchrun --nproc-per-node=2 train.py", False),
        ("torchrun --nnodes=1 --node_rank=0 --master_addr=127.0.0.1 --master_port=29501 train.py", False),
        ("torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 train.py", True),
        ("torchrun --rdzv-backend=c10d --rdzv-endpoint=localhost:29400 train.py", True),
        ("accelerate launch --num_machines=1 --machine_rank 0 --main_process_port 29501 train.py", False),
        ("accelerate launch --num_machines=2 --machine_rank 1 train.py", True),
        ("deepspeed --hostfile=hosts train.py", True),
        ("deepspeed --num_nodes 1 train.py", False),
    ],
)
def test_a_command_that_says_where_its_ranks_meet_keeps_its_word(entrypoint: str, own: bool) -> None:  # noqa: FBT001 -- a column of the table
    found = pasted(entrypoint)
    assert found is not None
    assert found.names_places is own


@pytest.mark.parametrize(
    ("entrypoint", "expected"),
    [
        ("A=1 deepspeed train.py", "A=1 deepspeed --master_port=1 train.py"),
        ("cd x && accelerate launch train.py", "cd x && accelerate launch --master_port=1 train.py"),
        (["deepspeed", "train.py"], ["deepspeed", "--master_port=1", "train.py"]),
        ("bash -c 'deepspeed train.py'", "bash -c 'deepspeed train.py'"),
    ],
)
def test_options_are_put_behind_a_launchers_name(entrypoint: str | list[str], expected: str | list[str]) -> None:
    found = pasted(entrypoint)
    assert found is not None
    assert with_options(entrypoint, found, ["--master_port=1"]) == expected


@pytest.mark.parametrize(
    ("entrypoint", "processes", "expected"),
    [
        ("cat x | python train.py", None, "launcher: torchrun starts a Python program, and this is a shell command"),
        ("torchrun --nproc-per-node=4 t.py", 2, "processes: the entrypoint sets the number of ranks itself (4)"),
    ],
)
def test_a_spec_that_torchrun_cannot_start_is_refused(entrypoint: str, processes: int | None, expected: str) -> None:
    flags = [Flag("", ("entrypoint",), entrypoint), Flag("", ("launcher",), "torchrun")]
    with pytest.raises(SpecError) as raised:
        job_spec_from_flags([*flags, *([Flag("", ("processes",), processes)] if processes else [])])
    assert raised.value.message.startswith(expected)


def test_a_pasted_launcher_is_taken_under_either_launcher() -> None:
    for launcher in ("script", "torchrun"):
        flags = [Flag("", ("entrypoint",), "torchrun train.py"), Flag("", ("launcher",), launcher)]
        assert job_spec_from_flags(flags).launcher == launcher


def test_a_script_with_windows_line_ends_is_named_with_its_fix(tmp_path: Path) -> None:
    script = tmp_path / "train.sh"
    script.write_bytes(b"#!/bin/bash\r\necho hi\r\n")
    script.chmod(0o755)
    with pytest.raises(EntrypointProblem, match="Windows line ends"):
        command(["./train.sh"], {}, tmp_path)
    message = explain_missing(
        "./train.sh --lr 1", 127, "bash: ./train.sh: cannot execute: required file not found", tmp_path
    )
    assert "sed -i 's/\\r$//' train.sh" in message
    script.write_bytes(b"#!/bin/bash\necho hi\n")
    assert command(["./train.sh"], {}, tmp_path) == [str(script)]
    assert not explain_missing("./train.sh", 127, "", tmp_path)


@pytest.mark.parametrize(
    ("entrypoint", "status"),
    [("bash train.sh --lr 1", 2), (["bash", "-x", "train.sh"], 127), ("sh 'train.sh'", 126), ("./train.sh", 127)],
)
@pytest.mark.parametrize("first", [b"#!/usr/bin/env bash\r\n", b""])
def test_a_shell_script_with_windows_line_ends_is_named_with_or_without_its_first_line(
    tmp_path: Path, entrypoint: str | list[str], status: int, first: bytes
) -> None:
    (tmp_path / "train.sh").write_bytes(first + b"set -e\r\npython train.py\r\n")
    message = explain_missing(entrypoint, status, "python: can't open file 'train.py\r': [Errno 2]", tmp_path)
    assert "'train.sh' has Windows line ends" in message


def test_windows_line_ends_of_a_python_program_or_of_data_are_no_reason(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_bytes(b"#!/usr/bin/env python\r\nprint(1)\r\n")
    (tmp_path / "data.csv").write_bytes(b"a,b\r\n")
    (tmp_path / "train.sh").write_bytes(b"python train.py\n")
    for entrypoint in ("python train.py data.csv", ["bash", "train.sh", "data.csv"]):
        assert not explain_missing(entrypoint, 2, "", tmp_path)
        assert not shell_line_ends(entrypoint, tmp_path)
