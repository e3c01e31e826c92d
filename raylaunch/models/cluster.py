"""What is observed of a cluster: its nodes and GPUs, its controller, who may use it, and what is drained.

As in `raylaunch.models.job`, every model is the wire format. Times are seconds since the epoch (UTC), sizes bytes.
"""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field

from raylaunch.models.fields import Capacity, Count, Environment, Moment, Port
from raylaunch.models.job import JobView, View, WheelSet


class GpuView(View):
    """One GPU of a node. Memory is None where ``nvidia-smi`` says ``[N/A]`` (unified memory)."""

    index: str
    uuid: str = ""
    name: str = ""
    memory_total: Count | None = None
    memory_used: Count | None = None
    utilization: Capacity | None = None
    """Percent."""
    processes: tuple[str, ...] = ()
    """Who uses it outside raylaunch: ``user:pid:command``."""


class Drain(View):
    """A host that gets no new attempts, since when, by whom, and until when."""

    host: str
    person: str
    since: Moment
    until: Moment | None = None
    """When it takes jobs again by itself; None for not before somebody says so."""

    def __str__(self) -> str:
        until = f" until {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(self.until))}" if self.until else ""
        return f"is drained by {self.person}{until}"


class NodeView(View):
    """One machine of the Ray cluster: what it has, and what of that nothing holds."""

    id: str
    hostname: str
    address: str
    alive: bool
    arch: str = ""
    cpus: Capacity = 0
    gpus: Capacity = 0
    memory: Count = 0
    custom: dict[str, Capacity] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    cpus_free: Capacity = 0
    gpus_free: Capacity = 0
    memory_free: Count = 0
    gpu_type: str = ""
    gpu: tuple[GpuView, ...] = ()
    disk_free: Count | None = None
    """What the disk of raylaunch's folder there has left."""
    steward: bool = False
    """Whether its steward answers."""
    drain: Drain | None = None
    """Set while it gets no new attempts."""

    @property
    def ready(self) -> bool:
        """Whether an attempt can start there, as far as Ray and raylaunch are concerned."""
        return self.alive and self.steward


class ProcessView(View):
    """One process of the cluster, identified by pid and start time so that a reused pid is not mistaken for it."""

    pid: Count
    started_at: Moment
    alive: bool
    port: Port | None = None
    url: str = ""
    version: str = ""
    log: str = ""


class ClusterStatus(View):
    """The cluster as a whole."""

    name: str
    kind: Literal["local", "ssh", "existing"]
    state: Literal["running", "degraded", "stopped"]
    problems: tuple[str, ...] = ()
    controller: ProcessView | None = None
    ray: ProcessView | None = None
    ray_ports: dict[str, Port] = Field(default_factory=dict)
    nodes: tuple[NodeView, ...] = ()
    queued: Count = 0
    running: Count = 0
    store: str = ""
    store_free: Count | None = None
    gpus_logical: bool = False
    owner: str = ""


class ControllerStatus(View):
    """What the controller says of itself, Ray and the nodes (``GET /v1/status``).

    `person` and `role` are those of the token that asks; `queued` and `running` count jobs; `store` is a folder on the
    head, `store_free` what its disk has left.
    """

    cluster: str
    version: str
    api: Count
    pid: Count
    person: str
    role: str
    started_at: Moment
    ray: Literal["up", "down"]
    ray_version: str = ""
    nodes: tuple[NodeView, ...] = ()
    queued: Count = 0
    running: Count = 0
    store: str = ""
    store_free: Count | None = None
    problems: tuple[str, ...] = ()


class ClusterPython(View):
    """What jobs that name no environment get (``GET /v1/python``), and the interpreter that runs Ray."""

    environment: Environment = Environment()
    """`environment` of cluster.yaml."""
    version: str = ""
    """Of the Python that runs Ray; empty where somebody else runs it."""
    prefix: str = ""
    """Its folder, on the head."""
    ray: str = ""
    """Version of Ray."""


class EnvironmentWheels(View):
    """Wheels of the environment that cluster.yaml lists, gathered at `up` for nodes without an index.

    They are what ``PUT /v1/python/wheels`` takes; their bytes are packages of the cluster.
    """

    environment: Environment
    sets: tuple[WheelSet, ...]


class HostJobs(View):
    """What runs on one host (``/v1/hosts/HOST``): jobs of ours, without their heavy fields."""

    host: str
    drain: Drain | None = None
    jobs: tuple[JobView, ...] = ()
    others: str = ""
    """Where no job of ours runs: what Ray counts as used there all the same, in words; empty when nothing is."""


class Quiet(View):
    """A cluster that begins no attempt for a while (``/v1/quiet``): until when, and what still runs."""

    until: Moment | None = None
    """None when it is not quiet."""
    jobs: tuple[JobView, ...] = ()


class RayAccess(View):
    """What Ray's own tools need to reach the cluster (``GET /v1/ray``; role operator or admin)."""

    gcs_address: str
    dashboard_url: str
    token: str = Field(repr=False)
    tls: dict[str, str] = Field(default_factory=dict)
    """Ray's variables for TLS, with paths on the controller's machine; empty where Ray does not use it."""


class TokenView(View):
    """Who may come in, without the token itself: `id` is the beginning of its hash."""

    id: str
    person: str
    role: str
    created_at: Moment | None = None
    """None for those that were made before this was kept."""
    expires_at: Moment | None = None
    made_by: str = ""
    invited: bool = False
    """Whether it is an invitation that nobody has taken yet; it is over at `expires_at`."""
    mine: bool = False
    """Whether it is the one that asks."""


class Invitation(View):
    """What a person needs to come in: a code that works once, and is worth nothing afterwards."""

    code: str = Field(repr=False)
    person: str
    role: str
    expires_at: Moment
    token_expires_at: Moment | None = None
    cluster: str
    port: Port
    """The controller's, on the head's loopback."""


class Admission(View):
    """What a person became who took an invitation."""

    person: str
    role: str
    made_by: str
    cluster: str
    cluster_id: str
    expires_at: Moment | None = None
