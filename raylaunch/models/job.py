"""What is observed: jobs, attempts, events, metrics, artifacts, the cluster.

Every model here is the wire format: the same object is the HTTP answer, the CLI's ``--json``, MCP's structured content
and the notebook's repr. Times are seconds since the epoch (UTC), sizes bytes, durations seconds. Where a job stands
(`raylaunch.models.states`) is had from here as well.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from raylaunch.models.fields import Count, Environment, ExitCode, Moment, StepNumber, Whole
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import ENDED as ENDED  # noqa: PLC0414 -- exported again
from raylaunch.models.states import Change as Change  # noqa: PLC0414 -- exported again
from raylaunch.models.states import IllegalTransition as IllegalTransition  # noqa: PLC0414 -- exported again
from raylaunch.models.states import JobState as JobState  # noqa: PLC0414 -- exported again
from raylaunch.models.states import Reason
from raylaunch.models.states import transition as transition  # noqa: PLC0414 -- exported again


class View(BaseModel):
    """Base of everything that is observed: immutable, and tolerant of fields that a newer controller adds."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class WandbLink(View):
    """The W&B side of a job, on-line or off: its run, and those that its program opened in addition."""

    mode: Literal["online", "offline", "disabled"]
    run_id: str
    """The job's run: the first that its program opened. Known in advance, unless the program gives an id itself."""
    project: str
    entity: str = ""
    url: str = ""
    why: str = ""
    """Why this mode, in words (``no W&B credentials``, ``W&B did not answer within 10 s``)."""
    runs: tuple[str, ...] = ()
    """Ids of all runs that were opened, over all attempts, in the order of their start; 100 of an attempt at most."""
    staged_bytes: Count = 0
    """Size of the files of artifacts and tables of off-line runs: kept with the job, and not at W&B yet."""


class AttemptView(View):
    """One run of a job: one Ray submission with the id ``<job>-<n>``, where `n` counts from 1.

    It was `admitted_at` when its turn came; its program ran from `started_at`. `pid` is its program's, on the node.
    """

    id: str
    n: Count
    node: str = ""
    """Hostname of the node it was placed on."""
    node_id: str = ""
    admitted_at: Moment
    started_at: Moment | None = None
    ended_at: Moment | None = None
    exit_code: ExitCode | None = None
    signal: str = ""
    """Name of the signal that ended it (``SIGKILL``), or empty."""
    gpus: tuple[str, ...] = ()
    """Ids that the attempt saw in ``CUDA_VISIBLE_DEVICES``."""
    pid: Count | None = None
    ranks: Count = 1
    """How many ranks its launcher starts, each with a log of its own; 0 where that cannot be known before."""
    failed_rank: Count | None = None
    """The rank that failed first: exit code, signal and last lines are its own."""
    reason: Reason | None = None
    message: str = ""
    replicated: bool = False
    """Whether all that it left behind is in the store."""


class Progress(View):
    """How far the training says it is: `step` of `total`, in whatever it counts; said `at`."""

    step: StepNumber
    total: StepNumber | None = None
    at: Moment


class FileFact(View):
    """One packed or left-out file: path relative to the working directory, size in bytes."""

    path: str
    bytes: Count


class LinkFact(View):
    """A symbolic link that leads out of the working directory: its path there, and what it leads to."""

    path: str
    target: str


class PackReport(View):
    """What the client packed: said to the person, and kept with the job. `ignored` counts files and whole folders."""

    files: Count = 0
    bytes: Count = 0
    ignored: Count = 0
    ignored_bytes: Count = 0
    ignored_by: tuple[str, ...] = ()
    """The rules that left something out, as written (``.gitignore: *.pt``, ``built in: .venv/``)."""
    largest: tuple[FileFact, ...] = ()
    links: tuple[LinkFact, ...] = ()
    """Links that lead out of the working directory; the first 100."""
    links_out: Count = 0
    """How many there are."""


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


class EnvironmentChoice(View):
    """Which Python environment a job got when it was submitted, and why. The client makes it."""

    environment: Environment
    source: Literal["job", "cluster", "lock", "active", "own"]
    """Named by the job; by cluster.yaml; by `uv.lock` in the working directory; active where it was submitted; or the
    interpreter that runs Ray."""
    python: str = ""
    """Version of its interpreter, as far as it is known before the job runs."""
    where: str = ""
    """Its folder or name, where `environment` does not have it."""
    packages: tuple[str, ...] = ()
    """What the job adds to it."""
    note: str = ""
    """What was passed over, and how to use that instead."""
    here: bool = False
    """Whether the cluster is on the machine that submitted, so that paths mean the same there."""

    def __str__(self) -> str:
        python = f"Python {'.'.join(self.python.split('.')[:2])}" if self.python else "Python"
        named = str(self.environment)
        match self.source:
            case "job":
                words = f"{python} from the job's environment ({self.where or named})"
            case "cluster":
                words = f"{python} from cluster.yaml ({self.where or named})"
            case "lock":
                words = f"{python} from uv.lock"
            case "active":
                words = f"{python} from the active environment ({named})"
            case "own":
                words = f"{python} that runs Ray" + (f" ({self.where})" if self.where else "")
        added = f", with {', '.join(self.packages)}" if self.packages else ""
        return f"{words}{added}" + (f"; {self.note}" if self.note else "")


class JobView(View):
    """One job as anybody with the role to see it sees it.

    It is `unreachable` while its node does not answer, and `state` is then as it was last seen. `outputs` counts files,
    `entrypoint` is its command as one line, `owner` the person who submitted it.
    """

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
    created_at: Moment
    started_at: Moment | None = None
    ended_at: Moment | None = None
    updated_at: Moment
    attempts: tuple[AttemptView, ...] = ()
    unreachable: bool = False
    progress: Progress | None = None
    last_metrics: dict[str, float] = Field(default_factory=dict)
    wandb: WandbLink | None = None
    outputs: Count = 0
    output_bytes: Count = 0
    pack: PackReport | None = None
    git: GitFacts | None = None
    chosen: EnvironmentChoice | None = None
    environment: EnvironmentFacts | None = None
    log_tail: tuple[str, ...] = ()
    """The last lines of the latest attempt: of one that runs, and of one that did not succeed."""
    cursor: Count = 0
    """Sequence number of the job's last event: pass it to ``events`` to see only what comes after."""

    @property
    def attempt(self) -> AttemptView | None:
        """The latest attempt, or None before the first."""
        return self.attempts[-1] if self.attempts else None

    def ran_s(self, now: float) -> float | None:
        """Return how long its program has run in all attempts, without the time between them; None before the first.

        Args:
            now: seconds since the epoch, for an attempt that has not ended.
        """
        end = now if self.ended_at is None else self.ended_at
        spans = [max(0.0, (one.ended_at or end) - one.started_at) for one in self.attempts if one.started_at]
        if not self.attempts and self.started_at is not None:
            return max(0.0, end - self.started_at)
        return sum(spans) if spans else None


class JobPage(View):
    """One page of jobs, newest first."""

    jobs: tuple[JobView, ...]
    next_cursor: str = ""
    """Pass it to get the next page; empty on the last."""
    total: Count
    unreadable: tuple[str, ...] = ()
    """Ids of jobs that belong here and whose records cannot be read; they are left out."""


class Event(View):
    """Something that happened; `seq` grows by one and never repeats within a cluster.

    `kind` is a word for programs, `message` a sentence, `state` the job's when it had happened.
    """

    seq: Count
    at: Moment
    job: str = ""
    kind: str
    message: str = ""
    state: JobState | None = None


class EventPage(View):
    """Events after a cursor, oldest first."""

    events: tuple[Event, ...]
    cursor: Count


class SubmitRequest(View):
    """What a client sends to submit a job. `secrets` are values for this job alone, and are never stored in records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: JobSpec
    package: str = ""
    """sha256 of the packed working directory, already uploaded; empty when there is none."""
    request_id: str = ""
    pack: PackReport | None = None
    git: GitFacts | None = None
    chosen: EnvironmentChoice | None = None
    """Which environment it is, and why, for the record: `spec` has the environment itself."""
    secrets: dict[str, str] = Field(default_factory=dict, repr=False)
    wheels: tuple[WheelSet, ...] = ()
    """What its environment is made of on nodes that reach no package index; uploaded as packages."""
    wheels_sought: bool = False
    """Whether they were looked for, and all that could be had goes along."""


class SubmitAnswer(View):
    """The job; `created` is False when the idempotency key had already made it."""

    job: JobView
    created: bool


class DryRun(View):
    """What a submission would do: the hostnames that it could run on, and a sentence."""

    fits: tuple[str, ...]
    message: str
    wheels_for: tuple[BuildPlatform, ...] = ()
    """Platforms of nodes that could run it and reach no package index: wheels of its environment go along."""
    wheels_there: tuple[BuildPlatform, ...] = ()
    """Platforms for which the cluster has the wheels of its own environment, where the job uses that."""
    environment: Environment = Environment()
    """Its environment: its own, or the cluster's."""
    chosen: EnvironmentChoice | None = None
    """Which environment that is, and why."""
    pack: PackReport | None = None
    """What would be sent; None for a job without code."""
    package_bytes: Count = 0
    """Size of the package."""


class MetricPoint(View):
    """One value of one metric: at which of the run's steps, and when it was logged."""

    step: StepNumber
    value: float
    at: Moment


class MetricSeries(View):
    """The points of one metric, oldest first; thinned evenly to the number asked for, the last always kept."""

    key: str
    points: tuple[MetricPoint, ...]
    total: Count
    """How many points the run has logged."""


class MetricsRun(View):
    """One W&B run of a job. Its keys start with `prefix`: ``<id>/``, or empty for the job's run."""

    id: str
    name: str
    project: str
    prefix: str


class MetricsPage(View):
    """Metrics of a job, over all its attempts: all `keys`, the `last` value of each, and the curves asked for.

    The keys of the job's own run are as the program logged them; those of further `runs` have the run's prefix.
    """

    keys: tuple[str, ...]
    last: dict[str, float]
    last_step: StepNumber | None = None
    series: tuple[MetricSeries, ...] = ()
    runs: tuple[MetricsRun, ...] = ()
    """The job's run first; empty from a controller before 0.2."""


class LogMatch(View):
    """One line that matched a search; `offset` is where it begins, in bytes."""

    offset: Count
    text: str
    line: Count = 0
    """Its number in the log, from 1; 0 where the search began in the middle and that is not known."""


class LogMatches(View):
    """Matches of a search in one log; search again from `next_offset` (bytes) when there is `more`."""

    matches: tuple[LogMatch, ...]
    next_offset: Count
    more: bool
    next_line: Count = 0
    """The number of the line at `next_offset`; 0 where it is not known."""


class Artifact(View):
    """One file that a job left behind. `attempt` is the one that wrote it; 0 for what belongs to the job."""

    path: str
    bytes: Whole
    sha256: str = ""
    """Empty while the file may still grow."""
    kind: Literal["output", "checkpoint", "log", "wandb", "record"]
    attempt: Count = 0
    link: str = ""
    """Of a link to a folder: where it leads, relative; it has no bytes. A link to a file counts as the file."""
    left: bool = False
    """Whether it is an output that was not kept and is still on its node; `get` brings it when it is named."""
    withheld: bool = False
    """Whether it looks like a secret, and was not kept: `get` brings it for the job's owner, by its whole name."""


class Usage(View):
    """Bytes that one job takes in the store."""

    job: str
    name: str
    state: JobState
    bytes: Count
    outputs: Count
    checkpoints: Count
    logs: Count
    wandb: Count


class NodeUsage(View):
    """Bytes that raylaunch takes on the disk of a node, apart from the store."""

    host: str
    environments: Count
    """Environments that jobs have shared: made once for each content, and used again."""
    packages: Count
    """Code and wheels that were sent there."""
    attempts: Count
    """Working folders of attempts that run, checkpoints, and outputs that were left there."""


class UsagePage(View):
    """What the store holds, largest first, and what nodes hold apart from it."""

    jobs: tuple[Usage, ...]
    nodes: tuple[NodeUsage, ...] = ()
    """Those that answered."""
    packages: Count
    total: Count
    free: Count


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class BuildPlatform(_View):
    """What decides which wheels fit a node."""

    arch: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,20}$")]
    """As ``uname -m`` says."""
    glibc: Annotated[str, Field(pattern=r"^([0-9]{1,3}\.[0-9]{1,3})?$")]
    """Its version, as ``2.35``; empty for another C library."""
    python: Annotated[str, Field(pattern=r"^[0-9]\.[0-9]{1,3}(\.[0-9]{1,3})?[a-z0-9+]{0,8}$")]
    """The full version of the Python that environments are made from there."""

    @property
    def minor(self) -> str:
        """Python's version without the last number."""
        return ".".join(self.python.split(".")[:2])

    def __str__(self) -> str:
        return f"Python {self.minor} on {self.arch}"


class WheelFile(_View):
    """One wheel; its bytes are a package of the cluster, by their sha256."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+!-]+\.whl$", max_length=255)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    build: bool = False
    """Whether a project of the working directory is built with it, and nothing of it is installed."""
    added: bool = False
    """Whether it is for packages that a job adds to the cluster's own environment, whose wheels the cluster has."""


class WheelSet(_View):
    """All wheels of an environment, for one platform."""

    platform: BuildPlatform
    wheels: tuple[WheelFile, ...]
