"""``follow`` and ``wait``, and what ``run`` does after its submission: a job's log and events until it has ended."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from raylaunch.cli.connect import Place, finish
from raylaunch.cli.console import colour_wanted, is_terminal, note, say, say_json, styled
from raylaunch.cli.job_words import environment_words, exit_status, final_facts, sentence
from raylaunch.cli.options import as_json, duration, job_argument
from raylaunch.client import Client
from raylaunch.log_view import LogView
from raylaunch.state import JobView


async def follow_to_end(
    client: Client, job_id: str, *, log_to_stderr: bool = False, tail: int | None = None
) -> JobView:
    """Print log (stdout) and events (stderr) of a job as they come; return it when it has ended."""
    log = asyncio.ensure_future(_print_log(client, job_id, to_stderr=log_to_stderr, tail=tail))
    try:
        async for event in client.follow(job_id):
            if event.message:
                note(styled(f"· {event.message}", "dim", sys.stderr))
        await log
    finally:
        log.cancel()
        await asyncio.gather(log, return_exceptions=True)  # the log's own cancellation, and never ours
    return await client.job(job_id)


async def _print_log(client: Client, job_id: str, *, to_stderr: bool, tail: int | None) -> None:
    stream = sys.stderr if to_stderr else sys.stdout
    view = LogView(terminal=is_terminal(stream), colour=colour_wanted(stream))
    attempt = 0
    async for chunk in client.follow_logs(job_id, tail=tail):
        if attempt and chunk.attempt != attempt:
            _write(view.finish(), to_stderr=to_stderr)
        attempt = chunk.attempt
        _write(view.feed(chunk.data), to_stderr=to_stderr)
    _write(view.finish(), to_stderr=to_stderr)


def _write(text: str, *, to_stderr: bool) -> None:
    if text:
        click.echo(text, nl=False, err=to_stderr, color=True)


def say_end(job: JobView, *, as_json: bool) -> int:
    """Print how a job ended; return the exit status."""
    for line in (*final_facts(job), *environment_words(job, os.environ)):
        note(line)
    if as_json:
        say_json(job)
    return exit_status(job)


def detachable(work: Callable[[], int], current: Callable[[], str]) -> int:
    """Run `work`; on Ctrl-C leave the job alone and say how to come back to it."""
    try:
        return work()
    except KeyboardInterrupt:
        if not current():
            raise
        note("")
        note(f"detached; the job goes on: raylaunch follow {current()}")
        return 0


@click.command(epilog="Example:  raylaunch follow last")
@job_argument
@click.option("--tail", type=click.IntRange(0), default=100, show_default=True, help="Log lines to begin with.")
@as_json
@click.pass_obj
def follow(cluster_file: Path | None, *, job: str, tail: int, as_json: bool) -> None:
    """Follow a job's log and state to its end; exit with its status. Ctrl-C detaches, the job goes on."""
    known: list[str] = []

    async def work() -> JobView:
        async with Place(cluster_file).client() as client:
            found = await client.job(job)
            known.append(found.id)
            return await follow_to_end(client, found.id, log_to_stderr=as_json, tail=tail)

    status = detachable(lambda: say_end(finish(work()), as_json=as_json), lambda: known[0] if known else "")
    click.get_current_context().exit(status)


@click.command(epilog="Example:  raylaunch wait digits-k3f9qa && raylaunch get digits-k3f9qa")
@job_argument
@click.option("--timeout", metavar="TIME", help="Give up after so long, as 90s or 2h (exit status 124).")
@as_json
@click.pass_obj
def wait(cluster_file: Path | None, *, job: str, timeout: str | None, as_json: bool) -> None:
    """Wait for a job's end and exit with its status: its exit code, 128+N for signal N, 124 when it timed out."""
    timeout_s = duration(timeout, option="--timeout")

    async def work() -> JobView:
        async with Place(cluster_file).client() as client:
            return await asyncio.wait_for(client.wait(job), timeout_s)

    try:
        found = finish(work())
    except asyncio.TimeoutError:
        note(f"{job} has not ended within {timeout_s:g} s")
        click.get_current_context().exit(124)
    if as_json:
        say_json(found)
    else:
        why = sentence(found)
        say(f"{found.id} {found.state.value}" + (f": {why}" if why else ""))
    click.get_current_context().exit(exit_status(found))
