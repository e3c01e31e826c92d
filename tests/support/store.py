"""Records of a store, and jobs in them, in few words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.record import JobRecord
from raylaunch.models.job import AttemptView, JobView, SubmitRequest
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import Change, JobState


@contextmanager
def opened(store: Path) -> Iterator[Records]:
    """Open a store, and close it."""
    records = Records(store)
    try:
        yield records
    finally:
        records.close()


def request(name: str = "digits", **fields: object) -> SubmitRequest:
    """Return what a client would send."""
    spec = JobSpec.model_validate({"name": name, "entrypoint": "python train.py", **fields})
    return SubmitRequest(spec=spec)


def submit(records: Records, name: str = "digits", owner: str = "ana", **fields: object) -> JobRecord:
    """Take a job in."""
    return records.create(request(name, **fields), owner=owner, wandb=None)[0]


def end(records: Records, job: JobRecord, change: Change = Change.FAIL) -> JobRecord:
    """Let a job end."""
    return records.update(job.id, kind="ended", message="it ended", change=change)


def job_view(job: str = "digits-k3f9qa", *, attempts: int = 1) -> JobView:
    """Return a running job with so many attempts, which is in no store."""
    return JobView(
        id=job,
        name="digits",
        owner="ana",
        state=JobState.RUNNING,
        created_at=0,
        updated_at=0,
        attempts=tuple(AttemptView(id=f"{job}-{n}", n=n, admitted_at=0) for n in range(1, attempts + 1)),
    )


def kinds(records: Records, job: str = "") -> list[str]:
    """Return the kinds of the events so far."""
    return [event.kind for event in records.events(after=0, job=job).events]
