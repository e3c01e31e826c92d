"""What may follow what."""

from __future__ import annotations

import itertools

import pytest

from raylaunch.models.job import AttemptView, JobView
from raylaunch.models.states import ENDED, Change, IllegalTransition, JobState, Reason, Verdict, transition


def test_a_job_that_runs_to_its_end_succeeds() -> None:
    state = JobState.QUEUED
    for change in (Change.ADMIT, Change.START, Change.SUCCEED):
        state = transition(state, change)
    assert state is JobState.SUCCEEDED


@pytest.mark.parametrize(("state", "change"), list(itertools.product(sorted(ENDED), Change)))
def test_an_ended_state_never_changes(state: JobState, change: Change) -> None:
    with pytest.raises(IllegalTransition, match=f"{change.value} cannot happen to a job that is {state.value}"):
        transition(state, change)


def test_a_job_that_waits_is_stopped_without_having_started() -> None:
    assert transition(JobState.QUEUED, Change.END_STOPPED) is JobState.STOPPED


def test_a_job_that_was_asked_to_stop_is_not_tried_again() -> None:
    with pytest.raises(IllegalTransition):
        transition(JobState.STOPPING, Change.REQUEUE)


def test_a_running_job_can_go_back_into_the_queue() -> None:
    assert transition(JobState.RUNNING, Change.REQUEUE) is JobState.QUEUED


@pytest.mark.parametrize("state", list(JobState))
def test_every_state_that_has_not_ended_can_reach_an_end(state: JobState) -> None:
    reached = {state}
    while True:
        more = {_after(one, change) for one in reached for change in Change} | reached
        if more == reached:
            break
        reached = more
    assert reached & ENDED


def _after(state: JobState, change: Change) -> JobState:
    try:
        return transition(state, change)
    except IllegalTransition:
        return state


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_sentence_and_a_verdict(reason: Reason) -> None:
    assert reason.sentence
    assert reason.verdict in Verdict


def ran(*spans: tuple[float | None, float | None], ended_at: float | None = None) -> float | None:
    attempts = tuple(
        AttemptView(id=f"j-{n}", n=n, admitted_at=0, started_at=started, ended_at=ended)
        for n, (started, ended) in enumerate(spans, 1)
    )
    job = JobView(
        id="j",
        name="j",
        owner="",
        state=JobState.RUNNING,
        created_at=0,
        updated_at=0,
        attempts=attempts,
        ended_at=ended_at,
    )
    return job.ran_s(100)


def test_what_lies_between_attempts_does_not_count_as_run() -> None:
    assert ran() is None
    assert ran((None, 5)) is None
    assert ran((10, 20), (90, None)) == 20
    assert ran((10, 20), (None, 40), (50, 60), ended_at=70) == 20
    assert ran((10, None), ended_at=70) == 60
