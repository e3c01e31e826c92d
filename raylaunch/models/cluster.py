"""Views of a cluster: its nodes and GPUs, its controller, its people, and drained hosts.

As in `raylaunch.models.job`, every model is the wire format. Times are seconds since the epoch (UTC), sizes bytes.
"""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field

from raylaunch.models.fields import Capacity, Count, Environment, Moment, Port
from raylaunch.models.job import JobView, View, WheelSet


class GpuView(View):
    """One GPU of a node. Memory is None if ``nvidia-smi`` prints ``[N/A]`` (unified memory)."""

    index: str
    uuid: str = ""
    name: str = ""
    memory_total: Count | None = None
    memory_used: Count | None = None
    utilization: Capacity | None = None
    """Percent."""
    processes: tuple[str, ...] = ()
    """Processes that use it outside raylaunch: ``user:pid:command``."""


class Drain(View):
    """A host that gets no new attempts: since when, by whom, and until when."""

    host: str
    person: str
    since: Moment
    until: Moment | None = None
    """End of the drain; None until it is lifted by hand."""

    def __str__(self) -> str:
        until = f" until {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(self.until))}" if self.until else ""
        return f"is drained by {self.person}{until}"


class NodeView(View):
    """One machine of the Ray cluster: its resources, and how much of them is free."""

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
    """Free bytes on the disk of raylaunch's folder there."""
    steward: bool = False
    """Whether its node agent responds."""
    drain: Drain | None = None
    """Set while it gets no new attempts."""

    @property
    def ready(self) -> bool:
        """Whether Ray and raylaunch can start an attempt there."""
        return self.alive and self.steward


class ProcessView(View):
    """One process of the cluster, identified by pid and start time because pids are reused."""

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
    """The state of the controller, Ray and the nodes (``GET /v1/status``).

    `person` and `role` are those of the request's token; `queued` and `running` count jobs; `store` is a folder on the
    head, `store_free` the free bytes of its disk.
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
    """The environment of jobs that name none (``GET /v1/python``), and the interpreter that runs Ray."""

    environment: Environment = Environment()
    """`environment` of cluster.yaml."""
    version: str = ""
    """Version of the Python that runs Ray; empty if somebody else runs Ray."""
    prefix: str = ""
    """Folder of that Python, on the head."""
    ray: str = ""
    """Version of Ray."""


class EnvironmentWheels(View):
    """Wheels for the environment in cluster.yaml, gathered by `up` for nodes without an index.

    The body of ``PUT /v1/python/wheels``; the wheels themselves are packages of the cluster.
    """

    environment: Environment
    sets: tuple[WheelSet, ...]


class HostJobs(View):
    """The jobs that are running on one host (``/v1/hosts/HOST``), without their heavy fields."""

    host: str
    drain: Drain | None = None
    jobs: tuple[JobView, ...] = ()
    others: str = ""
    """If no job of raylaunch is running: what Ray counts as used there nevertheless, in words; empty for nothing."""


class Quiet(View):
    """Whether the cluster pauses new attempts (``/v1/quiet``): until when, and which jobs are still running."""

    until: Moment | None = None
    """None if it is not paused."""
    jobs: tuple[JobView, ...] = ()


class RayAccess(View):
    """What Ray's own tools need to reach the cluster (``GET /v1/ray``; role operator or admin)."""

    gcs_address: str
    dashboard_url: str
    token: str = Field(repr=False)
    tls: dict[str, str] = Field(default_factory=dict)
    """Ray's variables for TLS, with paths on the controller's machine; empty if Ray does not use it."""


class TokenView(View):
    """A token or an invitation, without the secret itself: `id` is the start of its hash."""

    id: str
    person: str
    role: str
    created_at: Moment | None = None
    """None for tokens that are older than this field."""
    expires_at: Moment | None = None
    made_by: str = ""
    invited: bool = False
    """Whether it is an invitation that was not accepted yet; it expires at `expires_at`."""
    mine: bool = False
    """Whether it is the token of this request."""


class Invitation(View):
    """What a person needs to join: a code that works once."""

    code: str = Field(repr=False)
    person: str
    role: str
    expires_at: Moment
    token_expires_at: Moment | None = None
    cluster: str
    port: Port
    """The controller's, on the head's loopback."""


class Admission(View):
    """What a person is on the cluster after accepting an invitation."""

    person: str
    role: str
    made_by: str
    cluster: str
    cluster_id: str
    expires_at: Moment | None = None
