"""Evidence → reason and verdict."""

from __future__ import annotations

import pytest

from raylaunch.contract import Ended, Exit
from raylaunch.controller.scheduler.diagnose import MAX_FREE_RETRIES, Evidence, after_drain, diagnose, retry_follows
from raylaunch.models.states import Change, Reason


def left(ended: Ended, code: int | None = None, signal: str = "", **more: object) -> Exit:
    facts: Exit = {
        "ended": ended,
        "exit_code": code,
        "signal": signal,
        "message": "",
        "at": 0.0,
        "failed_rank": None,
        "by_ray": False,
        "killed": 0,
        "oom": False,
    }
    facts.update(more)  # type: ignore[typeddict-item]  # the test's own keywords are keys of Exit
    return facts


def evidence(exit_: Exit | None, **more: object) -> Evidence:
    return Evidence(**{"exit": exit_, "claimed": True, "stop_wanted": False, **more})  # type: ignore[arg-type]  # as above


def test_a_program_that_exits_with_zero_has_succeeded() -> None:
    assert diagnose(evidence(left("completed", 0))).change is Change.SUCCEED


def test_a_killed_program_is_a_failure_that_names_the_signal() -> None:
    finding = diagnose(evidence(left("signal", None, "SIGKILL")))
    assert (finding.change, finding.reason, finding.signal) == (Change.FAIL, Reason.SIGNAL, "SIGKILL")
    assert finding.message == "the training was ended by SIGKILL"


def test_the_out_of_memory_killer_is_distinguished_from_other_kills() -> None:
    finding = diagnose(evidence(left("signal", None, "SIGKILL", oom=True)))
    assert finding.reason is Reason.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", Reason.GPU_OUT_OF_MEMORY),
        ("OSError: [Errno 28] No space left on device", Reason.DISK_FULL),
        ("MemoryError", Reason.OUT_OF_MEMORY),
        ("ValueError: nothing special", Reason.EXIT_CODE),
    ],
)
def test_the_end_of_the_log_shows_why_a_program_failed(line: str, reason: Reason) -> None:
    assert diagnose(evidence(left("exit_code", 1), log_tail=("Traceback", line))).reason is reason


def test_exit_facts_take_precedence_over_rays_report() -> None:
    finding = diagnose(evidence(left("completed", 0), ray_message="Job supervisor actor died"))
    assert finding.change is Change.SUCCEED


def test_a_stop_before_the_start_is_a_stop() -> None:
    finding = diagnose(evidence(None, claimed=False, stop_wanted=True))
    assert finding.change is Change.END_STOPPED


def test_a_runner_that_died_silently_is_reported() -> None:
    assert diagnose(evidence(None)).reason is Reason.RUNNER_DIED


def test_a_refusal_of_ray_is_reported_with_its_message() -> None:
    finding = diagnose(evidence(None, claimed=False, ray_message="no such label"))
    assert finding.message == "Ray ended the submission before it started: no such label"


def test_a_kill_while_ray_went_down_is_rays_fault() -> None:
    finding = diagnose(evidence(left("signal", None, "SIGKILL"), ray_lost=True))
    assert (finding.change, finding.reason) == (Change.LOSE, Reason.RAY_LOST)


def test_a_failure_while_ray_went_down_stays_the_programs_own() -> None:
    assert diagnose(evidence(left("exit_code", 3), ray_lost=True)).reason is Reason.EXIT_CODE


def test_a_failed_program_is_retried_as_often_as_requested() -> None:
    assert retry_follows(Reason.EXIT_CODE, attempts=1, free_retries=0, retries=1)
    assert not retry_follows(Reason.EXIT_CODE, attempts=2, free_retries=0, retries=1)


def test_a_lost_node_does_not_count_but_not_for_ever() -> None:
    assert retry_follows(Reason.NODE_LOST, attempts=1, free_retries=0, retries=0)
    assert not retry_follows(Reason.NODE_LOST, attempts=4, free_retries=MAX_FREE_RETRIES, retries=0)


def test_a_stopped_job_is_not_tried_again() -> None:
    assert not retry_follows(Reason.STOP_REQUESTED, attempts=1, free_retries=0, retries=9)


def test_a_missing_module_that_was_not_sent_names_the_rule() -> None:
    tail = ("Traceback", "ModuleNotFoundError: No module named 'utils.logging'")
    finding = diagnose(evidence(left("exit_code", 1), log_tail=tail, left_out_by=(".gitignore: log*",)))
    assert finding.message.endswith("utils/logging.py is not sent: .gitignore: log*")
    assert (
        diagnose(evidence(left("completed", 0), log_tail=tail, left_out_by=(".gitignore: log*",))).message
        == "completed"
    )


def test_an_attempt_stopped_for_a_retry_reports_the_reason() -> None:
    stopped = diagnose(evidence(left("stopped"), stop_wanted=True))
    drained = after_drain(stopped, Reason.HOST_DRAINED)
    assert (drained.reason, drained.message) == (Reason.HOST_DRAINED, "stopped because its host was drained")
    down = after_drain(stopped, Reason.CLUSTER_DOWN)
    assert (down.reason, down.message) == (
        Reason.CLUSTER_DOWN,
        "stopped because the cluster was taken down or upgraded",
    )
    failed = diagnose(evidence(left("exit_code", 1)))
    assert after_drain(failed, Reason.CLUSTER_DOWN) == failed


@pytest.mark.parametrize(
    ("expected", "fix"),
    [
        (
            "ValueError: When connecting to an existing cluster, num_cpus and num_gpus must not be provided.",
            "takes no num_cpus or num_gpus",
        ),
        ("INFO worker.py:2015 -- Started a local Ray instance.", "submit it with --launcher ray"),
    ],
)
def test_a_ray_init_that_does_not_fit_the_launcher_is_named_with_its_fix(expected: str, fix: str) -> None:
    finding = diagnose(evidence(left("exit_code", 1), log_tail=("Traceback", expected)))
    assert finding.reason is Reason.EXIT_CODE
    assert fix in finding.message
