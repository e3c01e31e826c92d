"""A bare Ray head of the test's own: loopback only, token on, free ports. For tests that need no controller."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from raylaunch.cluster.ports import LOOPBACK, free_ports, worker_range
from support.signals import send_group
from support.waiting import wait_until

PORT_FLAGS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "runtime-env-agent-port",
    "ray-client-server-port",
    "node-manager-port",
    "object-manager-port",
)
"""The ports of a head, as ``ray start`` calls them."""


@dataclass(frozen=True)
class RayHeadRunning:
    """A Ray that runs."""

    gcs_address: str
    dashboard_url: str
    token_path: Path
    node_root: Path
    """Where its node's agent keeps attempts: on another machine in earnest, so only the tests look into it."""
    process: subprocess.Popen[bytes]
    home: Path
    """Its account's home, which is the test's own."""


@contextlib.contextmanager
def ray_head(*, gpus: int = 2, cpus: int = 4) -> Iterator[RayHeadRunning]:
    """Run a head with logical GPUs and a token; end all of its processes afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="rlh-", dir="/tmp"))
    secret = folder / "token"
    secret.write_text("a" * 48)
    secret.chmod(0o600)
    home = folder / "home"
    home.mkdir()
    ports = dict(zip(PORT_FLAGS, free_ports(len(PORT_FLAGS)), strict=True))
    workers = worker_range(avoid=ports.values())
    argv = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    argv += [f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}", f"--temp-dir={folder / 'r'}"]
    argv += [f"--{flag}={port}" for flag, port in ports.items()]
    argv += [f"--min-worker-port={workers.start}", f"--max-worker-port={workers[-1]}"]
    argv += [f"--num-gpus={gpus}", f"--num-cpus={cpus}", '--resources={"fast_disk": 2}', "--labels=zone=attic"]
    argv += ["--object-store-memory=200000000"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = {
        **kept,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(secret),
        "RAYLAUNCH_NODE_ROOT": str(folder / "node"),
        "RAY_free_objects_period_milliseconds": "50",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "SPT_NOENV": "1",
        "HOME": str(home),
    }
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        wait_until(lambda: b"Ray runtime started" in (folder / "ray.log").read_bytes(), 60, "Ray's head has started")
        yield RayHeadRunning(
            f"{LOOPBACK}:{ports['port']}",
            f"http://{LOOPBACK}:{ports['dashboard-port']}",
            secret,
            folder / "node",
            process,
            home,
        )
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    for signal_number, limit_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 10)):
        send_group(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit_s)


@pytest.fixture(scope="session")
def plain_ray() -> Iterator[RayHeadRunning]:
    """The one plain Ray that tests share."""
    with ray_head() as running:
        yield running
