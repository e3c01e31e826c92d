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

import psutil
from pydantic import BaseModel, ValidationError

import raylaunch
from raylaunch.cluster import tls
from raylaunch.cluster.local.gpus import GpuChoice
from raylaunch.cluster.local.health import ask
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
"""Ray's label of a node that bears the host's name in cluster.yaml."""

_A_YEAR_S = 365 * 24 * 3600
_NO_PORT = "65536"
"""A port that there is not: Ray then says in a log that it has no such server, and goes on without."""
_HEADLESS_S = 600
"""How long jobs of a node go on without the head: it may be booting."""

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
    """Return the version of the Ray that is installed beside this raylaunch.

    Raises:
        VersionError: there is none, or not one that this raylaunch knows.
    """
    command = f'{sys.executable} -m pip install "ray[default]=={NEEDED}.*"'
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        msg = f"Ray is not installed in {sys.prefix}"
        raise VersionError(msg, hint=f"install it: {command}") from None
    if not version.startswith(f"{NEEDED}."):
        msg = f"raylaunch {__version__} needs Ray {NEEDED}, and Ray {version} is installed in {sys.prefix}"
        raise VersionError(msg, hint=f"install the one that fits: {command}")
    return version


def clean_environment(environ: Mapping[str, str], paths: ClusterPaths) -> dict[str, str]:
    """Return the environment that Ray and the controller begin with.

    What belongs to another Ray, to one person's W&B or to Python's start is left out, and so is all that looks like a
    secret: jobs inherit Ray's environment, and get secrets by name instead.
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
    """Let what runs under Ray import this raylaunch, through a folder that holds nothing else.

    Return whether another one was found there until now.

    So stewards are of the controller's version, also where Ray was started by an older one and goes on. And a checkout
    itself on ``PYTHONPATH`` would let its other folders shadow modules of the training.
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
    """All that decides how Ray is started on this machine: as the head, or as a node that joins one."""

    paths: ClusterPaths
    spec: ClusterSpec
    cluster_id: str
    ports: Mapping[str, int]
    gpus: GpuChoice
    place: NodePlace = field(default_factory=NodePlace)
    tls: bool = False
    """Whether it speaks TLS with the other nodes; its certificate is in `paths`."""

    def argv(self) -> list[str]:
        """Return the program and its arguments; nothing in them is secret."""
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
        """Return Ray's whole environment here, which everything that it starts inherits."""
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
            "RAY_agent_register_timeout_ms": "600000",  # agents of a busy machine are late: see ray_start
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # a node with a steward is never idle: it would wait in vain
            "SPT_NOENV": "1",  # a process that sets its title must not wipe out the environment by which it is found
            "RAY_free_objects_period_milliseconds": "50",  # what stewards sent is freed at once, not a second on
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a job without GPUs sees none
        }
        if self.tls:
            env |= tls.variables_of(self.paths)
        if not self.place.is_worker:
            env |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.paths.gcs)}
        if self.place.address:
            env["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(_HEADLESS_S)
            env["RAY_enable_metrics_collection"] = "0"  # its port answers anybody, without the token
            env |= dict.fromkeys(("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT"), _NO_PORT)  # as these do
        else:
            env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # with it, every socket is bound to loopback
        if self.place.interface:
            env = dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), self.place.interface) | env
        if self.gpus.gpus:
            env |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": self.gpus.visible}
        return env


def memory_threshold(total: int) -> str:
    """Return the share of a node's memory from which Ray's monitor ends a task, so that the node itself lives on.

    Ray keeps 5 % free whatever there is, which on a machine with 2 TiB would be 100 GiB; 16 GiB are enough anywhere.
    """
    return f"{1 - min(0.05, _KEPT_FREE / max(total, 1)):.4f}"


def whole_cpus(cpus: float) -> int:
    """Return the number of CPU cores that Ray is told.

    Raises:
        SpecError: it is not a whole number; Ray counts a node's cores in whole ones.
    """
    if not math.isclose(cpus, round(cpus)):
        msg = f"cpus: {cpus:g} is not a whole number of cores"
        raise SpecError(msg, hint=f"write {max(1, round(cpus))}; jobs may ask for fractions", field="cpus")
    return round(cpus)


async def jobs_answer(ports: Mapping[str, int], token: str) -> str:
    """Ask Ray's Jobs endpoint; return an empty string when it answered, else why not."""
    answer = await ask(ports["dashboard"], "/api/jobs/", token=token)
    return "" if answer.ok else answer.why or f"it answered HTTP {answer.status}"


async def nodes_alive(ports: Mapping[str, int], token: str) -> int:
    """Return how many nodes Ray lists as alive."""
    answer = await ask(ports["dashboard"], "/api/v0/nodes", token=token)
    try:
        listed = _Answer.model_validate_json(answer.body)
    except ValidationError:
        return 0
    return sum(node.state == "ALIVE" for node in listed.data.result.result)


class _Node(BaseModel):
    state: str


class _Nodes(BaseModel):
    result: tuple[_Node, ...]


class _Data(BaseModel):
    result: _Nodes


class _Answer(BaseModel):
    """The answer of Ray's state API. Unlike ``/nodes?view=summary`` it does not lag seconds behind."""

    data: _Data
