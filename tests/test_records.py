"""The records of jobs: found again, never lost, healed when damaged."""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from support.store import end, kinds, opened, request, submit

from raylaunch.controller.store.backlog import WaitDecision
from raylaunch.controller.store.database import LISTED, Filters, nearest
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.recovery import empty_trash
from raylaunch.errors import ConflictError, NotFoundError, SpecError
from raylaunch.models.job import EnvironmentFacts, FileFact, GitFacts, JobView, PackReport, SubmitRequest, WandbLink
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import Change, IllegalTransition, JobState, Reason


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with opened(tmp_path / "store") as found:
        yield found


# -- finding ---------------------------------------------------------------------------------------------------------


def test_an_id_is_the_name_and_six_letters_that_cannot_be_mistaken(records: Records) -> None:
    name, _, mark = submit(records).id.rpartition("-")
    assert name == "digits"
    assert len(mark) == 6
    assert set(mark) <= set("abcdefghijklmnopqrstuvwxyz234567")


def test_a_name_means_the_latest_job_of_that_name(records: Records) -> None:
    submit(records)
    latest = submit(records)
    submit(records, "other")
    assert records.get("digits").id == latest.id


def test_last_is_the_owners_latest_and_else_anybodys(records: Records) -> None:
    of_ana = submit(records, owner="ana")
    of_ben = submit(records, owner="ben")
    assert records.get("last", owner="ana").id == of_ana.id
    assert records.get("last", owner="cleo").id == of_ben.id


def test_last_without_any_job_says_how_to_submit_one(records: Records) -> None:
    with pytest.raises(NotFoundError) as raised:
        records.get("last")
    assert str(raised.value) == "there are no jobs yet\n  → submit one: raylaunch run -- python train.py"


def test_names_that_a_mistyped_one_resembles_are_found_among_the_latest(records: Records) -> None:
    submit(records, "digits")
    submit(records, "other")
    with pytest.raises(NotFoundError):
        records.get("digist")
    assert nearest("digist", records.refs())[0] == "digits"
    assert nearest("zzz", records.refs()) == []


def test_a_name_like_nothing_points_to_the_list(records: Records) -> None:
    submit(records, "digits")
    with pytest.raises(NotFoundError) as raised:
        records.get("zzz")
    assert str(raised.value) == "no such job: 'zzz'\n  → list jobs: raylaunch list"


# -- pages -----------------------------------------------------------------------------------------------------------


def test_what_grows_with_the_number_of_jobs_is_asked_in_another_thread(records: Records) -> None:
    ended, waiting = submit(records), submit(records)
    end(records, ended)
    with ThreadPoolExecutor(1) as other:
        assert {one.id: one.ended_at is None for one in other.submit(records.retention_rows).result(30)} == {
            ended.id: False,
            waiting.id: True,
        }
        states = {job: state for job, _, state in other.submit(records.names).result(30)}
    assert states == {ended.id: JobState.FAILED, waiting.id: JobState.QUEUED}
    assert records.unfinished() == [waiting.id]


def test_who_waits_for_news_of_a_job_is_woken_by_writes_about_that_job_alone(records: Records) -> None:
    one, other = submit(records), submit(records)
    with records.subscribe(one.id) as of_one, records.subscribe() as of_any:
        records.update(other.id, kind="", message="on its way")
        assert (of_one.is_set(), of_any.is_set()) == (False, True)
        records.update(one.id, kind="", message="on its way")
        assert of_one.is_set()


def test_a_store_of_an_older_version_gets_what_lists_are_filtered_by(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        job = submit(records, tags=("both",))
    with closing(sqlite3.connect(tmp_path / "raylaunch.db")) as database:
        database.execute(f"DROP INDEX {LISTED}")
    with opened(tmp_path) as records:
        for filters in (Filters(tag="both"), Filters(name="dig*"), Filters((JobState.QUEUED,), owner=job.owner)):
            assert [found.id for found in records.page(filters).jobs] == [job.id]


def test_pages_show_every_job_once_newest_first(records: Records) -> None:
    made = [submit(records, f"job{number}").id for number in range(7)]
    seen: list[str] = []
    cursor = ""
    while True:
        page = records.page(limit=3, cursor=cursor)
        assert page.total == 7
        seen += [job.id for job in page.jobs]
        cursor = page.next_cursor
        if not cursor:
            break
    assert seen == made[::-1]


def test_a_page_is_filtered_by_state_name_owner_tag_and_time(records: Records) -> None:
    old = submit(records, "old", owner="ana", tags=["first", "both"])
    new = submit(records, "new", owner="ben", tags=["both"])
    end(records, old)

    def ids(**filters: object) -> list[str]:
        return [job.id for job in records.page(Filters(**filters)).jobs]  # type: ignore[arg-type] # one helper for all filters

    assert ids(states=(JobState.FAILED,)) == [old.id]
    assert ids(states=(JobState.FAILED, JobState.QUEUED)) == [new.id, old.id]
    assert ids(name="new") == ids(name="n*") == [new.id]
    assert ids(owner="ana") == [old.id]
    assert ids(tag="both") == [new.id, old.id]
    assert ids(tag="firs") == []
    assert ids(since=new.created_at) == [new.id]


def test_lists_leave_heavy_fields_out_and_a_single_job_has_them(records: Records) -> None:
    asked = request().model_copy(
        update={
            "git": GitFacts(commit="abc", dirty=True, diff="+ a line"),
            "pack": PackReport(files=1, largest=(FileFact(path="a", bytes=3),)),
        }
    )
    job, _ = records.create(asked, owner="ana", wandb=None)
    records.update(job.id, environment=EnvironmentFacts(packages=("torch==2.9",)), log_tail=("last words",))
    (listed,) = records.page().jobs
    assert (listed.git, listed.pack, listed.environment, listed.log_tail) == (None, None, None, ())
    whole = records.get(job.id)
    assert whole.git is not None
    assert whole.git.diff == "+ a line"
    assert whole.environment is not None
    assert whole.environment.packages == ("torch==2.9",)
    assert whole.log_tail == ("last words",)


def test_a_cursor_that_is_not_ours_is_refused(records: Records) -> None:
    with pytest.raises(SpecError) as raised:
        records.page(cursor="page 2")
    assert raised.value.message == "'page 2' is not a valid cursor"


# -- submitting ------------------------------------------------------------------------------------------------------


def test_the_same_request_id_returns_the_same_job(records: Records) -> None:
    asked = request().model_copy(update={"request_id": "r1"})
    first, created = records.create(asked, owner="ana", wandb=None)
    again, created_again = records.create(asked, owner="ana", wandb=None)
    assert (created, created_again) == (True, False)
    assert first.id == again.id
    assert records.page().total == 1


def test_the_same_request_id_of_another_person_is_another_job(records: Records) -> None:
    asked = request().model_copy(update={"request_id": "r1"})
    records.create(asked, owner="ana", wandb=None)
    assert records.create(asked, owner="ben", wandb=None)[1]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"spec": JobSpec(name="digits", entrypoint="python other.py")}, "another spec"),
        ({"package": "b" * 64}, "other code"),
    ],
)
def test_the_same_request_id_for_something_else_is_a_conflict(
    records: Records, change: dict[str, object], what: str
) -> None:
    asked = request().model_copy(update={"request_id": "r1"})
    job, _ = records.create(asked, owner="ana", wandb=None)
    with pytest.raises(ConflictError) as raised:
        records.create(asked.model_copy(update=change), owner="ana", wandb=None)
    assert str(raised.value) == (
        f"request id 'r1' was already used for {job.id}, with {what}\n  → use a new request id for a new job"
    )


def test_the_folder_holds_what_a_person_can_read_without_raylaunch(records: Records) -> None:
    spec = JobSpec.model_validate({"entrypoint": "python train.py", "environment": "venv:/v", "timeout_s": "2h"})
    asked = SubmitRequest(spec=spec, git=GitFacts(diff="+ größer\n"))
    job, _ = records.create(asked, owner="ana", wandb=None)
    records.update(job.id, environment=EnvironmentFacts(packages=("numpy==2", "torch==2.9")))
    folder = records.folder(job.id)
    assert JobSpec.model_validate(yaml.safe_load((folder / "spec.yaml").read_text())) == spec
    assert (folder / "git.diff").read_text() == "+ größer\n"
    assert (folder / "packages.txt").read_text() == "numpy==2\ntorch==2.9\n"


def test_nobody_else_can_read_the_store_and_no_secret_is_in_it(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with opened(tmp_path / "store") as records:
            asked = request(secrets=["KEY"]).model_copy(update={"secrets": {"KEY": "planted-secret"}})
            end(records, records.create(asked, owner="ana", wandb=None)[0])
            everything = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
            assert {path.name for path in everything} >= {"raylaunch.db", "lock", "journal.jsonl", "spec.yaml"}
            assert [path for path in everything if path.stat().st_mode & 0o077] == []
            assert [path for path in everything if b"planted-secret" in path.read_bytes()] == []
    finally:
        os.umask(old)


def test_the_wandb_run_may_be_named_after_the_job(records: Records) -> None:
    def link(job: str) -> WandbLink:
        return WandbLink(mode="offline", run_id=f"run-{job}", project="p")

    job, _ = records.create(request(), owner="ana", wandb=link)
    assert job.wandb is not None
    assert job.wandb.run_id == f"run-{job.id}"


# -- changing --------------------------------------------------------------------------------------------------------


def test_a_change_moves_the_state_and_is_an_event(records: Records) -> None:
    job = submit(records)
    running = records.update(job.id, kind="admitted", message="starts", change=Change.ADMIT, reason=Reason.SENDING_CODE)
    assert (running.state, running.message, running.reason) == (JobState.STARTING, "starts", Reason.SENDING_CODE)
    last = records.events(after=0, job=job.id).events[-1]
    assert (last.kind, last.message, last.state, last.seq) == ("admitted", "starts", JobState.STARTING, running.cursor)


def test_times_of_start_and_end_are_set_once(records: Records) -> None:
    job = submit(records)
    records.update(job.id, change=Change.ADMIT)
    started = records.update(job.id, change=Change.START)
    records.update(job.id, change=Change.REQUEUE)
    records.update(job.id, change=Change.ADMIT)
    again = records.update(job.id, change=Change.START)
    ended = records.update(job.id, change=Change.SUCCEED, ended_at=7.0)
    assert started.started_at is not None
    assert again.started_at == started.started_at
    assert ended.ended_at == 7.0


def test_an_ended_job_never_changes_its_state(records: Records) -> None:
    job = end(records, submit(records), Change.END_STOPPED)
    journal = (records.folder(job.id) / "journal.jsonl").read_bytes()
    with pytest.raises(IllegalTransition, match="admit cannot happen to a job that is stopped"):
        records.update(job.id, kind="admitted", change=Change.ADMIT)
    assert records.get(job.id) == job
    assert (records.folder(job.id) / "journal.jsonl").read_bytes() == journal


def test_a_quiet_change_is_recorded_without_an_event(records: Records) -> None:
    job = submit(records)
    records.update(job.id, message="waits for GPUs")
    assert records.get(job.id).message == "waits for GPUs"
    assert kinds(records) == ["submitted"]


def test_a_field_that_does_not_exist_is_a_bug_that_is_shown(records: Records) -> None:
    job = submit(records)
    with pytest.raises(TypeError, match="not fields of a job that update can set: reasn, state"):
        records.update(job.id, reasn=None, state=JobState.FAILED)


def test_a_loss_that_is_not_a_number_survives(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        job = submit(records)
        records.update(job.id, last_metrics={"loss": math.nan, "best": math.inf})
        (tmp_path / "raylaunch.db").unlink()
    with opened(tmp_path) as records:
        metrics = records.get(job.id).last_metrics
        assert math.isnan(metrics["loss"])
        assert metrics["best"] == math.inf


def test_a_subscriber_hears_of_each_write_about_its_job_and_of_no_other(records: Records) -> None:
    ours, other = submit(records, "ours"), submit(records, "other")
    with records.subscribe() as any_job, records.subscribe(ours.id) as one_job:
        records.update(other.id, message="now")
        assert (any_job.is_set(), one_job.is_set()) == (True, False)
        records.update(ours.id, message="now")
        assert one_job.is_set()


def test_a_waiting_job_is_in_the_backlog_until_it_starts_or_ends(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        first, second, third = (submit(records, name) for name in ("a", "b", "c"))
        records.update(first.id, change=Change.ADMIT)
        end(records, second, Change.END_STOPPED)
        assert [ask.job for ask in records.backlog.first(9)] == [third.id]
        assert [job.id for job in records.active()] == [first.id]
    with opened(tmp_path) as records:
        assert [ask.job for ask in records.backlog.first(9)] == [third.id]
        assert [job.id for job in records.active()] == [first.id]


def test_wait_reasons_are_recorded_in_one_transaction_each_with_an_event(tmp_path: Path) -> None:
    with opened(tmp_path) as records:
        jobs = [submit(records, name) for name in ("a", "b")]
        before = records.cursor
        records.record_wait_reasons(
            [WaitDecision(job.id, Reason.WAITING_FOR_GPUS, f"{job.name} needs 2 GPUs") for job in jobs]
        )
        events = records.events(after=before).events
        assert [(event.job, event.kind) for event in events] == [(job.id, "waiting") for job in jobs]
        assert records.get(jobs[0].id).cursor == events[0].seq
    with opened(tmp_path) as records:
        assert records.repairs == ()
        assert records.get("b").reason is Reason.WAITING_FOR_GPUS
        assert records.get("b").message == "b needs 2 GPUs"


def test_a_change_of_light_fields_leaves_the_heavy_ones(records: Records) -> None:
    job = submit(records)
    records.update(job.id, log_tail=("the last line",))
    updated = records.update(job.id, message="later")
    assert updated.log_tail == ()
    assert records.get(job.id).log_tail == ("the last line",)
    assert records.light(job.id).message == "later"


# -- foreign jobs ----------------------------------------------------------------------------------------------------


def test_a_foreign_job_is_listed_and_tells_only_new_states(records: Records) -> None:
    view = JobView(
        id="raysubmit_1", name="raysubmit_1", owner="", state=JobState.RUNNING, created_at=1.0, updated_at=1.0
    )
    records.put_foreign(view)
    records.put_foreign(view.model_copy(update={"updated_at": 2.0, "message": "still running"}))
    records.put_foreign(view.model_copy(update={"state": JobState.SUCCEEDED}))
    assert [(job.id, job.foreign) for job in records.page().jobs] == [("raysubmit_1", True)]
    assert [event.state for event in records.events(after=0).events] == [JobState.RUNNING, JobState.SUCCEEDED]
    assert not records.active()
    assert not len(records.backlog)


def test_a_foreign_job_is_removed_without_touching_a_folder(records: Records) -> None:
    records.put_foreign(JobView(id="../r", name="r", owner="", state=JobState.FAILED, created_at=1.0, updated_at=1.0))
    (records.store / "r").mkdir()
    records.delete("../r")
    assert records.page().total == 0
    assert (records.store / "r").is_dir()


def test_a_name_means_our_job_before_a_foreign_one(records: Records) -> None:
    ours = submit(records, "train")
    view = JobView(id="raysubmit_1", name="train", owner="", state=JobState.RUNNING, created_at=9e9, updated_at=9e9)
    records.put_foreign(view)
    records.put_foreign(view.model_copy(update={"id": "raysubmit_2", "name": "theirs"}))
    assert (records.get("train").id, records.get("theirs").id) == (ours.id, "raysubmit_2")


def test_an_unfinished_foreign_job_is_found_and_not_removed(records: Records) -> None:
    records.put_foreign(JobView(id="r1", name="r", owner="", state=JobState.RUNNING, created_at=1.0, updated_at=1.0))
    assert [record.id for record in records.foreign_unfinished()] == ["r1"]
    with pytest.raises(ConflictError, match="r1 is running; only a job that has ended can be removed"):
        records.delete("r1")


# -- removing --------------------------------------------------------------------------------------------------------


def test_only_an_ended_job_can_be_removed(records: Records) -> None:
    job = submit(records)
    with pytest.raises(ConflictError) as raised:
        records.delete(job.id)
    assert str(raised.value) == (
        f"{job.id} is queued; only a job that has ended can be removed\n  → stop it first: raylaunch stop {job.id}"
    )


def test_a_removed_job_is_deleted_with_its_files(records: Records) -> None:
    job = end(records, submit(records))
    records.delete(job.id)
    empty_trash(records.store)
    assert records.page().total == 0
    assert not records.folder(job.id).exists()
    assert list((records.store / "trash").iterdir()) == []
    assert kinds(records) == ["removed"]
