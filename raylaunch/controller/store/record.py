"""`JobRecord`: a job as the controller stores it; and which of its fields are too heavy for lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

from pydantic import JsonValue, ValidationError
from typing_extensions import TypedDict

from raylaunch.errors import ConflictError, StorageError
from raylaunch.models.fields import Count
from raylaunch.models.job import JobView, WheelSet
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import Change, JobState, transition

HEAVY = frozenset({"environment", "git", "pack", "log_tail", "wheels"})
"""Fields that may be large (package lists, a diff, the end of a log). Lists omit them."""


class StopWishModel(TypedDict):
    """`raylaunch.contract.StopWish`, in the form that pydantic supports on Python before 3.12."""

    why: Literal["stopped", "timed_out"]
    grace_s: float


class JobRecord(JobView):
    """A job with the controller's internal fields. Frozen; `Records.update` creates the next version."""

    package: str = ""
    request_id: str = ""
    epoch: str = ""
    """Of the latest attempt."""
    stop_wish: StopWishModel | None = None
    again: bool = False
    """Whether another attempt follows after its stop."""
    free_retries: Count = 0
    """Retries that do not count, because the machines failed and not the program."""
    force_offline: bool = False
    submitted_to_ray: bool = False
    wheels: tuple[WheelSet, ...] = ()
    """Wheels of its environment, for nodes that cannot reach a package index."""

    @property
    def own_spec(self) -> JobSpec:
        """The job's spec; not for external jobs, which have none."""
        if self.spec is None:
            msg = f"{self.id} is an external job and has no spec"
            raise ValueError(msg)
        return self.spec

    def view(self) -> JobView:
        """Return the job as clients see it."""
        return JobView.model_construct(**{name: getattr(self, name) for name in JobView.model_fields})

    def require_ended(self) -> None:
        """Require that the job has ended, before it is removed.

        Raises:
            ConflictError: it has not ended.
        """
        if not self.state.ended:
            msg = f"{self.id} is {self.state.value}; only a job that has ended can be removed"
            raise ConflictError(msg, hint=f"stop it first: raylaunch stop {self.id}")

    def changed(self, change: Change | None, fields: Mapping[str, object], *, now: float) -> JobRecord:
        """Return its next version at `now` (seconds since the epoch); for the arguments see `Records.update`.

        Raises:
            IllegalTransition: `change` is not possible in its state.
        """
        unknown = set(fields) - set(JobRecord.model_fields) | set(fields) & {"id", "state", "cursor", "updated_at"}
        if unknown:
            msg = f"not fields of a job that update can set: {', '.join(sorted(unknown))}"
            raise TypeError(msg)
        values: dict[str, object] = {name: getattr(self, name) for name in JobRecord.model_fields}
        if change is not None:
            values["state"] = state = transition(self.state, change)
            if state is JobState.RUNNING and self.started_at is None:
                values["started_at"] = now
            if state.ended:
                values["ended_at"] = now
        return JobRecord.model_validate({**values, **fields, "updated_at": now})

    def light(self) -> JobRecord:
        """Return it without heavy fields."""
        return self.model_copy(update={"environment": None, "git": None, "pack": None, "log_tail": (), "wheels": ()})


def light_json(record: JobRecord) -> dict[str, JsonValue]:
    """Return all but the heavy fields, as JSON data."""
    return record.model_dump(mode="json", exclude=set(HEAVY))


def heavy_json(record: JobRecord) -> dict[str, JsonValue]:
    """Return the heavy fields, as JSON data."""
    return record.model_dump(mode="json", include=set(HEAVY))


def record_from(light: str, heavy: str = "") -> JobRecord:
    """Return the record from the two JSON texts of a row.

    Python's JSON supports NaN and infinity, which losses may become; standard JSON does not.

    Raises:
        StorageError: this version cannot read the record.
    """
    try:
        return JobRecord.model_validate({**json.loads(light), **(json.loads(heavy) if heavy else {})})
    except (ValueError, RecursionError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        msg = f"the job's record cannot be read: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        raise StorageError(
            msg, hint="its folder in the store is intact; raylaunch list shows the other jobs"
        ) from error
