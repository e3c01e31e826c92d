"""Reading a page of jobs so that one job that cannot be read hides no other."""

from __future__ import annotations

import json

from pydantic import ValidationError

from raylaunch.errors import ClusterError
from raylaunch.state import JobPage, JobView
from raylaunch.version import __version__


def page_from(body: bytes) -> JobPage:
    """Return the page that an answer holds; jobs that cannot be read are named in `JobPage.unreadable`.

    Raises:
        ClusterError: it is not a page at all.
    """
    try:
        return JobPage.model_validate_json(body)
    except ValidationError:
        return _what_can_be_read(body)


def _what_can_be_read(body: bytes) -> JobPage:
    """Read job by job: a newer controller, or a value that no model allows, may have made one of them."""
    jobs: list[JobView] = []
    unreadable: list[str] = []
    try:
        page = json.loads(body)
        for job in page["jobs"]:
            try:
                jobs.append(JobView.model_validate(job))
            except ValidationError:  # noqa: PERF203 -- each is one job
                unreadable.append(str(job.get("id", "?")))
        rest = {**page, "jobs": (), "unreadable": (*page.get("unreadable", ()), *unreadable)}
        return JobPage.model_validate(rest).model_copy(update={"jobs": tuple(jobs)})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = "the controller answered a question for jobs with something that is not a page of them"
        raise ClusterError(msg, hint=f"raylaunch up starts a controller of this version ({__version__})") from error
