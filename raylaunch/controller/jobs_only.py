"""What is refused where only the dashboard's address of a Ray is reached, in words that name why and the mend."""

from __future__ import annotations

from raylaunch.controller.record import JobRecord
from raylaunch.controller.settings import Settings
from raylaunch.errors import NotFoundError, SpecError
from raylaunch.spec import JobSpec

_MEND = "where Ray's own ports are reached it works: gcs: HOST:6379 in cluster.yaml, raylaunch down, raylaunch up"


def refuse_what_does_not_travel(settings: Settings, spec: JobSpec) -> None:
    """Refuse a job that needs what Ray's Jobs API cannot carry safely. Pure.

    Raises:
        SpecError: it names secrets.
    """
    secrets = (*settings.secrets, *spec.secrets)
    if settings.jobs_only and secrets:
        msg = f"the secret {secrets[0]} cannot be sent: Ray's Jobs API shows what it is given to all who ask it"
        raise SpecError(msg, hint=_MEND, field="secrets")


def require_carried(settings: Settings, record: JobRecord, what: str, *, found: bool) -> None:
    """Say why a job has none of something, where that never reached the store. Pure.

    Args:
        settings: the controller's.
        record: the job.
        what: ``metrics`` or ``files``.
        found: whether there is some all the same.

    Raises:
        NotFoundError: there is none, and that is why.
    """
    if settings.jobs_only and not found:
        msg = f"{record.id} has no {what} here: only Ray's dashboard is reached, and logs alone come back"
        raise NotFoundError(msg, hint=f"what it left on its node: raylaunch show {record.id}; {_MEND}")
