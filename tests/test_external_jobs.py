"""What raylaunch makes of Ray's words about a job that is not its own: a pure function, and the records behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bridges import UnconnectedBridge

from raylaunch.agent import attempt_files
from raylaunch.agent.attempt_files import Slice
from raylaunch.controller.ray.jobs_api import RayJob, RayJobs
from raylaunch.controller.scheduler.external_jobs import ExternalJobs, SubmissionPlace, external_view
from raylaunch.controller.scheduler.external_logs import ExternalLogs
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.record import JobRecord
from raylaunch.errors import ClusterDownError, ConflictError, NotFoundError
from raylaunch.models.cluster import NodeView
from raylaunch.models.job import AttemptView, JobView, SubmitRequest
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import JobState, Reason

NODE = "aa" * 28
HERE = SubmissionPlace("dgx")
FAILED = "Job entrypoint command failed with exit code 7"
TAIL = f"{FAILED}, last available logs (truncated to 20,000 chars):\nepoch 1\nboom\n"


def job(status: str, **fields: object) -> RayJob:
    facts = {"submission_id": "raysubmit_1", "status": status, "entrypoint": "python train.py", "start_time": 1000}
    return RayJob.model_validate({**facts, **fields})


def view(seen: RayJob, where: SubmissionPlace = HERE, before: JobRecord | None = None) -> JobView:
    return external_view(seen, where=where, now=9.0, before=before)


@pytest.mark.parametrize(
    ("seen", "state", "reason"),
    [
        (job("PENDING"), JobState.QUEUED, None),
        (job("RUNNING", driver_node_id=NODE), JobState.RUNNING, None),
        (job("SUCCEEDED", driver_node_id=NODE, driver_exit_code=0), JobState.SUCCEEDED, Reason.COMPLETED),
        (job("STOPPED", driver_node_id=NODE), JobState.STOPPED, Reason.STOPPED_BY_RAY),
        (job("FAILED", driver_node_id=NODE, driver_exit_code=7), JobState.FAILED, Reason.EXIT_CODE),
        (job("FAILED", driver_node_id=NODE, driver_exit_code=-9), JobState.FAILED, Reason.SIGNAL),
        (job("FAILED", error_type="RUNTIME_ENV_SETUP_FAILURE"), JobState.FAILED, None),
        (job("A_STATE_OF_A_LATER_RAY", driver_node_id=NODE), JobState.RUNNING, None),
    ],
)
def test_each_state_of_ray_maps_to_one_of_raylaunch(seen: RayJob, state: JobState, reason: Reason | None) -> None:
    found = view(seen)
    assert (found.state, found.reason, found.foreign, found.owner) == (state, reason, True, "")


def test_a_job_has_one_attempt_once_it_has_started_and_none_while_it_waits() -> None:
    assert view(job("PENDING")).attempts == ()
    (attempt,) = view(job("FAILED", driver_node_id=NODE, driver_exit_code=7, end_time=3000)).attempts
    assert (attempt.n, attempt.node, attempt.node_id, attempt.exit_code) == (1, "dgx", NODE, 7)
    assert (attempt.started_at, attempt.ended_at, attempt.signal) == (1.0, 3.0, "")


@pytest.mark.parametrize(("code", "name"), [(-9, "SIGKILL"), (-64, "SIGRTMAX"), (-99, "signal 99")])
def test_a_signal_is_named(code: int, name: str) -> None:
    (attempt,) = view(job("FAILED", driver_node_id=NODE, driver_exit_code=code)).attempts
    assert (attempt.signal, attempt.exit_code) == (name, None)


def test_the_last_lines_that_ray_puts_into_its_message_are_the_jobs_last_lines() -> None:
    found = view(job("FAILED", message=TAIL, driver_node_id=NODE))
    assert found.message == FAILED
    assert found.log_tail == ("epoch 1", "boom")


def test_a_long_message_is_a_line_and_its_end() -> None:
    text = "runtime_env setup failed: " + "x" * 1000 + "\n" + "".join(f"line {n}\n" for n in range(100))
    found = view(job("FAILED", message=text))
    assert len(found.message) == 300
    assert found.log_tail[-1] == "line 99"
    assert len(found.log_tail) == 30


@pytest.mark.parametrize("entrypoint", ["", " ", "\x00", "'", "a" * 1_000_000, "\x1b[2J", "größer", "-"])
def test_no_entrypoint_is_too_odd_to_be_shown(entrypoint: str) -> None:
    found = view(job("RUNNING", entrypoint=entrypoint))
    assert found.name
    assert len(found.entrypoint) <= 4000


def test_a_job_whose_node_is_lost_reports_it() -> None:
    found = view(
        job("FAILED", driver_node_id=NODE, error_type="JOB_SUPERVISOR_ACTOR_DIED"), SubmissionPlace("dgx", lost=True)
    )
    assert (found.reason, found.message) == (Reason.NODE_LOST, "its node dgx was lost")


def test_a_job_on_a_lost_node_is_unreachable_and_later_lost() -> None:
    running = job("RUNNING", driver_node_id=NODE)
    found = view(running, SubmissionPlace("dgx", lost=True))
    assert (found.state, found.unreachable) == (JobState.RUNNING, True)
    found = view(running, SubmissionPlace("dgx", lost=True, lost_for_good=True))
    assert (found.state, found.reason, found.message) == (JobState.LOST, Reason.NODE_LOST, "its node dgx was lost")
    assert (found.unreachable, found.ended_at) == (False, 9.0)


# -- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    opened = Records(tmp_path / "store")
    yield opened
    opened.close()


@pytest.fixture
def observed() -> ObservedState:
    return ObservedState(nodes=(NodeView(id=NODE, hostname="dgx", address="10.0.0.1", alive=True),), bridge_up=True)


@pytest.fixture
def foreign(records: Records, observed: ObservedState, tmp_path: Path) -> ExternalJobs:
    ray = RayJobs("http://127.0.0.1:9", "none")
    return ExternalJobs(records=records, ray=ray, bridge=UnconnectedBridge(tmp_path), observed=observed)


def recorded(records: Records) -> JobRecord:
    return records.get("raysubmit_1")


def test_a_job_that_ray_has_forgotten_is_lost(foreign: ExternalJobs, records: Records) -> None:
    foreign.take({"raysubmit_1": job("RUNNING", driver_node_id=NODE)})
    foreign.take({})
    found = recorded(records)
    assert (found.state, found.reason) == (JobState.LOST, Reason.RAY_LOST)
    assert found.message == "Ray was restarted and no longer knows the job"
    assert found.attempts[0].ended_at is not None


def test_a_job_declared_lost_by_mistake_is_found_again(foreign: ExternalJobs, records: Records) -> None:
    for jobs in ({"raysubmit_1": job("RUNNING", driver_node_id=NODE)}, {}, {"raysubmit_1": job("SUCCEEDED")}):
        foreign.take(jobs)
    assert recorded(records).state is JobState.SUCCEEDED


def test_an_ended_job_does_not_end_again_and_a_reused_id_is_another_job(
    foreign: ExternalJobs, records: Records
) -> None:
    ended = job("SUCCEEDED", driver_node_id=NODE)
    for jobs in ({"raysubmit_1": ended}, {}, {"raysubmit_1": ended.model_copy(update={"status": "FAILED"})}):
        foreign.take(jobs)
    assert recorded(records).state is JobState.SUCCEEDED
    foreign.take({"raysubmit_1": job("RUNNING", start_time=5000, driver_node_id=NODE)})
    assert recorded(records).state is JobState.RUNNING


def test_an_ended_job_is_unchanged_when_ray_forgets_it(foreign: ExternalJobs, records: Records) -> None:
    foreign.take({"raysubmit_1": job("SUCCEEDED", driver_node_id=NODE)})
    foreign.take({})
    assert recorded(records).state is JobState.SUCCEEDED


def test_a_raylaunch_job_is_never_treated_as_external(foreign: ExternalJobs, records: Records) -> None:
    spec = JobSpec(entrypoint="python train.py", name="digits")
    ours, _ = records.create(SubmitRequest(spec=spec), owner="ana", wandb=None)
    foreign.take({ours.id: job("FAILED", submission_id=ours.id)})
    assert (records.get(ours.id).foreign, records.get(ours.id).state) == (False, JobState.QUEUED)
    with pytest.raises(ConflictError, match=f"{ours.id} is the id of a raylaunch job"):
        records.foreign(ours.id)


def test_submissions_of_raylaunch_itself_are_left_out(foreign: ExternalJobs, records: Records) -> None:
    foreign.take({"digits-1": job("RUNNING", submission_id="digits-1", metadata={"raylaunch_job": "digits"})})
    assert records.page().total == 0


def test_a_stop_request_is_kept_until_ray_reports_the_end(foreign: ExternalJobs, records: Records) -> None:
    running = job("RUNNING", driver_node_id=NODE, message="Job is currently running.")
    foreign.take({"raysubmit_1": running})
    stopping = foreign.stop(recorded(records), grace_s=None, person="olga")
    assert (stopping.state, stopping.message) == (JobState.STOPPING, "stop requested by olga")
    foreign.take({"raysubmit_1": running.model_copy(update={"message": "other words"})})
    assert recorded(records).state is JobState.STOPPING
    assert foreign.stopping() == ["raysubmit_1"]
    foreign.take({"raysubmit_1": job("STOPPED", driver_node_id=NODE, message="Job was intentionally stopped.")})
    ended = recorded(records)
    assert (ended.state, ended.reason, ended.message) == (
        JobState.STOPPED,
        Reason.STOP_REQUESTED,
        "stop requested by olga",
    )
    assert foreign.stopping() == []


def test_a_wish_to_stop_outlives_the_controller(
    foreign: ExternalJobs, records: Records, observed: ObservedState, tmp_path: Path
) -> None:
    running = {"raysubmit_1": job("RUNNING", driver_node_id=NODE)}
    foreign.take(running)
    foreign.stop(recorded(records), grace_s=60, person="olga")
    ray = RayJobs("http://127.0.0.1:9", "none")
    again = ExternalJobs(records=records, ray=ray, bridge=UnconnectedBridge(tmp_path), observed=observed)
    again.take(running)
    assert (recorded(records).state, again.stopping()) == (JobState.STOPPING, ["raysubmit_1"])
    assert recorded(records).message == "stop requested by olga, with Ray's own grace period"


def test_a_waiting_job_that_was_killed_on_request_was_stopped(foreign: ExternalJobs, records: Records) -> None:
    foreign.take({"raysubmit_1": job("PENDING")})
    foreign.stop(recorded(records), grace_s=None, person="olga")
    foreign.take({"raysubmit_1": job("FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED", message="Job supervisor died")})
    ended = recorded(records)
    assert (ended.state, ended.message) == (JobState.STOPPED, "stop requested by olga before it started")


def test_a_job_that_succeeded_before_the_stop_has_succeeded(foreign: ExternalJobs, records: Records) -> None:
    foreign.take({"raysubmit_1": job("RUNNING", driver_node_id=NODE)})
    foreign.stop(recorded(records), grace_s=None, person="olga")
    foreign.take({"raysubmit_1": job("SUCCEEDED", driver_node_id=NODE, message="Job finished successfully.")})
    assert (recorded(records).state, recorded(records).message) == (JobState.SUCCEEDED, "Job finished successfully.")


def test_an_ended_job_cannot_be_stopped(foreign: ExternalJobs, records: Records) -> None:
    foreign.take({"raysubmit_1": job("SUCCEEDED", driver_node_id=NODE)})
    with pytest.raises(ConflictError, match="raysubmit_1 has ended already: succeeded"):
        foreign.stop(recorded(records), grace_s=None, person="olga")


def test_the_hostname_is_kept_when_the_node_is_lost(
    foreign: ExternalJobs, records: Records, observed: ObservedState
) -> None:
    running = job("RUNNING", driver_node_id=NODE)
    foreign.take({"raysubmit_1": running})
    observed.nodes = (observed.nodes[0].model_copy(update={"id": "bb" * 28, "hostname": "other"}),)
    foreign.take({"raysubmit_1": job("FAILED", driver_node_id=NODE, error_type="JOB_SUPERVISOR_ACTOR_DIED")})
    assert recorded(records).message == "its node dgx was lost"
    assert recorded(records).attempts[0].node == "dgx"


# -- logs ------------------------------------------------------------------------------------------------------------


def read(observed: ObservedState, folder: Path, attempt: AttemptView) -> None:
    logs = ExternalLogs(bridge=UnconnectedBridge(folder), ray=RayJobs("http://127.0.0.1:9", "none"), observed=observed)
    asyncio.run(logs.read(attempt, offset=0, limit=100, ended=False))


def test_a_log_on_a_lost_node_is_reported_as_unavailable(observed: ObservedState, tmp_path: Path) -> None:
    attempt = AttemptView(id="raysubmit_1", n=1, node="gone", node_id="cc" * 28, admitted_at=1.0)
    with pytest.raises(NotFoundError, match="the log of raysubmit_1 is on gone, which is not in the cluster"):
        read(observed, tmp_path, attempt)


def test_a_log_that_neither_an_agent_nor_ray_can_give_is_an_error(observed: ObservedState, tmp_path: Path) -> None:
    attempt = AttemptView(id="raysubmit_1", n=1, node="dgx", node_id=NODE, admitted_at=1.0)
    with pytest.raises(ClusterDownError, match=r"Ray does not respond at .*log of raysubmit_1"):
        read(observed, tmp_path, attempt)


def session(temp: Path, name: str) -> Path:
    logs = temp / name / "logs"
    logs.mkdir(parents=True)
    return logs


def test_a_log_is_found_in_this_session_of_rays_or_in_the_latest_earlier_one(tmp_path: Path) -> None:
    oldest, older, current = (session(tmp_path, f"session_2026-01-0{n}_x") for n in (1, 2, 3))
    (tmp_path / "session_latest").symlink_to(current.parent)
    (oldest / "job-driver-one.log").write_text("oldest")
    (older / "job-driver-one.log").write_text("older")
    assert attempt_files.ray_log_path(current, "one") == older / "job-driver-one.log"
    (current / "job-driver-one.log").write_text("now")
    assert attempt_files.read_ray_log(current, "one", offset=0, tail=None, limit=100).data == b"now"


@pytest.mark.parametrize("submission", ["none", "x/../../secret", "a\0b"])
def test_a_file_that_is_not_a_log_of_ray_is_not_read(tmp_path: Path, submission: str) -> None:
    logs = session(tmp_path, "session_1")
    (logs / "job-driver-x").mkdir()
    (tmp_path / "secret.log").write_text("a secret")
    assert attempt_files.ray_log_path(logs, submission) is None
    assert attempt_files.read_ray_log(logs, submission, offset=0, tail=5, limit=100) == Slice(0, b"", 0)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    logs = session(tmp_path, "session_1")
    (tmp_path / "secret").write_text("a secret")
    (logs / "job-driver-one.log").symlink_to(tmp_path / "secret")
    assert attempt_files.ray_log_path(logs, "one") is None
