"""How the training is started: unchanged, as ranks of torchrun, or by a pasted launcher; and which rank failed first.

Several jobs share a node, so no two may meet on one port. torchrun takes any option from a variable ``PET_<OPTION>``
(torch/distributed/argparse_util.py) unless the command names it; so its rendezvous is moved to a free port of
127.0.0.1, where no name need be resolved. ``accelerate launch`` fixes port 29500 and a static rendezvous unless
torchrun's own ``standalone`` is set; ``deepspeed`` reads no variable, and gets ``--master_port`` with a port that was
free a moment ago.

torchrun reads ``PYTHON_EXEC`` for the interpreter of its ranks (torch/distributed/run.py). With it each rank of a
pasted command passes through `raylaunch.runner.launchers.rank` too, and has its own log.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from raylaunch import contract, entrypoint
from raylaunch.runner.environments.build import EnvironmentProblem
from raylaunch.runner.launchers.rank import OF_PARENT, OPTION

if TYPE_CHECKING:
    from raylaunch.contract import AttemptSpec
    from raylaunch.entrypoint import Pasted

_ROOT_CAUSE = re.compile(
    r"^Root Cause \(first observed failure\):\n\[\d+\]:\n(?:  \w+ *: .*\n)*?"
    r"  rank +: (?P<rank>\d+) \(local_rank: \d+\)\n  exitcode +: (?P<status>-?\d+) \(pid",
    re.MULTILINE,
)
_OF_LAUNCHER = re.compile(r"\btorch[./]distributed[./](?:elastic|run)\b")
_FAILED = re.compile(r"^.*\btorch[./]distributed[./]elastic\b.*\bfailed \(exitcode.*$", re.MULTILINE)
_SHUTDOWN_S = 30
"""How long torchrun waits between the signal that it passes on to its ranks and SIGKILL, by default."""
_PER_GPU = ("gpu", "auto")


def plan(  # noqa: PLR0913 -- each is one fact, and all are named
    spec: AttemptSpec, *, env: Mapping[str, str], python: str, torch: str, shim: Shim, node: NodeResources
) -> LaunchPlan:
    """Return how to start a training for which `starts_ranks` holds.

    Args:
        spec: the attempt's.
        env: the training's variables so far; what a person has set among them wins.
        python: interpreter of the job's environment.
        torch: its version of PyTorch, or empty.
        shim: what ranks are started through.
        node: what the node has.

    Raises:
        EnvironmentProblem: torchrun is requested, but PyTorch is missing.
    """
    found = entrypoint.pasted(spec["entrypoint"])
    if found is None:
        launch = _wrapped(spec, python=python, torch=torch, shim=shim)
    else:
        launch = _plan_pasted(spec, found, shim=shim, port=node.port)
    more = {**launch.env, **_threads(spec, launch.ranks, node)}
    return launch._replace(env={name: value for name, value in more.items() if name not in env})


def starts_ranks(spec: AttemptSpec) -> bool:
    """Whether the training is started by torchrun, or by a launcher that the entrypoint names."""
    return spec["launcher"] == "torchrun" or entrypoint.pasted(spec["entrypoint"]) is not None


def node_resources() -> NodeResources:
    """Return what the node has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return NodeResources(cores, len(list(Path("/dev").glob("nvidia[0-9]*"))), port)


def make_shim(folder: Path) -> Shim:
    """Return what the ranks of an attempt are started through; its program is written into the attempt's folder."""
    words = (sys.executable, "-I", str(folder / contract.RUNNER), OPTION)
    script = folder / contract.TMP / "rank-python"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f'#!/bin/sh\nexec {shlex.join([*words, OF_PARENT])} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    return Shim(words, str(script))


class RankFailure(NamedTuple):
    """A rank, and its status as `subprocess.Popen.returncode`."""

    rank: int
    status: int


def rank_failure(log_tail: str) -> RankFailure | None:
    """Return the failed rank from the last report in a launcher's log, or None without a report."""
    reports = list(_ROOT_CAUSE.finditer(log_tail))
    return RankFailure(int(reports[-1]["rank"]), int(reports[-1]["status"])) if reports else None


def before_report(log_tail: str) -> str:
    """Return the log before the launcher's report, which is long and hides the last output of the failed rank."""
    failed = list(_FAILED.finditer(log_tail))
    start = failed[-1].start() if failed else len(log_tail)
    while failed and start:
        line = log_tail.rfind("\n", 0, start - 1) + 1
        if not _OF_LAUNCHER.search(log_tail, line, start):
            break
        start = line
    return log_tail[:start]


class NodeResources(NamedTuple):
    """What a launch depends on of the node: cores of the CPU, GPUs (the job's and others), and a free port."""

    cores: int
    gpus: int
    port: int


class LaunchPlan(NamedTuple):
    """What to start: the entrypoint with its launcher, variables to add, and how many ranks there are (0: unknown).

    `elastic`: whether torchrun, or something built on it, starts the ranks.
    """

    entrypoint: str | list[str]
    env: dict[str, str]
    ranks: int
    elastic: bool


class Shim(NamedTuple):
    """What ranks are started through: words to put before a program, and a program in place of an interpreter."""

    words: tuple[str, ...]
    python: str


def _wrapped(spec: AttemptSpec, *, python: str, torch: str, shim: Shim) -> LaunchPlan:
    """Put torchrun before a Python program."""
    own = entrypoint.python_word(spec["entrypoint"])
    if not own and not torch:
        raise EnvironmentProblem(_no_torch(spec, python))
    interpreter = own or python
    ranks = spec["processes"] or spec["gpus"] or 1
    torchrun = [interpreter, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--no-python", *shim.words]
    return LaunchPlan(
        entrypoint.wrapped(spec["entrypoint"], torchrun, interpreter), _rendezvous(spec), ranks, elastic=True
    )


def _no_torch(spec: AttemptSpec, python: str) -> str:
    kind, value = spec["environment"]["kind"], spec["environment"]["value"]
    if not python:
        return "launcher: torchrun needs PyTorch, but the job's environment has no Python; name another: venv:PATH"
    if kind == "pip":
        fix = "add torch to its requirements"
    elif kind == "uv":
        fix = "uv add torch, then submit again"
    elif kind == "conda":
        fix = f"conda install -n {value} pytorch"
    else:
        fix = f"{python} -m pip install torch; or name another environment: venv:PATH, conda:NAME or pip: [torch]"
    return f"launcher: torchrun needs PyTorch, and the job's environment ({python}) has none: {fix}"


def _rendezvous(spec: AttemptSpec) -> dict[str, str]:
    """Return variables with which torchrun's processes meet on a port of their own."""
    return {
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "127.0.0.1:0",
        "PET_RDZV_ID": spec["attempt"],
        "PET_LOCAL_ADDR": "127.0.0.1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(_SHUTDOWN_S, math.ceil(spec["grace_s"]))),
    }


def _plan_pasted(spec: AttemptSpec, found: Pasted, *, shim: Shim, port: int) -> LaunchPlan:
    """Keep a pasted launcher, and set with variables or options what it leaves open."""
    requested = spec["processes"] or spec["gpus"]
    if found.launcher == entrypoint.DEEPSPEED:
        options = [] if found.names_places or "master-port" in found.options else [f"--master_port={port}"]
        if spec["processes"] and not found.ranks:
            options.append(f"--num_gpus={spec['processes']}")
        return LaunchPlan(entrypoint.with_options(spec["entrypoint"], found, options), {}, 1, elastic=False)
    env = {} if found.names_places else _rendezvous(spec)
    env["PYTHON_EXEC"] = shim.python
    if found.launcher == entrypoint.ACCELERATE:
        if not found.names_places:
            env["PET_STANDALONE"] = "1"
        options = [f"--num_processes={spec['processes']}"] if spec["processes"] and not found.ranks else []
        ranks = _count(found.ranks, spec) or spec["processes"] or 0
        return LaunchPlan(entrypoint.with_options(spec["entrypoint"], found, options), env, ranks, elastic=True)
    if requested:
        env["PET_NPROC_PER_NODE"] = str(requested)
    ranks = _count(found.ranks, spec) if found.ranks else requested or 1
    return LaunchPlan(spec["entrypoint"], env, ranks, elastic=True)


def _count(words: str, spec: AttemptSpec) -> int:
    """Return the number of ranks that a command names, or 0 where it cannot be known."""
    if words in _PER_GPU:
        return spec["gpus"]
    return int(words) if words.isdigit() else 0


def _threads(spec: AttemptSpec, ranks: int, node: NodeResources) -> dict[str, str]:
    """Return how many threads each rank may use: torchrun's default is 1, which starves computation on the CPU."""
    if ranks <= 1:
        return {}
    share = spec["cpus"] / ranks if spec["cpus"] else node.cores / max(ranks, node.gpus if spec["gpus"] else 0)
    return {"OMP_NUM_THREADS": str(max(1, int(share)))}
