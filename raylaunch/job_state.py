"""Where a job stands, and `transition`: what may follow what. Pure."""

from __future__ import annotations

from enum import Enum


class JobState(str, Enum):
    """Where a job stands. The last five are ends and never change."""

    HELD = "held"
    """It waits for a person. No command of this version holds a job."""
    QUEUED = "queued"
    """It waits for its turn; the reason says for what."""
    STARTING = "starting"
    """It has its place: code is sent, its environment prepared."""
    RUNNING = "running"
    """Its program runs."""
    STOPPING = "stopping"
    """It was asked to stop, and not all of its processes are gone yet."""
    SUCCEEDED = "succeeded"
    """An end: the program exited with 0, and what it left behind is in the store."""
    FAILED = "failed"
    """An end: the last attempt failed."""
    STOPPED = "stopped"
    """An end: it was stopped, and all of its processes are gone."""
    TIMED_OUT = "timed_out"
    """An end: it ran longer than its `timeout`."""
    LOST = "lost"
    """An end: its node or Ray went away under it, and no further attempt is made."""

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
