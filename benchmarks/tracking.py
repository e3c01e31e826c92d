"""What raylaunch adds to the CPU time of a training that logs very much to W&B."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from benchmarks.measure import Result, Skipped, compared, in_turns
from benchmarks.workshop import PROGRAMS, Cluster, Workshop, run_program
from raylaunch.models.states import JobState
from raylaunch.sdk import AsyncCluster

_POINTS, _FEW_POINTS = 100_000, 2000
_ROUNDS = 7
_LIMIT_S = 600.0
_START_S = 60.0
_LOOK_S = 0.02


def run(shop: Workshop) -> Iterator[Result]:
    """Measure pairs: the training as a job, and as a plain process.

    Raises:
        Skipped: this is not Linux, or a training failed.
    """
    if sys.platform != "linux":
        msg = "needs Linux, to count the CPU time of processes that outlive their parents"
        raise Skipped(msg)
    points = _FEW_POINTS if shop.quick else _POINTS
    shares: list[float] = []

    def ours() -> float:
        with tempfile.TemporaryDirectory(dir=shop.folder) as temp:
            target = Path(temp, "cpu")
            shares.append(asyncio.run(asyncio.wait_for(_as_a_job(shop.cluster, _command(points, target)), _LIMIT_S)))
            return float(target.read_text(encoding="utf-8")) + shares[-1]

    pairs = in_turns(ours, lambda: _plain(shop, points), rounds=shop.rounds(_ROUNDS))
    how = (
        f"CPU seconds of a training (a small network in NumPy) that logs each of its {points:,} steps offline, as fast"
        " as it can, W&B's core with it; and of all of raylaunch's processes from its submission until its files are in"
        " the store: runner, supervisor, controller, link"
        f" ({statistics.median(shares):.2f} s). Ray's own are not counted."
    )
    yield compared("wandb_overhead", pairs, unit="s", peer="the same training without raylaunch", how=how)


def _command(points: int, target: Path) -> list[str]:
    """Return the command of both sides; `target` gets the CPU seconds of all that it starts."""
    counting = [sys.executable, str(PROGRAMS / "cpu_of.py"), str(target)]
    return [*counting, sys.executable, str(PROGRAMS / "log_points.py"), str(points)]


def _plain(shop: Workshop, points: int) -> float:
    with tempfile.TemporaryDirectory(dir=shop.folder) as temp:
        target = Path(temp, "cpu")
        run_program(
            _command(points, target), {**shop.environ, "WANDB_MODE": "offline", "WANDB_DIR": temp}, limit_s=_LIMIT_S
        )
        return float(target.read_text(encoding="utf-8"))


async def _as_a_job(cluster: Cluster, command: list[str]) -> float:
    """Run the training as a job; return the CPU seconds of raylaunch's processes."""
    async with await AsyncCluster.connect(reach=cluster.reach) as ours:
        processes = cluster.processes()
        before = _used(processes)
        job = await ours.submit(command, working_dir="")
        on_node = asyncio.create_task(asyncio.to_thread(_on_node, cluster, f"{job.id}-1"))
        ended = await job.wait()
        share = await on_node
        share += _used(processes) - before
    if ended.state is not JobState.SUCCEEDED:
        msg = f"the training ended as {ended.state.value}: {ended.message}"
        raise Skipped(msg)
    return share


def _used(processes: Mapping[str, psutil.Process]) -> float:
    """Return the CPU seconds of processes so far, those of their ended children with them."""
    return sum(sum(process.cpu_times()[:4]) for process in processes.values())


def _on_node(cluster: Cluster, attempt: str) -> float:
    """Return the CPU seconds of an attempt's runner and supervisor, once both have ended.

    A process that has ended cannot be inspected. So the runner's are read from its parent, Ray's supervisor of the job,
    which waits for it and exits some time later. Those of our supervisor are read while it lives.
    """
    folder = cluster.home / "clusters" / "local" / "node" / "attempts" / attempt
    runner = psutil.Process(_pid_in(folder / "claim.json"))
    of_ray = next(parent for parent in runner.parents() if "JobSupervisor" in " ".join(parent.cmdline()))
    supervisor = psutil.Process(_pid_in(folder / "started.json")).parent()
    before = runner_s = _of_children(of_ray)
    supervisor_s = 0.0
    while True:
        try:
            runner_s = _of_children(of_ray)
        except psutil.NoSuchProcess:
            return runner_s - before + supervisor_s
        if supervisor is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                supervisor_s = sum(supervisor.cpu_times()[:2])
        time.sleep(_LOOK_S)


def _of_children(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.children_user + times.children_system)


def _pid_in(record: Path) -> int:
    """Return the process id in one of an attempt's records, as soon as it is written."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            return int(json.loads(record.read_text(encoding="utf-8"))["pid"])
        time.sleep(_LOOK_S)
    msg = f"no attempt wrote {record.name} within {_START_S:g} s"
    raise Skipped(msg)
