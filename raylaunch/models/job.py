"""Views of jobs: attempts, events, logs, metrics, files, usage; and the body of a submission.

Every model here is the wire format: the same object is the HTTP answer, the CLI's ``--json``, MCP's structured content
and the notebook's repr. Times are seconds since the epoch (UTC), sizes bytes, durations seconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from raylaunch.models.fields import Count, Environment, ExitCode, Moment, StepNumber, Whole
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.safe_text import one_line
from raylaunch.models.states import JobState, Reason


class View(BaseModel):
    """Base of observed values: immutable, and tolerant of fields that a newer controller adds."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class WandbLink(View):
    """The W&B side of a job, online or offline: its run, and others that its program opened."""

    mode: Literal["online", "offline", "disabled"]
    run_id: str
    """The job's run: the first that its program opened. Known in advance, unless the program sets an id itself."""
    project: str
    entity: str = ""
    url: str = ""
    why: str = ""
    """Why this mode, in words (``no W&B credentials``, ``W&B did not answer within 10 s``)."""
    runs: tuple[str, ...] = ()
    """Ids of the runs of all attempts, in the order of their start; at most 100 per attempt."""
    staged_bytes: Count = 0
    """Size of the files of artifacts and tables of offline runs: kept with the job, and not at W&B yet."""


class AttemptView(View):
    """One run of a job: one Ray submission with the id ``<job>-<n>``, where `n` counts from 1.

    It left the queue at `admitted_at`; its program ran from `started_at`, with the process id `pid` on the node.
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
    """How many ranks its launcher starts, each with its own log; 0 if that is not known in advance."""
    failed_rank: Count | None = None
    """The rank that failed first; exit code, signal and last lines are those of this rank."""
    reason: Reason | None = None
    message: str = ""
    replicated: bool = False
    """Whether all of its files are in the store."""


class Progress(View):
    """The progress that a program reported: `step` of `total` in its own unit, reported `at`."""

    step: StepNumber
    total: StepNumber | None = None
    at: Moment

    def __str__(self) -> str:
        return f"step {self.step:g}" + (f" of {self.total:g}" if self.total else "")


class FileFact(View):
    """One packed or left-out file: path relative to the working directory, size in bytes."""

    path: str
    bytes: Count


class LinkFact(View):
    """A symbolic link that leads out of the working directory: its path there, and its target."""

    path: str
    target: str


class PackReport(View):
    """What the client packed, shown to the person and kept with the job. `ignored` counts files and whole folders."""

    files: Count = 0
    bytes: Count = 0
    ignored: Count = 0
    ignored_bytes: Count = 0
    ignored_by: tuple[str, ...] = ()
    """The rules that matched something, as written (``.gitignore: *.pt``, ``built in: .venv/``)."""
    largest: tuple[FileFact, ...] = ()
    links: tuple[LinkFact, ...] = ()
    """Links that lead out of the working directory; the first 100."""
    links_out: Count = 0
    """How many such links there are in all."""


class GitFacts(View):
    """The git state of the working directory at submit; `diff` is the dirty diff, cut at 1 MiB."""

    commit: str = ""
    branch: str = ""
    dirty: bool = False
    diff: str = ""
    diff_truncated: bool = False


class EnvironmentFacts(View):
    """What the node found in the job's environment before the program started."""

    python: str = ""
    """Path of the interpreter."""
    version: str = ""
    wandb: str = ""
    torch: str = ""
    packages: tuple[str, ...] = ()
    """``name==version``, sorted."""
    warnings: tuple[str, ...] = ()


class EnvironmentChoice(View):
    """Which Python environment a job got when it was submitted, and why. The client chooses it."""

    environment: Environment
    source: Literal["job", "cluster", "lock", "active", "own"]
    """Named by the job; by cluster.yaml; by `uv.lock` in the working directory; active where it was submitted; or the
    interpreter that runs Ray."""
    python: str = ""
    """Version of its interpreter, if it is known before the job runs."""
    where: str = ""
    """Its folder or name, if `environment` does not have it."""
    packages: tuple[str, ...] = ()
    """Packages that the job adds to it."""
    note: str = ""
    """What was not used, and how to use it instead."""
    here: bool = False
    """Whether the cluster is on the machine that submitted the job, so that paths mean the same there."""

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
    """One job, as people with the role to see it see it.

    It is `unreachable` while its node does not respond; `state` is then the last known one. `outputs` counts files,
    `entrypoint` is the command as one line, `owner` the person who submitted the job.
    """

    id: str
    name: str
    owner: str
    state: JobState
    reason: Reason | None = None
    message: str = ""
    """The reason as a sentence for people, with the numbers of this job."""
    spec: JobSpec | None = None
    """None for a foreign job, which was submitted with plain ``ray job submit``."""
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
    """The last lines of the latest attempt, if it is running or did not succeed."""
    cursor: Count = 0
    """Sequence number of the job's last event: pass it to ``events`` to see only what comes after."""

    @property
    def attempt(self) -> AttemptView | None:
        """The latest attempt, or None before the first."""
        return self.attempts[-1] if self.attempts else None

    @property
    def state_text(self) -> str:
        """The state for people: ``running``, or ``running (unreachable)``."""
        return self.state.value + (" (unreachable)" if self.unreachable else "")

    @property
    def why(self) -> str:
        """Why the job is in its state, as a sentence; empty if there is nothing to say."""
        return self.message or (self.reason.sentence if self.reason else "")

    def ran_s(self, now: float) -> float | None:
        """Return for how long its program ran, summed over all attempts; None before the first.

        Args:
            now: seconds since the epoch, for an attempt that has not ended.
        """
        end = now if self.ended_at is None else self.ended_at
        spans = [max(0.0, (one.ended_at or end) - one.started_at) for one in self.attempts if one.started_at]
        if not self.attempts and self.started_at is not None:
            return max(0.0, end - self.started_at)
        return sum(spans) if spans else None


def format_metrics(last: dict[str, float], *, limit: int) -> str:
    """Return the first `limit` values in one line, for example ``loss 0.21, accuracy 0.98, … 3 more``."""
    shown = [f"{one_line(key)} {value:.5g}" for key, value in list(last.items())[:limit]]
    more = [f"… {len(last) - limit} more"] if len(last) > limit else []
    return ", ".join([*shown, *more])


class JobPage(View):
    """One page of jobs, newest first."""

    jobs: tuple[JobView, ...]
    next_cursor: str = ""
    """Pass it to get the next page; empty on the last."""
    total: Count
    unreadable: tuple[str, ...] = ()
    """Ids of jobs on this page whose records cannot be read; they are left out."""


class Event(View):
    """Something that happened; `seq` grows by one and never repeats within a cluster.

    `kind` is a word for programs, `message` a sentence, `state` the job's state afterwards.
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


class BuildPlatform(View):
    """The facts of a node that determine which wheels fit it."""

    arch: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,20}$")]
    """As ``uname -m`` prints it."""
    glibc: Annotated[str, Field(pattern=r"^([0-9]{1,3}\.[0-9]{1,3})?$")]
    """Its version, for example ``2.35``; empty for another C library."""
    python: Annotated[str, Field(pattern=r"^[0-9]\.[0-9]{1,3}(\.[0-9]{1,3})?[a-z0-9+]{0,8}$")]
    """The full version of the Python that environments are created with there."""

    @property
    def minor(self) -> str:
        """Python's version without the patch number."""
        return ".".join(self.python.split(".")[:2])

    def __str__(self) -> str:
        return f"Python {self.minor} on {self.arch}"


class WheelFile(View):
    """One wheel; its content is stored as a package of the cluster under its sha256."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+!-]+\.whl$", max_length=255)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    build: bool = False
    """Whether it only builds a project of the working directory, and is not installed."""
    added: bool = False
    """Whether it is for packages that a job adds to the cluster's own environment, whose wheels the cluster has."""


class WheelSet(View):
    """All wheels of an environment, for one platform."""

    platform: BuildPlatform
    wheels: tuple[WheelFile, ...]


class SubmitRequest(View):
    """What a client sends to submit a job. `secrets` are values for this job alone, and are never stored in records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: JobSpec
    package: str = ""
    """sha256 of the packed working directory, already uploaded; empty if there is none."""
    request_id: str = ""
    pack: PackReport | None = None
    git: GitFacts | None = None
    chosen: EnvironmentChoice | None = None
    """Why it has this environment, for the record; `spec` has the environment itself."""
    secrets: dict[str, str] = Field(default_factory=dict, repr=False)
    wheels: tuple[WheelSet, ...] = ()
    """Wheels for its environment on nodes that reach no package index; uploaded as packages."""
    wheels_sought: bool = False
    """Whether the client gathered wheels; `wheels` are then all that could be found."""


class SubmitAnswer(View):
    """The job; `created` is False if the request id was used for it before."""

    job: JobView
    created: bool


class DryRun(View):
    """What a submission would do: the hostnames that the job could run on, and a sentence."""

    fits: tuple[str, ...]
    message: str
    wheels_for: tuple[BuildPlatform, ...] = ()
    """Platforms of nodes that could run it and reach no package index: they need the wheels of its environment."""
    wheels_there: tuple[BuildPlatform, ...] = ()
    """Platforms for which the cluster has the wheels of its own environment, if the job uses that."""
    environment: Environment = Environment()
    """Its environment: its own, or the cluster's."""
    chosen: EnvironmentChoice | None = None
    """Which environment that is, and why."""
    pack: PackReport | None = None
    """What would be sent; None for a job without code."""
    package_bytes: Count = 0
    """Size of the package."""


class MetricPoint(View):
    """One value of one metric, with the run's step and the time when it was logged."""

    step: StepNumber
    value: float
    at: Moment


class MetricSeries(View):
    """The points of one metric, oldest first; thinned evenly to the requested number, the last always kept."""

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
    """Metrics of a job, over all its attempts: all `keys`, the `last` value of each, and the requested curves.

    The keys of the job's own run are as the program logged them; those of further `runs` have the run's prefix.
    """

    keys: tuple[str, ...]
    last: dict[str, float]
    last_step: StepNumber | None = None
    series: tuple[MetricSeries, ...] = ()
    runs: tuple[MetricsRun, ...] = ()
    """The job's run first; empty from a controller before 0.2."""


class LogMatch(View):
    """One line that matched a search; `offset` is where it starts, in bytes."""

    offset: Count
    text: str
    line: Count = 0
    """Its number in the log, from 1; 0 if it is not known because the search started in the middle."""


class LogMatches(View):
    """Matches of a search in one log; search again from `next_offset` (bytes) if there is `more`."""

    matches: tuple[LogMatch, ...]
    next_offset: Count
    more: bool
    next_line: Count = 0
    """The number of the line at `next_offset`; 0 if it is not known."""


class Artifact(View):
    """One file of a job. `attempt` is the one that wrote it; 0 for files of the job as a whole."""

    path: str
    bytes: Whole
    sha256: str = ""
    """Empty while the file may still grow."""
    kind: Literal["output", "checkpoint", "log", "wandb", "record"]
    attempt: Count = 0
    link: str = ""
    """The relative target of a link to a folder, which has no bytes. A link to a file counts as the file."""
    left: bool = False
    """Whether it is an output that was not kept and is still on its node; `get` fetches it by name."""
    withheld: bool = False
    """Whether it looks like a secret and was not kept; `get` fetches it for the job's owner, by its whole name."""


class Usage(View):
    """Bytes that one job uses in the store."""

    job: str
    name: str
    state: JobState
    bytes: Count
    outputs: Count
    checkpoints: Count
    logs: Count
    wandb: Count


class NodeUsage(View):
    """Bytes that raylaunch uses on the disk of a node, apart from the store."""

    host: str
    environments: Count
    """Environments shared by jobs; each is created once per content."""
    packages: Count
    """Code and wheels that were sent there."""
    attempts: Count
    """Folders of running attempts, checkpoints, and outputs that were left there."""


class UsagePage(View):
    """What the store holds, largest first, and what nodes hold in addition."""

    jobs: tuple[Usage, ...]
    nodes: tuple[NodeUsage, ...] = ()
    """The nodes that responded."""
    packages: Count
    total: Count
    free: Count
