"""Jobs that somebody submitted with plain ``ray job submit``, as views. A pure function."""

from __future__ import annotations

from raylaunch.controller.ray_jobs import RayJob
from raylaunch.spec import JobSpec
from raylaunch.state import JobState, JobView

_STATES = {
    "PENDING": JobState.QUEUED,
    "RUNNING": JobState.RUNNING,
    "SUCCEEDED": JobState.SUCCEEDED,
    "FAILED": JobState.FAILED,
    "STOPPED": JobState.STOPPED,
}


def foreign_view(job: RayJob, *, now: float) -> JobView:
    """Return Ray's view of a submission as ours: its state and times, its entrypoint, and that it is not ours."""
    identity = job.submission_id or ""
    began = job.start_time / 1000 if job.start_time else now
    ended = job.end_time / 1000 if job.end_time else None
    return JobView(
        id=identity,
        name=JobSpec(entrypoint=job.entrypoint or identity).display_name,
        owner="",
        state=_STATES.get(job.status, JobState.RUNNING),
        message=(job.message or "").strip()[:500],
        foreign=True,
        entrypoint=job.entrypoint,
        created_at=began,
        started_at=began if job.status != "PENDING" else None,
        ended_at=ended,
        updated_at=ended or now,
    )
