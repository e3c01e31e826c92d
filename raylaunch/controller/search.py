"""Finding jobs: a page by filters, and the refs nearest to one that does not exist."""

from __future__ import annotations

import difflib
import json
import logging
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from raylaunch.controller.record import JobRecord, record_from
from raylaunch.controller.schema import LISTED
from raylaunch.errors import SpecError, StorageError
from raylaunch.state import JobPage, JobState, JobView

_log = logging.getLogger(__name__)

METRICS_LISTED = 20
"""How many metrics of a job a list has; the job itself has more."""


@dataclass(frozen=True)
class Filters:
    """Which jobs a list shows. Empty fields do not filter."""

    states: tuple[JobState, ...] = ()
    name: str = ""
    owner: str = ""
    tag: str = ""
    since: float | None = None

    @property
    def many(self) -> bool:
        """Whether no index of one column answers them."""
        given = sum(map(bool, (self.states, self.name, self.owner, self.tag, self.since is not None)))
        return given > 1 or bool(self.tag) or "*" in self.name

    def where(self) -> tuple[str, list[str | float]]:
        """Return a condition in SQL, and its values."""
        conditions: list[str] = []
        values: list[str | float] = []
        if self.states:
            conditions.append(f"state IN ({', '.join('?' * len(self.states))})")
            values.extend(state.value for state in self.states)
        if self.name:
            conditions.append("name GLOB ?" if "*" in self.name else "name = ?")
            values.append(self.name)
        if self.owner:
            conditions.append("owner = ?")
            values.append(self.owner)
        if self.tag:
            conditions.append("instr(tags, ?) > 0")
            values.append(f"\n{self.tag}\n")
        if self.since is not None:
            conditions.append("created_at >= ?")
            values.append(self.since)
        return " AND ".join(conditions) or "1", values


def page_of(
    connection: sqlite3.Connection, filters: Filters, known: Mapping[str, JobRecord], *, limit: int, cursor: str
) -> JobPage:
    """Return one page of jobs, newest first, without heavy fields. Those that are `known` are not read again.

    Raises:
        SpecError: the cursor is not one of ours.
    """
    where, values = filters.where()
    jobs_ = f"jobs INDEXED BY {LISTED}" if filters.many else "jobs"
    count = f"SELECT count(*) FROM {jobs_} WHERE {where}"  # noqa: S608 -- columns and marks only, values go apart
    total = connection.execute(count, values).fetchone()[0]
    if cursor:
        where = f"{where} AND (created_at, id) < (?, ?)"
        values = [*values, *_read_cursor(cursor)]
    query = f"SELECT created_at, id FROM {jobs_} WHERE {where} ORDER BY created_at DESC, id DESC LIMIT ?"  # noqa: S608 -- as above
    rows = connection.execute(query, [*values, limit + 1]).fetchall()
    more = len(rows) > limit
    shown = rows[:limit]
    lights = _lights(connection, [job for _, job in shown if job not in known])
    jobs, unreadable = [], []
    for _, job in shown:
        try:
            jobs.append(_listed(known.get(job) or record_from(lights[job])))
        except StorageError as error:  # noqa: PERF203 -- each is one row
            _log.warning("%s is left out of a list: %s", job, error.message)
            unreadable.append(job)
    return JobPage(
        jobs=tuple(jobs),
        next_cursor=f"{shown[-1][0]!r}~{shown[-1][1]}" if more and shown else "",
        total=total,
        unreadable=tuple(unreadable),
    )


def _lights(connection: sqlite3.Connection, jobs: Sequence[str]) -> dict[str, str]:
    marks = ", ".join("?" * len(jobs))
    return dict(connection.execute(f"SELECT id, light FROM jobs WHERE id IN ({marks})", jobs))  # noqa: S608 -- only marks


def _listed(record: JobRecord) -> JobView:
    """Return what a list shows of a job: of many metrics only some."""
    view = record.view()
    if len(view.last_metrics) <= METRICS_LISTED:
        return view
    return view.model_copy(update={"last_metrics": dict(islice(view.last_metrics.items(), METRICS_LISTED))})


def unfinished(connection: sqlite3.Connection, *, foreign: bool) -> tuple[list[JobRecord], list[str]]:
    """Return the jobs that have not ended, without heavy fields; and a sentence for each that cannot be read."""
    where, values = _going(foreign=foreign)
    rows = connection.execute(f"SELECT id, light FROM jobs WHERE {where}", values)  # noqa: S608 -- only marks
    found, odd = [], []
    for job, light in rows:
        try:
            found.append(record_from(light))
        except StorageError as error:  # noqa: PERF203 -- each is one row
            odd.append(f"{job} is left alone: {error.message}")
    return found, odd


def unfinished_ids(connection: sqlite3.Connection) -> list[str]:
    """Return the ids of the jobs of ours that have not ended."""
    where, values = _going(foreign=False)
    return [job for (job,) in connection.execute(f"SELECT id FROM jobs WHERE {where}", values)]  # noqa: S608 -- only marks


def _going(*, foreign: bool) -> tuple[str, list[str | bool]]:
    going = [state.value for state in JobState if not state.ended]
    return f"state IN ({', '.join('?' * len(going))}) AND is_foreign = ?", [*going, foreign]


def nearest(ref: str, known: Sequence[str]) -> list[str]:
    """Return up to three of `known` that resemble `ref`, the nearest first. Of a thousand it takes 50 ms."""
    return difflib.get_close_matches(ref, known, n=3, cutoff=0.6)


def _read_cursor(cursor: str) -> tuple[float, str]:
    created_at, _, job = cursor.partition("~")
    try:
        return float(created_at), job
    except ValueError:
        msg = f"{cursor!r} is not a cursor of a page of jobs"
        raise SpecError(msg, hint="pass next_cursor of the page before, or nothing for the first page") from None


class Kept(NamedTuple):
    """What retention asks of a job: when it ended (None while it has not), the packages of its code and its wheels."""

    id: str
    ended_at: float | None
    package: str
    wheels: tuple[str, ...] = ()

    @property
    def packages(self) -> tuple[str, ...]:
        """All that it would need to be sent once more."""
        return (self.package, *self.wheels)


def kept(db: sqlite3.Connection) -> list[Kept]:
    """Return that of every job of ours."""
    found = db.execute(
        "SELECT id, state, json_extract(light, '$.ended_at'), json_extract(light, '$.package'), "
        "json_extract(heavy, '$.wheels') FROM jobs WHERE NOT is_foreign AND json_valid(light)"
    ).fetchall()
    others = "json_extract(heavy, '$.wheels') FROM jobs WHERE NOT is_foreign AND NOT json_valid(light)"
    for job, state, text, wheels in db.execute(f"SELECT id, state, light, {others}"):
        told = json.loads(text)  # a loss that is no number is JSON for Python only
        found.append((job, state, told.get("ended_at"), told.get("package"), wheels))
    return [
        Kept(job, at if JobState(state).ended else None, package or "", _shas(wheels))
        for job, state, at, package, wheels in found
    ]


def _shas(sets: str | None) -> tuple[str, ...]:
    return tuple(wheel["sha256"] for one in json.loads(sets or "[]") for wheel in one["wheels"])
