"""A real embedded cluster in a home of its own, used through raylaunch's own command line as a person would."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from raylaunch.client.client import Client
from raylaunch.cluster.processes import VAR_CONTROLLER_OF
from raylaunch.cluster.record import ClusterRecord
from raylaunch.cluster.types import Endpoint
from raylaunch.models.job import JobView
from raylaunch.paths import cluster_paths
from support.cli import run_cli
from support.waiting import wait_until

_T = TypeVar("_T")

ROOT = Path(__file__).resolve().parents[2]
UP_S = 120.0


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str


class Cluster:
    """One embedded cluster, with four logical GPUs. `interpreter` is the Python whose raylaunch is used."""

    def __init__(self, home: Path, work: Path) -> None:
        self.home = home
        self.work = work
        self.interpreter = sys.executable
        of_tests = ("RAY", "WANDB_", "VIRTUAL_ENV", "CONDA_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(of_tests)}
        self.env = {**kept, "RAYLAUNCH_HOME": str(home), "NETRC": str(work / "no-netrc"), "NO_COLOR": "1"}
        self.paths = cluster_paths("local", self.env)
        self.first_ups: list[dict[str, Any]] = []
        """Of `broken`: what the two commands ``up`` printed that started it."""

    def cli(
        self, *words: str, timeout_s: float = 120, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Result:
        """Run ``raylaunch`` with these words, to its end."""
        env = {**self.env, **(env or {})}
        done = run_cli(words, cwd=cwd or self.work, env=env, timeout_s=timeout_s, python=self.interpreter)
        return Result(done.returncode, done.stdout, done.stderr)

    def good(
        self, *words: str, timeout_s: float = 120, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """Run ``raylaunch`` with these words; it must succeed. Returns what it printed on stdout."""
        result = self.cli(*words, timeout_s=timeout_s, cwd=cwd, env=env)
        assert result.status == 0, (
            f"raylaunch {' '.join(words)} ended with {result.status}:\n{result.out}\n{result.err}"
        )
        return result.out

    def submit(self, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Submit a job with these words of ``raylaunch submit``; return its id."""
        answer = json.loads(self.good("submit", "--json", *words, cwd=cwd, env=env))
        return str(answer["job"]["id"])

    def python(self, code: str, *options: str, env: Mapping[str, str] | None = None) -> str:
        """Submit a job that runs a line of Python, without any code of its own; return its id."""
        return self.submit("--working-dir", "", *options, "--", "python", "-c", code, env=env)

    def job(self, ref: str) -> JobView:
        """Return a job."""
        return self.ask(lambda client: client.job(ref))

    def ended(self, ref: str, timeout_s: float = 60) -> JobView:
        """Wait until a job has ended, and return it."""
        return self.until(ref, lambda job: job.state.ended, timeout_s, "it has ended")

    def until(self, ref: str, holds: Callable[[JobView], bool], timeout_s: float, what: str) -> JobView:
        """Wait until something holds of a job, and return it."""
        seen: list[JobView] = []

        def look() -> JobView | None:
            seen[:] = [self.job(ref)]
            return seen[0] if holds(seen[0]) else None

        try:
            return wait_until(look, timeout_s, f"{ref}: {what}")
        except AssertionError as error:
            last = seen[0]
            msg = f"{error}; it is {last.state.value}: {last.message}"
            raise AssertionError(msg) from None

    def runs(self, ref: str, timeout_s: float = 60) -> JobView:
        """Wait until a job's training runs."""
        return self.until(ref, lambda job: job.state.value == "running", timeout_s, "it runs")

    def ready(self, ref: str, says: bytes = b"ready", timeout_s: float = 60) -> JobView:
        """Wait until a job's training runs and its log has these words, and return it."""
        what = f"it runs and its log says {says.decode()}"
        return self.until(ref, lambda job: job.state.value == "running" and says in self.log(job.id), timeout_s, what)

    def log(self, ref: str) -> bytes:
        """Return a job's whole log."""

        async def read(client: Client) -> bytes:
            parts: list[bytes] = []
            offset = 0
            while True:
                chunk = await client.logs(ref, offset=offset)
                if not chunk.data:
                    return b"".join(parts)
                parts.append(chunk.data)
                offset = chunk.next_offset

        return self.ask(read)

    def ask(self, question: Callable[[Client], Awaitable[_T]]) -> _T:
        """Ask the controller something, with the client library."""

        async def asked() -> _T:
            async with Client(self.reach()) as client:
                return await question(client)

        return asyncio.run(asked())

    def reach(self) -> Endpoint:
        """Return where the controller answers."""
        controller = json.loads(self.paths.controller_config.read_text())
        return Endpoint(f"http://127.0.0.1:{controller['port']}", self.paths.token.read_text().strip())

    def record(self) -> ClusterRecord:
        """Return what is recorded of the cluster."""
        return ClusterRecord.model_validate_json(self.paths.record.read_bytes())

    def controller_pid(self) -> int:
        """Return the controller's pid."""
        controller = self.record().controller
        assert controller is not None
        return controller.pid

    def ray_pid(self) -> int:
        """Return the pid of ``ray start --block``."""
        ray = self.record().ray
        assert ray is not None
        return ray.pid

    def processes(self) -> list[psutil.Process]:
        """Return every process of the cluster: Ray, controller, and what they started."""
        cluster_id = self.record().cluster_id
        marks = {f"RAYLAUNCH_CLUSTER_ID={cluster_id}", f"{VAR_CONTROLLER_OF}={cluster_id}"}
        return [process for process in psutil.process_iter() if not marks.isdisjoint(_environ(process.pid))]

    def of_attempt(self, attempt: str) -> list[psutil.Process]:
        """Return every process that bears the attempt's mark."""
        mark = f"RAYLAUNCH_ATTEMPT_ID={self.record().cluster_id}/{attempt}"
        return [process for process in psutil.process_iter() if mark in _environ(process.pid)]

    def ray_env(self) -> dict[str, str]:
        """Return the environment that ``eval "$(raylaunch env)"`` makes."""
        shell = subprocess.run(
            ["bash", "-c", f'eval "$({sys.executable} -m raylaunch env)" && env -0'],
            cwd=self.work,
            env=self.env,
            capture_output=True,
            check=True,
            timeout=60,
        )
        pairs = (line.split("=", 1) for line in shell.stdout.decode().split("\0") if "=" in line)
        return {pair[0]: pair[1] for pair in pairs}

    def ray(self, *words: str, timeout_s: float = 90) -> Result:
        """Run Ray's own command line in that environment."""
        done = subprocess.run(
            [str(Path(sys.executable).with_name("ray")), *words],
            cwd=self.work,
            env=self.ray_env(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)


def argv(process: psutil.Process) -> list[str]:
    """Return a process's arguments; none when it has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _environ(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


@contextmanager
def running_cluster(spec: Mapping[str, object] | None = None) -> Iterator[Cluster]:
    """Start an embedded cluster in a home of its own, and end it."""
    with unstarted_cluster(spec) as cluster:
        cluster.good("up", timeout_s=UP_S)
        yield cluster


@contextmanager
def unstarted_cluster(spec: Mapping[str, object] | None = None) -> Iterator[Cluster]:
    """Make a home of its own for an embedded cluster, and end whatever of it runs at the end."""
    home = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
    work = home / "work"
    work.mkdir()
    lines = {"kind": "local", "gpus": 4, "cpus": 8, **(spec or {})}
    (work / "cluster.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()))
    cluster = Cluster(home, work)
    try:
        yield cluster
    finally:
        down = cluster.cli("down", "--force", timeout_s=UP_S)
        left = cluster.processes() if cluster.paths.record.exists() else []
        shutil.rmtree(cluster.paths.temp, ignore_errors=True)
        shutil.rmtree(home, ignore_errors=True)
    assert not left, f"left over after raylaunch down ({down.out} {down.err}): {left}"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The one cluster that tests share which do not break it."""
    with running_cluster() as shared:
        yield shared


@pytest.fixture(scope="session")
def broken() -> Iterator[Cluster]:
    """The one cluster that tests break on purpose. Two commands ``up`` at once have started it."""
    with unstarted_cluster({"labels": {"team": "vision"}}) as shared:
        with ThreadPoolExecutor(2) as pool:
            ups = [pool.submit(shared.good, "up", "--json", timeout_s=2 * UP_S) for _ in range(2)]
            shared.first_ups = [json.loads(up.result()) for up in ups]
        yield shared
