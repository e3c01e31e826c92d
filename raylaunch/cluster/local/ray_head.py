"""Ray's head on this machine: which Ray is installed, how it is started, and when it is ready. Never imports Ray."""

from __future__ import annotations

import importlib.metadata
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import raylaunch
from raylaunch.cluster import tls
from raylaunch.cluster.local.gpus import GpuChoice
from raylaunch.cluster.local.health import http_request
from raylaunch.cluster.ports import LOOPBACK
from raylaunch.cluster.processes import VAR_CLUSTER_ID
from raylaunch.cluster.record import NodePlace
from raylaunch.contract import VAR_NODE_ROOT, VAR_PATH
from raylaunch.errors import SpecError, VersionError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.fields import GPU_VARIABLES
from raylaunch.paths import ClusterPaths, storage_errors
from raylaunch.version import __version__

NEEDED = "2.60"
"""The Ray that this raylaunch was made for and tested with."""

HOST_LABEL = "raylaunch-host"
"""The label of a Ray node that holds the host's name in cluster.yaml."""

_A_YEAR_S = 365 * 24 * 3600
_NO_PORT = "65536"
"""An invalid port: Ray then logs that it has no such server, and continues without it."""
_HEADLESS_S = 600
"""How long jobs of a node continue without the head: it may be booting."""

_KEPT_FREE = 16 * 1024**3

_FOREIGN = re.compile(r"RAY_|RAYLAUNCH_|WANDB_|PYTHON(PATH|HOME|STARTUP|SAFEPATH|INSPECT)$|SSH_")
_SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|(^|_)AUTH($|_)|NETRC", re.IGNORECASE
)
_PROXIES = re.compile(r"(http|https|all)_proxy", re.IGNORECASE)

_FLAGS = {
    "port": "gcs",
    "dashboard-port": "dashboard",
    "dashboard-agent-listen-port": "dashboard_agent",
    "dashboard-agent-grpc-port": "dashboard_agent_grpc",
    "metrics-export-port": "metrics",
    "runtime-env-agent-port": "runtime_env_agent",
    "ray-client-server-port": "client_server",
    "node-manager-port": "node_manager",
    "object-manager-port": "object_manager",
    "min-worker-port": "worker_min",
    "max-worker-port": "worker_max",
}
_HEAD_FLAGS = ("port", "dashboard-port", "ray-client-server-port")


def installed_ray() -> str:
    """Return the version of Ray in this environment.

    Raises:
        VersionError: Ray is not installed, or is not of a version that this raylaunch supports.
    """
    command = f'{sys.executable} -m pip install "ray[default]=={NEEDED}.*"'
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        msg = f"Ray is not installed in {sys.prefix}"
        raise VersionError(msg, hint=f"install it: {command}") from None
    if not version.startswith(f"{NEEDED}."):
        msg = f"raylaunch {__version__} needs Ray {NEEDED}, but Ray {version} is installed in {sys.prefix}"
        raise VersionError(msg, hint=f"install that version: {command}")
    return version


def clean_environment(environ: Mapping[str, str], paths: ClusterPaths) -> dict[str, str]:
    """Return the environment in which Ray and the controller start.

    Variables of another Ray, of one person's W&B and of Python's start-up are left out, and so is everything that looks
    like a secret: jobs inherit Ray's environment, and get secrets by name instead.
    """
    kept = {key: value for key, value in environ.items() if not (_FOREIGN.match(key) or _SECRET.search(key))}
    kept = {key: value for key, value in kept.items() if key not in GPU_VARIABLES}
    if any(_PROXIES.fullmatch(key) for key in kept):
        for key in ("NO_PROXY", "no_proxy"):
            kept[key] = ",".join(dict.fromkeys([*filter(None, kept.get(key, "").split(",")), LOOPBACK, "localhost"]))
    kept["RAYLAUNCH_HOME"] = str(paths.home)
    kept["PYTHONPATH"] = str(paths.imports)
    return kept


def _package_dir() -> Path:
    return Path(str(raylaunch.__file__)).resolve().parent


def make_importable(paths: ClusterPaths) -> bool:
    """Let programs under Ray import this raylaunch, through a folder that contains nothing else.

    Return whether another raylaunch was there before.

    Node agents thus have the controller's version even if an older raylaunch started Ray. A checkout itself on
    ``PYTHONPATH`` would let its other folders shadow modules of the training.
    """
    link = paths.imports / "raylaunch"
    with storage_errors(link):
        paths.imports.mkdir(mode=0o700, exist_ok=True)
        if link.is_symlink() and link.resolve() == _package_dir():
            return False
        had = link.is_symlink()
        link.unlink(missing_ok=True)
        link.symlink_to(_package_dir())
    return had


@dataclass(frozen=True)
class RayStart:
    """Everything that decides how Ray is started on this machine: as the head, or as a node that joins one."""

    paths: ClusterPaths
    spec: ClusterSpec
    cluster_id: str
    ports: Mapping[str, int]
    gpus: GpuChoice
    place: NodePlace = field(default_factory=NodePlace)
    tls: bool = False
    """Whether it uses TLS with the other nodes; its certificate is in `paths`."""

    def argv(self) -> list[str]:
        """Return the program and its arguments; they contain no secret."""
        argv = [sys.executable, "-m", "raylaunch.cluster.ray_start", "start", "--block", "--disable-usage-stats"]
        if self.place.is_worker:
            argv.append(f"--address={self.place.head}")
        else:
            argv += ["--head", f"--dashboard-host={LOOPBACK}", "--include-dashboard=true"]
        flags = {flag: name for flag, name in _FLAGS.items() if not (self.place.is_worker and flag in _HEAD_FLAGS)}
        argv.append(f"--node-ip-address={self.place.ray_address}")
        argv += [f"--{flag}={self.ports[name]}" for flag, name in flags.items()]
        argv += [f"--temp-dir={self.paths.temp}", f"--num-gpus={self.gpus.count}", "--log-color=false"]
        if self.spec.cpus is not None:
            argv.append(f"--num-cpus={whole_cpus(self.spec.cpus)}")
        labels = self.spec.labels | ({HOST_LABEL: self.place.host} if self.place.host else {})
        if labels:
            argv.append("--labels=" + ",".join(f"{key}={value}" for key, value in labels.items()))
        return argv

    def environment(self, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Return Ray's whole environment, which everything that it starts inherits."""
        env = clean_environment(environ, self.paths) | self.place.env
        env.setdefault("RAY_memory_usage_threshold", memory_threshold(psutil.virtual_memory().total))
        path = env.get("PATH") or os.defpath
        env |= {
            VAR_CLUSTER_ID: self.cluster_id,
            VAR_NODE_ROOT: str(self.paths.node),
            VAR_PATH: path,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), path]),  # ray job submit -- python train.py
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.paths.ray_token),
            "RAY_JOB_START_TIMEOUT_SECONDS": str(_A_YEAR_S),  # the queue is ours; Ray must not fail what waits
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_agent_register_timeout_ms": "600000",  # Ray's agents start late on a busy machine: see ray_start
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # with a node agent a node is never idle
            "SPT_NOENV": "1",  # a process that sets its title must not wipe out the environment by which it is found
            "RAY_free_objects_period_milliseconds": "50",  # data that node agents sent is freed at once
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a job without GPUs sees none
        }
        if self.tls:
            env |= tls.variables_of(self.paths)
        if not self.place.is_worker:
            env |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.paths.gcs)}
        if self.place.address:
            env["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(_HEADLESS_S)
            env["RAY_enable_metrics_collection"] = "0"  # its port answers without the token
            env |= dict.fromkeys(("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT"), _NO_PORT)  # these do too
        else:
            env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # with it, every socket is bound to loopback
        if self.place.interface:
            env = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), self.place.interface) | env
        if self.gpus.gpus:
            env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": self.gpus.visible}
        return env


def memory_threshold(total: int) -> str:
    """Return the share of a node's memory at which Ray's monitor kills a task, to protect the node.

    Ray always keeps 5 % free, which on a machine with 2 TiB is 100 GiB; 16 GiB are enough anywhere.
    """
    return f"{1 - min(0.05, _KEPT_FREE / max(total, 1)):.4f}"


def whole_cpus(cpus: float) -> int:
    """Return the number of CPU cores for Ray.

    Raises:
        SpecError: it is not a whole number, which Ray requires of a node's cores.
    """
    if not math.isclose(cpus, round(cpus)):
        msg = f"cpus: {cpus:g} is not a whole number of cores"
        raise SpecError(msg, hint=f"write {max(1, round(cpus))}; jobs may request fractions", field="cpus")
    return round(cpus)


async def jobs_answer(ports: Mapping[str, int], token: str) -> str:
    """Query Ray's Jobs API; return an empty string if it answered, else the reason."""
    answer = await http_request(ports["dashboard"], "/api/jobs/", token=token)
    return "" if answer.ok else answer.why or f"it answered HTTP {answer.status}"


async def nodes_alive(ports: Mapping[str, int], token: str) -> int:
    """Return how many nodes Ray lists as alive. Unlike ``/nodes?view=summary``, its state API is not seconds behind."""
    listed: Any = (await http_request(ports["dashboard"], "/api/v0/nodes", token=token)).json()
    try:
        return sum(node["state"] == "ALIVE" for node in listed["data"]["result"]["result"])
    except (KeyError, TypeError):
        return 0
