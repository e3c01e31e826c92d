"""How long a command takes from the shell to its answer, beside Ray's own command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.measure import Result, Skipped, medians

_BIN = Path(sys.executable).parent
_RAYLAUNCH = (sys.executable, "-m", "raylaunch")
_RAY = (str(_BIN / "ray"),)


def _run(command: Sequence[str], environ: Mapping[str, str], *, limit_s: float = 120) -> str:
    done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=limit_s, check=False)
    if done.returncode:
        msg = f"{' '.join(command)} exited with {done.returncode}: {done.stderr.strip()[-500:]}"
        raise Skipped(msg)
    return done.stdout


def _exports(text: str) -> dict[str, str]:
    """Read ``export NAME='value'`` lines as a shell would."""
    shown = subprocess.run(["/bin/sh", "-c", f"{text}\nenv -0"], env={}, capture_output=True, timeout=30, check=True)
    pairs = (line.partition("=") for line in shown.stdout.decode().split("\0") if line)
    return {name: value for name, _, value in pairs if name != "PWD"}


def run() -> Iterator[Result]:
    """Measure help without a cluster, then the list of jobs of a cluster of its own."""
    environ = dict(os.environ)
    figure, peer = medians(
        lambda: _run((*_RAYLAUNCH, "list", "--help"), environ),
        lambda: _run((*_RAY, "job", "list", "--help"), environ),
        rounds=5,
    )
    yield Result("list --help", figure, "s", "ray job list --help", peer, bar=0.5)
    yield _list_of_jobs(environ)


def _list_of_jobs(environ: dict[str, str]) -> Result:
    home = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    environ = {name: value for name, value in environ.items() if not name.startswith(("RAY_", "RAYLAUNCH_"))}
    environ["RAYLAUNCH_HOME"] = home
    try:
        _run((*_RAYLAUNCH, "up"), environ, limit_s=300)
        for_ray = environ | _exports(_run((*_RAYLAUNCH, "env"), environ))
        _run((*_RAYLAUNCH, "run", "--working-dir", "", "--", "true"), environ)
        figure, peer = medians(
            lambda: _run((*_RAYLAUNCH, "list"), environ), lambda: _run((*_RAY, "job", "list"), for_ray), rounds=7
        )
    finally:
        subprocess.run([*_RAYLAUNCH, "down"], env=environ, capture_output=True, timeout=120, check=False)
        shutil.rmtree(home, ignore_errors=True)
    return Result("list jobs", figure, "s", "ray job list", peer, bar=0.5)
