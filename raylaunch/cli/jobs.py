"""``list``, ``show``, ``stop``, ``rm``: jobs and their states."""

from __future__ import annotations

import os
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import click

from raylaunch.cli.connect import as_json, duration, job_argument, request
from raylaunch.cli.console import note, say, say_json, say_lines, size
from raylaunch.cli.job_format import environment_hint, format_job, format_state, jobs_table
from raylaunch.client.client import Client
from raylaunch.config.validation import job_states
from raylaunch.errors import SpecError
from raylaunch.models.fields import seconds
from raylaunch.models.job import JobPage
from raylaunch.models.states import JobState

_PAGE = 500


def since_time(text: str, *, now: float) -> float:
    """Read ``2h`` (ago), a date, or a date with time; return seconds since the epoch.

    Raises:
        SpecError: it is neither.
    """
    try:
        ago = seconds(text)
    except ValueError:
        ago = None
    if isinstance(ago, int | float):
        return now - ago
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except ValueError:
        msg = f"--since: {text!r} is neither a duration nor a date"
        raise SpecError(msg, hint="write 30m, 2h, 7d, 2026-03-01 or 2026-03-01T14:30") from None


@click.command("list", epilog="Example:  raylaunch list --state failed,lost --since 2d")
@click.option(
    "--state", "states", metavar="A,B", help=f"One or more of {', '.join(state.value for state in JobState)}."
)
@click.option("--name", default="", help="Only jobs of this name.")
@click.option("--owner", default="", help="Only jobs of this person.")
@click.option("--tag", default="", help="Only jobs with this tag.")
@click.option("--since", default="", metavar="WHEN", help="Only jobs submitted since: 2h (ago), or a date.")
@click.option("--limit", type=click.IntRange(1, _PAGE), default=50, show_default=True, help="Jobs per page.")
@click.option("--cursor", default="", help="Continue after an earlier page.")
@click.option("--all", "everything", is_flag=True, help="All pages.")
@as_json
@click.pass_obj
def list_(  # noqa: PLR0913 -- each is one filter
    cluster_file: Path | None,
    *,
    states: str | None,
    name: str,
    owner: str,
    tag: str,
    since: str,
    limit: int,
    cursor: str,
    everything: bool,
    as_json: bool,
) -> None:
    """List jobs, newest first. Those of plain 'ray job submit' are marked (ray job)."""
    wanted = job_states([word.strip() for word in (states or "").split(",") if word.strip()])
    after = since_time(since, now=time.time()) if since else None

    async def pages(client: Client) -> JobPage:
        page = partial(client.jobs, states=wanted, name=name, owner=owner, tag=tag, since=after, limit=limit)
        found = await page(cursor=cursor)
        while everything and found.next_cursor:
            more = await page(cursor=found.next_cursor)
            found = more.model_copy(update={"jobs": (*found.jobs, *more.jobs)})
        return found

    found = request(cluster_file, pages)
    if as_json:
        say_json(found)
        return
    if found.jobs:
        say_lines(jobs_table(found.jobs, now=time.time()))
    else:
        note("No matching jobs" if found.total == 0 and any((states, name, owner, tag, since)) else "No jobs")
    if found.next_cursor:
        note(f"Showing {len(found.jobs)} of {found.total:,}. Next page: raylaunch list --cursor {found.next_cursor}")


@click.command(epilog="Example:  raylaunch show last")
@job_argument
@as_json
@click.pass_obj
def show(cluster_file: Path | None, *, job: str, as_json: bool) -> None:
    """Show everything about a job."""
    found = request(cluster_file, lambda client: client.job(job))
    if as_json:
        say_json(found)
    else:
        say_lines([*format_job(found, now=time.time()), *environment_hint(found, os.environ)])


@click.command(epilog="Example:  raylaunch stop digits-k3f9qa --wait")
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@click.option(
    "--grace", metavar="TIME", help="Time between SIGTERM and SIGKILL, for example 10s. Default: the job's own."
)
@click.option("--wait/--no-wait", default=False, help="Return when all their processes have exited.")
@as_json
@click.pass_obj
def stop(cluster_file: Path | None, *, jobs: tuple[str, ...], grace: str | None, wait: bool, as_json: bool) -> None:
    """Stop jobs: SIGTERM, the grace time, SIGKILL."""
    grace_s = None if grace is None else duration(grace, option="--grace")

    async def each(client: Client) -> None:
        for ref in jobs:
            stopped = await client.stop(ref, grace_s=grace_s)
            if wait:
                stopped = await client.wait(stopped.id)
            say_json(stopped) if as_json else say(f"{stopped.id} {format_state(stopped)}")

    request(cluster_file, each)


@click.command(epilog="Example:  raylaunch rm digits-k3f9qa")
@click.argument("jobs", nargs=-1, required=True, metavar="JOB...")
@as_json
@click.pass_obj
def rm(cluster_file: Path | None, *, jobs: tuple[str, ...], as_json: bool) -> None:
    """Delete finished jobs and their logs, metrics and outputs."""

    async def each(client: Client) -> None:
        for ref in jobs:
            job = await client.own_job(ref)
            freed = await client.remove(job.id)
            say_json({"removed": job.id, "bytes": freed}) if as_json else say(f"removed {job.id} ({size(freed)})")

    request(cluster_file, each)
