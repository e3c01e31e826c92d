"""What a cluster has on its machine, without a cluster: its folders, and processes that stay until they are ended."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anyio
import pytest

from raylaunch.cluster.processes import ProcessIdentity, start_apart
from raylaunch.paths import ClusterPaths, cluster_paths, make_cluster_dirs
from support.signals import send

STAYS = (sys.executable, "-I", "-S", "-c", "import signal; signal.pause()")
Start = Callable[..., ProcessIdentity]


@pytest.fixture
def paths(home: Path) -> Iterator[ClusterPaths]:
    """The folders of a cluster that does not run."""
    assert home.is_dir()
    found = cluster_paths("local")
    make_cluster_dirs(found)
    yield found
    shutil.rmtree(found.temp, ignore_errors=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start processes as a cluster does, by default one that does nothing; they end with the test."""
    started: list[ProcessIdentity] = []

    def start_one(*argv: str, **env: str) -> ProcessIdentity:
        process = anyio.run(partial(start_apart, argv or STAYS, env=env, cwd=Path("/"), log=tmp_path / "log"))
        started.append(process)
        return process

    yield start_one
    for process in started:
        send(process)
