"""What is observed: jobs, attempts, events, metrics, artifacts, the cluster; and `transition`, what may follow what.

Every model here is the wire format: the same object is the HTTP answer, the CLI's ``--json``, MCP's structured content
and the notebook's repr. Times are seconds since the epoch (UTC), sizes bytes, durations seconds.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from raylaunch.reasons import Reason
from raylaunch.spec import JobSpec


class JobState(str, Enum):
    """Where a job stands. The last five are ends and never change."""

    HELD = "held"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    TIMED_OUT = "timed_out"
    LOST = "lost"

    @property
    def ended(self) -> bool:
        """Whether this state is final."""
        return self in ENDED

    @property
    def active(self) -> bool:
        """Whether an attempt of the job may have processes on a node."""
        return self in {JobState.STARTING, JobState.RUNNING, JobState.STOPPING}


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.STOPPED, JobState.TIMED_OUT, JobState.LOST})


class Change(str, Enum):
    """What can happen to a job; the input of `transition`."""

    HOLD = "hold"
    RELEASE = "release"
    ADMIT = "admit"
    START = "start"
    REQUEUE = "requeue"
    STOP = "stop"
    SUCCEED = "succeed"
    FAIL = "fail"
    END_STOPPED = "end_stopped"
    TIME_OUT = "time_out"
    LOSE = "lose"


_ENDS = {
    Change.SUCCEED: JobState.SUCCEEDED,
    Change.FAIL: JobState.FAILED,
    Change.END_STOPPED: JobState.STOPPED,
    Change.TIME_OUT: JobState.TIMED_OUT,
    Change.LOSE: JobState.LOST,
}

_NEXT: dict[JobState, dict[Change, JobState]] = {
    JobState.HELD: {
        Change.RELEASE: JobState.QUEUED,
        Change.END_STOPPED: JobState.STOPPED,
        Change.FAIL: JobState.FAILED,
    },
    JobState.QUEUED: {
        Change.HOLD: JobState.HELD,
        Change.ADMIT: JobState.STARTING,
        Change.END_STOPPED: JobState.STOPPED,
        Change.FAIL: JobState.FAILED,
    },
    JobState.STARTING: {
        Change.START: JobState.RUNNING,
        Change.REQUEUE: JobState.QUEUED,
        Change.STOP: JobState.STOPPING,
        **_ENDS,
    },
    JobState.RUNNING: {Change.REQUEUE: JobState.QUEUED, Change.STOP: JobState.STOPPING, **_ENDS},
    JobState.STOPPING: dict(_ENDS),
}


class IllegalTransition(ValueError):  # noqa: N818 -- a bug of ours, not an error that a person acts on
    """A change that cannot happen in this state."""


def transition(state: JobState, change: Change) -> JobState:
    """Return the state that follows `state` when `change` happens.

    Raises:
        IllegalTransition: `change` cannot happen in `state`; ended states never change.
    """
    try:
        return _NEXT[state][change]
    except KeyError:
        msg = f"{change.value} cannot happen to a job that is {state.value}"
        raise IllegalTransition(msg) from None


class View(BaseModel):
    """Base of everything that is observed: immutable, and tolerant of fields that a newer controller adds."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class WandbLink(View):
    """The W&B side of a job: one run for the life of the job, on-line or off."""

    mode: Literal["online", "offline", "disabled"]
    run_id: str
    project: str
    entity: str = ""
    url: str = ""
    why: str = ""
    """Why this mode, in words (``no W&B credentials``, ``W&B did not answer within 10 s``)."""


class AttemptView(View):
    """One run of a job: one Ray submission with the id ``<job>-<n>``."""

    id: str
    n: int
    node: str = ""
    """Hostname of the node it was placed on."""
    node_id: str = ""
    admitted_at: float
    started_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    signal: str = ""
    """Name of the signal that ended it (``SIGKILL``), or empty."""
    gpus: tuple[str, ...] = ()
    """Ids that the attempt saw in ``CUDA_VISIBLE_DEVICES``."""
    pid: int | None = None
    reason: Reason | None = None
    message: str = ""
    replicated: bool = False
    """Whether all that it left behind is in the store."""


class Progress(View):
    """How far the training says it is."""

    step: float
    total: float | None = None
    at: float


class FileFact(View):
    """One packed or left-out file: path relative to the working directory, size in bytes."""

    path: str
    bytes: int


class PackReport(View):
    """What the client packed: said to the person, and kept with the job."""

    files: int = 0
    bytes: int = 0
    ignored: int = 0
    ignored_bytes: int = 0
    ignored_by: tuple[str, ...] = ()
    """The rules that left something out, as written (``.gitignore: *.pt``, ``built in: .venv/``)."""
    largest: tuple[FileFact, ...] = ()


class GitFacts(View):
    """The git state of the working directory at submit; `diff` is the dirty diff, cut at 1 MiB."""

    commit: str = ""
    branch: str = ""
    dirty: bool = False
    diff: str = ""
    diff_truncated: bool = False


class EnvironmentFacts(View):
    """What the node found in the job's environment before training started."""

    python: str = ""
    """Path of the interpreter."""
    version: str = ""
    wandb: str = ""
    torch: str = ""
    packages: tuple[str, ...] = ()
    """``name==version``, sorted."""
    warnings: tuple[str, ...] = ()


class JobView(View):
    """One job as anybody with the role to see it sees it."""

    id: str
    name: str
    owner: str
    state: JobState
    reason: Reason | None = None
    message: str = ""
    """The reason as a sentence for people, with the numbers of this job."""
    spec: JobSpec | None = None
    """None for a foreign job: one that was submitted with plain ``ray job submit``."""
    foreign: bool = False
    entrypoint: str = ""
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    updated_at: float
    attempts: tuple[AttemptView, ...] = ()
    unreachable: bool = False
    progress: Progress | None = None
    last_metrics: dict[str, float] = Field(default_factory=dict)
    wandb: WandbLink | None = None
    outputs: int = 0
    output_bytes: int = 0
    pack: PackReport | None = None
    git: GitFacts | None = None
    environment: EnvironmentFacts | None = None
    log_tail: tuple[str, ...] = ()
    """The last lines of an attempt that did not succeed."""
    cursor: int = 0
    """Sequence number of the job's last event: pass it to ``events`` to see only what comes after."""

    @property
    def attempt(self) -> AttemptView | None:
        """The latest attempt, or None before the first."""
        return self.attempts[-1] if self.attempts else None


class JobPage(View):
    """One page of jobs, newest first."""

    jobs: tuple[JobView, ...]
    next_cursor: str = ""
    """Pass it to get the next page; empty on the last."""
    total: int


class Event(View):
    """Something that happened; `seq` grows by one and never repeats within a cluster."""

    seq: int
    at: float
    job: str = ""
    kind: str
    message: str = ""
    state: JobState | None = None


class EventPage(View):
    """Events after a cursor, oldest first."""

    events: tuple[Event, ...]
    cursor: int


class SubmitRequest(View):
    """What a client sends to submit a job. `secrets` are values for this job alone, and are never stored in records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: JobSpec
    package: str = ""
    """sha256 of the packed working directory, already uploaded; empty when there is none."""
    request_id: str = ""
    pack: PackReport | None = None
    git: GitFacts | None = None
    secrets: dict[str, str] = Field(default_factory=dict, repr=False)


class SubmitAnswer(View):
    """The job; `created` is False when the idempotency key had already made it."""

    job: JobView
    created: bool


class MetricPoint(View):
    """One value of one metric."""

    step: float
    value: float
    at: float


class MetricSeries(View):
    """The points of one metric, oldest first; thinned evenly to the number asked for, the last always kept."""

    key: str
    points: tuple[MetricPoint, ...]
    total: int
    """How many points the run has logged."""


class MetricsPage(View):
    """Metrics of a job, over all its attempts."""

    keys: tuple[str, ...]
    last: dict[str, float]
    last_step: float | None = None
    series: tuple[MetricSeries, ...] = ()


class LogMatch(View):
    """One line that matched a search."""

    offset: int
    text: str


class LogMatches(View):
    """Matches of a search in one log; search again from `next_offset` when `more`."""

    matches: tuple[LogMatch, ...]
    next_offset: int
    more: bool


class Artifact(View):
    """One file that a job left behind."""

    path: str
    bytes: int
    sha256: str = ""
    """Empty while the file may still grow."""
    kind: Literal["output", "checkpoint", "log", "wandb", "record"]
    attempt: int = 0


class GpuView(View):
    """One GPU of a node. Memory is None where ``nvidia-smi`` says ``[N/A]`` (unified memory)."""

    index: str
    uuid: str = ""
    name: str = ""
    memory_total: int | None = None
    memory_used: int | None = None
    utilization: float | None = None
    """Percent."""
    processes: tuple[str, ...] = ()
    """Who uses it outside raylaunch: ``user:pid:command``."""


class NodeView(View):
    """One machine of the Ray cluster."""

    id: str
    hostname: str
    address: str
    alive: bool
    arch: str = ""
    cpus: float = 0
    gpus: float = 0
    memory: int = 0
    custom: dict[str, float] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    cpus_free: float = 0
    gpus_free: float = 0
    memory_free: int = 0
    gpu_type: str = ""
    gpu: tuple[GpuView, ...] = ()
    disk_free: int | None = None
    steward: bool = False
    """Whether its steward answers."""


class ProcessView(View):
    """One process of the cluster, identified by pid and start time so that a reused pid is not mistaken for it."""

    pid: int
    started_at: float
    alive: bool
    port: int | None = None
    url: str = ""
    version: str = ""
    log: str = ""


class ClusterStatus(View):
    """The cluster as a whole."""

    name: str
    kind: Literal["local"]
    state: Literal["running", "degraded", "stopped"]
    problems: tuple[str, ...] = ()
    controller: ProcessView | None = None
    ray: ProcessView | None = None
    ray_ports: dict[str, int] = Field(default_factory=dict)
    nodes: tuple[NodeView, ...] = ()
    queued: int = 0
    running: int = 0
    store: str = ""
    store_free: int | None = None
    gpus_logical: bool = False
    owner: str = ""


class ControllerStatus(View):
    """What the controller says of itself, Ray and the nodes (``GET /v1/status``)."""

    cluster: str
    version: str
    api: int
    pid: int
    person: str
    role: str
    started_at: float
    ray: Literal["up", "down"]
    ray_version: str = ""
    nodes: tuple[NodeView, ...] = ()
    queued: int = 0
    running: int = 0
    store: str = ""
    store_free: int | None = None
    problems: tuple[str, ...] = ()


class RayAccess(View):
    """What Ray's own tools need to reach the cluster (``GET /v1/ray``; role operator or admin)."""

    gcs_address: str
    dashboard_url: str
    token: str = Field(repr=False)


class Usage(View):
    """Bytes that one job takes in the store."""

    job: str
    name: str
    state: JobState
    bytes: int
    outputs: int
    checkpoints: int
    logs: int
    wandb: int


class UsagePage(View):
    """What the store holds, largest first."""

    jobs: tuple[Usage, ...]
    packages: int
    total: int
    free: int
