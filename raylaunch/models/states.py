"""The states of a job and the transitions between them; the reasons why it waits or ended, with verdict and advice."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Verdict(str, Enum):
    """What follows after an attempt that ended for a reason."""

    FINAL = "final"
    """Another attempt would end the same way, or a person requested this end."""
    RETRY = "retry"
    """The program failed; another attempt starts if the job has retries left."""
    RETRY_FREE = "retry_free"
    """A machine failed, not the program: another attempt starts and is not counted, a few times at most."""
    WAIT = "wait"
    """The job has not ended; the reason says what it is waiting for."""


class _Facts(NamedTuple):
    verdict: Verdict
    sentence: str
    advice: str


class Reason(str, Enum):
    """Why a job is waiting, or why its attempt ended. The value is stable and machine-readable."""

    WAITING_FOR_GPUS = "waiting_for_gpus"
    WAITING_FOR_CPUS = "waiting_for_cpus"
    WAITING_FOR_MEMORY = "waiting_for_memory"
    WAITING_FOR_RESOURCE = "waiting_for_resource"
    WAITING_FOR_NODE = "waiting_for_node"
    WAITING_FOR_TURN = "waiting_for_turn"
    WAITING_FOR_DRAIN = "waiting_for_drain"
    WAITING_FOR_RAY = "waiting_for_ray"
    GPU_BUSY_OUTSIDE = "gpu_busy_outside"
    SENDING_CODE = "sending_code"
    COMPLETED = "completed"
    EXIT_CODE = "exit_code"
    SIGNAL = "signal"
    OUT_OF_MEMORY = "out_of_memory"
    GPU_OUT_OF_MEMORY = "gpu_out_of_memory"
    DISK_FULL = "disk_full"
    STOP_REQUESTED = "stop_requested"
    STOPPED_BY_RAY = "stopped_by_ray"
    TIMEOUT = "timeout"
    ENVIRONMENT = "environment"
    ENTRYPOINT_NOT_FOUND = "entrypoint_not_found"
    SECRET_MISSING = "secret_missing"  # noqa: S105 -- a reason, not a secret
    RUNNER_DIED = "runner_died"
    NODE_LOST = "node_lost"
    HOST_DRAINED = "host_drained"
    CLUSTER_DOWN = "cluster_down"
    RAY_REFUSED = "ray_refused"
    RAY_LOST = "ray_lost"

    @property
    def verdict(self) -> Verdict:
        """What follows after an attempt that ended for this reason."""
        return _TABLE[self].verdict

    @property
    def sentence(self) -> str:
        """The reason in words, used where there is no sentence with the job's own numbers."""
        return _TABLE[self].sentence

    @property
    def advice(self) -> str:
        """What a person can do about it."""
        return _TABLE[self].advice


_TABLE: dict[Reason, _Facts] = {
    Reason.WAITING_FOR_GPUS: _Facts(
        Verdict.WAIT, "waiting for GPUs", "wait, or stop a job that holds them; `raylaunch show` names those"
    ),
    Reason.WAITING_FOR_CPUS: _Facts(
        Verdict.WAIT, "waiting for CPUs", "wait, request fewer `resources.cpus`, or stop a job that holds them"
    ),
    Reason.WAITING_FOR_MEMORY: _Facts(
        Verdict.WAIT, "waiting for memory", "wait, request less `resources.memory`, or stop a job that holds it"
    ),
    Reason.WAITING_FOR_RESOURCE: _Facts(
        Verdict.WAIT, "waiting for a custom resource", "wait, or stop a job that holds it"
    ),
    Reason.WAITING_FOR_NODE: _Facts(
        Verdict.WAIT,
        "waiting for a node that can run it",
        "see `raylaunch status`: a node that could run it is down",
    ),
    Reason.WAITING_FOR_TURN: _Facts(
        Verdict.WAIT, "waiting for a job ahead of it", "wait, or submit it with a higher `priority`"
    ),
    Reason.WAITING_FOR_DRAIN: _Facts(
        Verdict.WAIT,
        "waiting for a drained host",
        "wait, or end the drain: `raylaunch drain HOST --off`",
    ),
    Reason.WAITING_FOR_RAY: _Facts(
        Verdict.WAIT, "waiting for Ray", "wait: Ray restarts automatically; if it does not, run `raylaunch up`"
    ),
    Reason.GPU_BUSY_OUTSIDE: _Facts(
        Verdict.WAIT,
        "waiting for GPUs that processes outside raylaunch are using",
        "stop those processes, or wait; `raylaunch status` lists them",
    ),
    Reason.SENDING_CODE: _Facts(Verdict.WAIT, "its code is being sent to the node", "wait"),
    Reason.COMPLETED: _Facts(Verdict.FINAL, "completed", "fetch its outputs: `raylaunch get`"),
    Reason.EXIT_CODE: _Facts(
        Verdict.RETRY, "the program exited with an error", "read its last lines: `raylaunch logs`"
    ),
    Reason.SIGNAL: _Facts(
        Verdict.RETRY,
        "the program was killed by a signal",
        "read its last lines: `raylaunch logs`; the sender of the signal is not known",
    ),
    Reason.OUT_OF_MEMORY: _Facts(
        Verdict.RETRY,
        "the machine ran out of memory",
        "use less, or request more with `resources.memory`, so that fewer jobs share the node",
    ),
    Reason.GPU_OUT_OF_MEMORY: _Facts(
        Verdict.FINAL, "the GPU ran out of memory", "use a smaller batch or model, or larger GPUs"
    ),
    Reason.DISK_FULL: _Facts(
        Verdict.FINAL,
        "the disk is full",
        "free space on the node; for the store, use `raylaunch du` and `raylaunch rm`",
    ),
    Reason.STOP_REQUESTED: _Facts(Verdict.FINAL, "stopped on request", "nothing; submit it again to run it again"),
    Reason.STOPPED_BY_RAY: _Facts(
        Verdict.FINAL, "stopped with Ray's own tools", "nothing; somebody used `ray job stop`"
    ),
    Reason.TIMEOUT: _Facts(
        Verdict.FINAL, "ran longer than its timeout", "set a longer `timeout`, or continue from a checkpoint"
    ),
    Reason.ENVIRONMENT: _Facts(
        Verdict.FINAL,
        "its Python environment cannot be used",
        "choose another `environment`; `raylaunch show` says what is wrong with this one",
    ),
    Reason.ENTRYPOINT_NOT_FOUND: _Facts(
        Verdict.FINAL, "the program to run was not found", "check `entrypoint`, `working_dir` and `environment`"
    ),
    Reason.SECRET_MISSING: _Facts(Verdict.FINAL, "a secret it names is not set", "set it: `raylaunch secret set NAME`"),
    Reason.RUNNER_DIED: _Facts(
        Verdict.RETRY,
        "raylaunch's runner was killed, and the program with it",
        "find out what killed it: the kernel because of low memory, or a person",
    ),
    Reason.NODE_LOST: _Facts(
        Verdict.RETRY_FREE, "its node was lost", "nothing if it is retried; else see `raylaunch status`"
    ),
    Reason.HOST_DRAINED: _Facts(
        Verdict.RETRY_FREE, "its host was drained", "nothing; it is queued again, and continues from its checkpoint"
    ),
    Reason.CLUSTER_DOWN: _Facts(
        Verdict.RETRY_FREE,
        "the cluster was taken down or upgraded",
        "nothing; it is queued again, and continues from its checkpoint once the cluster is up",
    ),
    Reason.RAY_REFUSED: _Facts(Verdict.FINAL, "Ray refused the submission", "read Ray's message: `raylaunch show`"),
    Reason.RAY_LOST: _Facts(Verdict.RETRY_FREE, "Ray restarted while it ran", "nothing if it is retried"),
}


class JobState(str, Enum):
    """The state of a job. The last five are final and never change."""

    HELD = "held"
    """It is waiting for a person. No command of this version holds a job."""
    QUEUED = "queued"
    """It is waiting for its turn; the reason says for what."""
    STARTING = "starting"
    """It was placed on a node: its code is being sent, its environment prepared."""
    RUNNING = "running"
    """Its program is running."""
    STOPPING = "stopping"
    """It was asked to stop, and some of its processes have not exited yet."""
    SUCCEEDED = "succeeded"
    """Final: the program exited with 0, and its files are in the store."""
    FAILED = "failed"
    """Final: the last attempt failed."""
    STOPPED = "stopped"
    """Final: it was stopped, and all of its processes have exited."""
    TIMED_OUT = "timed_out"
    """Final: it ran longer than its `timeout`."""
    LOST = "lost"
    """Final: its node or Ray was lost while it ran, and no further attempt is made."""

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


class IllegalTransition(ValueError):  # noqa: N818 -- a bug in raylaunch, not an error that a person acts on
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
