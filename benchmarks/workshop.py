"""What benchmarks share: a home of their own, an environment without anybody's settings, and one cluster."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import psutil
from typing_extensions import Self

from benchmarks.measure import Skipped
from raylaunch.cluster.types import Endpoint

BIN = Path(sys.executable).parent
RAYLAUNCH = (sys.executable, "-m", "raylaunch")
RAY = (str(BIN / "ray"),)
PROGRAMS = Path(__file__).parent / "programs"
_UP_S = 300.0
_FOREIGN = ("RAY_", "RAYLAUNCH_", "WANDB_", "CLAUDE", "VIRTUAL_ENV")


class Cluster:
    """An embedded cluster in a home of its own."""

    def __init__(self, home: Path, environ: Mapping[str, str], *, spec: str = "") -> None:
        self.home = home
        self.spec = spec
        self.environ = {**environ, "RAYLAUNCH_HOME": str(home)}

    def up(self) -> None:
        """Start it; `down` ends it."""
        file = self.home / "cluster.yaml"
        if self.spec:
            self.home.mkdir(exist_ok=True)
            file.write_text(self.spec, encoding="utf-8")
        run_program((*RAYLAUNCH, *(("-c", str(file)) if self.spec else ()), "up"), self.environ, limit_s=_UP_S)

    def down(self) -> None:
        """End what `up` started."""
        subprocess.run(
            [*RAYLAUNCH, "down", "--force"], env=self.environ, capture_output=True, timeout=_UP_S, check=False
        )

    @property
    def reach(self) -> Endpoint:
        """Where its controller answers."""
        folder = self.home / "clusters" / "local"
        port = json.loads((folder / "controller.json").read_text(encoding="utf-8"))["port"]
        return Endpoint(f"http://127.0.0.1:{port}", (folder / "token").read_text(encoding="utf-8").strip())

    @cached_property
    def ray_environ(self) -> dict[str, str]:
        """The environment in which Ray's own tools reach it."""
        lines = run_program((*RAYLAUNCH, "env"), self.environ)
        shell = subprocess.run(
            ["/bin/sh", "-c", f"{lines}\nenv -0"], env={}, capture_output=True, timeout=30, check=True
        )
        pairs = (line.partition("=") for line in shell.stdout.decode().split("\0") if line)
        return self.environ | {name: value for name, _, value in pairs if name != "PWD"}

    def processes(self) -> dict[str, psutil.Process]:
        """Return raylaunch's own processes: the controller, its bridge to Ray, and an agent that is an actor."""
        record = json.loads((self.home / "clusters" / "local" / "cluster.json").read_text(encoding="utf-8"))
        controller = psutil.Process(record["controller"]["pid"])
        (link,) = controller.children()
        agents = [one for one in psutil.process_iter() if _is_node_agent(one, str(self.home))]
        return {"controller": controller, "link": link, **{f"agent {one.pid}": one for one in agents}}


class Workshop:
    """Folders and a cluster for one run of benchmarks. A context manager."""

    def __init__(self, *, quick: bool = False) -> None:
        self.quick = quick
        """Whether only to see that the benchmarks run: a few rounds, small sizes, no figures worth keeping."""
        self._stack = contextlib.ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp")))
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        self.environ = {**kept, "NO_COLOR": "1", "NETRC": str(self.folder / "no-netrc")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def rounds(self, many: int) -> int:
        """Return how many rounds to measure."""
        return 1 if self.quick else many

    @cached_property
    def cluster(self) -> Cluster:
        """The cluster that benchmarks share, started when the first needs it."""
        return self._stack.enter_context(self.other_cluster("shared"))

    @contextlib.contextmanager
    def other_cluster(self, name: str, *, spec: str = "") -> Iterator[Cluster]:
        """Start a further cluster, whose store may have been filled before in `home`; `spec` is its cluster.yaml."""
        cluster = Cluster(self.home(name), self.environ, spec=spec)
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()
            shutil.rmtree(cluster.home, ignore_errors=True)

    def home(self, name: str) -> Path:
        """Return the home of a cluster that `other_cluster` starts."""
        return self.folder / name


def run_program(command: Sequence[str], environ: Mapping[str, str], *, limit_s: float = 120) -> str:
    """Run a program to its end and return what it printed.

    Raises:
        Skipped: it failed; the reason is its own.
    """
    done = subprocess.run(
        command, env=dict(environ), cwd="/", capture_output=True, text=True, timeout=limit_s, check=False
    )
    if done.returncode:
        msg = f"{' '.join(command)} exited with {done.returncode}: {done.stderr.strip()[-500:]}"
        raise Skipped(msg)
    return done.stdout


def _is_node_agent(process: psutil.Process, node: str) -> bool:
    try:
        named = "NodeAgent" in " ".join(process.cmdline())
        return named and process.environ().get("RAYLAUNCH_NODE_ROOT", "").startswith(node)
    except psutil.Error:
        return False
