"""Names of files, variables and exit facts on which runner, node agent and controller rely. Standard library only.

One attempt has one folder on its node, ``<node root>/attempts/<attempt id>/``::

    attempt.json      what to run; written by the node agent, read by the runner (`ATTEMPT`)
    secrets.json      0600; read and deleted by the runner before training starts (`SECRETS`)
    runner.pyz        the runner itself (`RUNNER`)
    code/             the working directory, this attempt's own copy (`CODE`)
    claim.json        made with O_EXCL by the one runner that may run it (`CLAIM`)
    facts.json        what the runner found: environment, GPUs, W&B mode; replaced as a whole (`FACTS`)
    started.json      training has started: pid, time (`STARTED`)
    heartbeat         touched every second while the runner lives (`HEARTBEAT`)
    stop.json         a stop request, written by the node agent (`STOP`)
    exit.json         how it ended; written last, and renamed into place (`EXIT`)
    logs/rank-0.log   stdout and stderr of the training, byte for byte (`LOGS`); of rank 0 and its launcher
    logs/rank-N.log   the same of rank N, where a launcher starts several
    wandb/            WANDB_DIR; a run's file is wandb/wandb/*run-*/run-*.wandb (`WANDB`), wherever W&B writes it
    wandb/data/       files of artifacts that are not sent yet (`WANDB_DATA`)
    outputs           $RAYLAUNCH_OUTPUT_DIR; a link to the job's folder; kept (`OUTPUTS`)
    checkpoints       $RAYLAUNCH_CHECKPOINT_DIR; the same; kept (`CHECKPOINTS`)
    wheels/           what the environment is made of, where the node reaches no package index (`WHEELS`)
    build-wheels/     what the projects of the working directory are built with there (`BUILD_WHEELS`)
    added-wheels/     what a job adds to the cluster's own environment there (`ADDED_WHEELS`)
    tmp/              W&B cache and staging, and scratch; not kept (`TMP`)

A job has one folder on a node, ``<node root>/jobs/<job id>/``, at the same path for each of its attempts, with
``checkpoints/``, ``outputs/``, ``writer.json`` (`WRITER`), which names the attempt that may write,
``collected.json`` (`COLLECTED`) with the outputs that were found in the working directory, which each attempt has a
copy of, and ``left/`` (`LEFT`) with those that are not kept, for some days.

Only logs, the .wandb file, outputs, checkpoints and the JSON files above travel to the store, under the same names
below ``jobs/<job>/attempt-<n>/``.
"""

from __future__ import annotations

from typing import Literal, TypedDict

ATTEMPT = "attempt.json"
SECRETS = "secrets.json"
RUNNER = "runner.pyz"
CODE = "code"
CLAIM = "claim.json"
FACTS = "facts.json"
STARTED = "started.json"
HEARTBEAT = "heartbeat"
STOP = "stop.json"
EXIT = "exit.json"
LOGS = "logs"
WANDB = "wandb"
OUTPUTS = "outputs"
CHECKPOINTS = "checkpoints"
TMP = "tmp"
WHEELS = "wheels"
WRITER = "writer.json"
BUILD_WHEELS = "build-wheels"
ADDED_WHEELS = "added-wheels"
COLLECTED = "collected.json"
LEFT = "left"
LEFT_S = 7 * 24 * 3600
"""How long a job's folder stays on a node that its job has left."""
WITHHELD = "withheld"
"""In the store, next to an attempt's `OUTPUTS`: what looks like a secret, once the job's owner has fetched it."""
APART = "working-dir"
"""Among `OUTPUTS`: files of the working directory whose names the program has given to other ones there."""

AUTO = "auto"
NONE = "none"
"""In place of globs of outputs: all new and changed files of the working directory, or none."""

RANK_LOG = "logs/rank-{rank}.log"

VAR_ATTEMPT = "RAYLAUNCH_ATTEMPT_ID"
"""In the environment of every process of an attempt: ``<cluster id>/<job>-<n>``. A process belongs to an attempt if,
and only if, its environment has its id; that holds for children that called setsid too."""
VAR_JOB = "RAYLAUNCH_JOB_ID"
VAR_JOB_NAME = "RAYLAUNCH_JOB_NAME"
VAR_ATTEMPT_N = "RAYLAUNCH_ATTEMPT"
VAR_OUTPUT_DIR = "RAYLAUNCH_OUTPUT_DIR"
VAR_CHECKPOINT_DIR = "RAYLAUNCH_CHECKPOINT_DIR"
VAR_CLUSTER = "RAYLAUNCH_CLUSTER"
VAR_PROGRESS = "RAYLAUNCH_PROGRESS_FILE"
"""File to which `raylaunch.report` appends JSON lines: ``{"at", "step", "total", "metrics"}``."""
VAR_WANDB_RUN = "RAYLAUNCH_WANDB_RUN_ID"
"""Id of the first W&B run that is opened: the job's. WANDB_RUN_ID would make all runs of all processes one run."""
VAR_WANDB_RUNS = "RAYLAUNCH_WANDB_RUNS"
"""Folder (`WANDB_RUNS`) through which `raylaunch.tracking.wandb_runs` hands out ids."""
VAR_TRAIN_REPORTS = "RAYLAUNCH_TRAIN_REPORTS"
"""File to which `raylaunch.tracking.train_callback` appends what Ray Train's workers report (`TRAIN_REPORTS`)."""
VAR_NODE_ROOT = "RAYLAUNCH_NODE_ROOT"
"""In the environment of Ray on a node: the folder where its node agent keeps packages and attempts."""
VAR_PATH = "RAYLAUNCH_PATH"
"""As `VAR_NODE_ROOT`: PATH without the folder of Ray's Python, with which Ray's own starts, for ``ray job submit``."""

PROGRESS = "progress.jsonl"
TRAIN_REPORTS = "tmp/train-reports.jsonl"
WANDB_RUNS = "tmp/wandb-runs"
WANDB_DATA = "wandb/data"
"""WANDB_DATA_DIR: where W&B stages the files of artifacts and tables until they are sent."""
MANY_RUNS = 100
PRIVATE_RAY = "its ray.init() started a Ray of its own on the node; to use the cluster's, submit it with --launcher ray"
"""What is reported of a program that is not under ``launcher: ray``."""
STARTUP = "startup"
"""Folder in the runner's archive with a ``sitecustomize``, for PYTHONPATH."""

INTERRUPTED = 130
"""Exit status of an interrupted program, as in shells."""

FENCED = "fenced"
"""Epoch of a claim that the node agent makes so that no runner can start any more."""

RAY_SECRETS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")

RAY_LOG_LIMIT = 64 * 1024 * 1024
"""Bytes of output that are also copied to Ray's own driver log; the whole is in the attempt's log."""

Ended = Literal[
    "completed", "exit_code", "signal", "stopped", "timed_out", "environment", "entrypoint_not_found", "runner_error"
]


class EnvironmentSpec(TypedDict):
    """`raylaunch.models.job_spec.Environment`, as plain data."""

    kind: str
    value: str
    requirements: list[str]
    packages: list[str]
    """Packages to add to it, for every kind."""


class WheelSpec(TypedDict):
    """A wheel that came with the job: `raylaunch.models.job.WheelFile`, as plain data."""

    file: str
    sha256: str
    build: bool
    """Whether a project is built with it, and nothing of it is installed."""
    added: bool
    """Whether it is for packages that are added to an environment, and is not in that."""


class EarlierRun(TypedDict):
    """A W&B run of an earlier attempt. `finished`: with status 0, so that it is not opened again."""

    attempt: int
    id: str
    project: str
    name: str
    finished: bool


class WandbSpec(TypedDict):
    """How the attempt tracks. The runner finds the mode when it is ``auto``."""

    mode: str
    run_id: str
    project: str
    entity: str
    group: str
    job_type: str
    name: str
    tags: list[str]
    notes: str
    earlier: list[EarlierRun]
    """In the order of their start."""


class AttemptSpec(TypedDict):
    """``attempt.json``: all that a runner needs to know."""

    attempt: str
    tag: str
    """Value of `VAR_ATTEMPT`."""
    job: str
    name: str
    n: int
    cluster: str
    epoch: str
    """Random; a runner claims (attempt, epoch), and a stale one finds another epoch and exits."""
    entrypoint: str | list[str]
    launcher: Literal["script", "torchrun", "ray"]
    processes: int | None
    """Ranks on the node, under torchrun; None is one a GPU, else 1."""
    cpus: float | None
    """CPU cores that the job requests, if any."""
    env: dict[str, str]
    secrets: list[str]
    environment: EnvironmentSpec
    envs_dir: str
    """Folder on the node for environments built once per content."""
    wheels: list[WheelSpec]
    """What is in `WHEELS`; without any the environment is made from the package index."""
    links: list[str]
    """Symbolic links in `CODE` that lead out of it, which may be broken on this node."""
    gpus: int
    arch: str
    timeout_s: float | None
    grace_s: float
    outputs: list[str]
    """Globs, `AUTO` or `NONE`."""
    outputs_size: int
    outputs_files: int
    wandb: WandbSpec
    job_dir: str
    """The job's folder on the node, which has its checkpoints and outputs; written by the node agent."""
    moved_from: str
    """The job's folder in the attempt before, where that was at another path; else empty."""


class Claim(TypedDict):
    """``claim.json``."""

    epoch: str
    pid: int
    started_ticks: int
    """Field 22 of /proc/PID/stat: with the pid it identifies one process until a reboot."""
    boot_id: str
    """Which machine it is, as `raylaunch.runner.processes.boot_id` returns it."""
    at: float


class Started(TypedDict):
    """``started.json``."""

    pid: int
    at: float
    gpus: list[str]
    ranks: int
    """How many ranks its launcher starts, each with a log of its own; 0 when that cannot be known before."""


class Facts(TypedDict, total=False):
    """``facts.json``: what the runner found before the training started."""

    python: str
    version: str
    torch: str
    wandb: str
    packages: list[str]
    warnings: list[str]
    wandb_mode: str
    wandb_why: str
    wandb_url: str
    """Where the job's run can be seen, once W&B has shown it."""
    wandb_run: str
    """Id of the job's run: `WandbSpec.run_id`, or that of the first run where the program gave ids of its own."""
    wandb_runs: list[str]
    """Ids of the attempt's runs, in the order of their start; the first `MANY_RUNS`."""
    wandb_staged: int
    """Bytes of files that offline runs have added to artifacts and tables; they are kept in `WANDB_DATA`."""
    left: dict[str, int]
    """Sizes of the outputs that were not kept and stay on the node (`LEFT`), by path."""
    withheld: list[str]
    """Those of `left` that look like secrets."""


class StopWish(TypedDict):
    """``stop.json``."""

    why: Literal["stopped", "timed_out"]
    grace_s: float


class Exit(TypedDict):
    """``exit.json``: how the attempt ended. It belongs to the attempt and outranks what Ray remembers of it."""

    ended: Ended
    exit_code: int | None
    signal: str
    message: str
    """For people; empty if exit code or signal are enough."""
    failed_rank: int | None
    """The rank that failed first, whose exit code and signal these are; None where that is not known."""
    at: float
    by_ray: bool
    """Stopped by a SIGTERM from outside (``ray job stop``), not by raylaunch."""
    killed: int
    """Processes of the attempt that were left over and ended at the end."""
    oom: bool
    """The kernel's out-of-memory killer ended a process of the attempt's cgroup meanwhile."""


def most_unpacked(packed: int) -> int:
    """Return how many bytes a package of `packed` bytes may unpack to, headers included: 128 MiB and 100 for each.

    Code, text and data for training are far below; anything above is an attempt to fill a node's disk.
    """
    return (128 << 20) + 100 * packed
