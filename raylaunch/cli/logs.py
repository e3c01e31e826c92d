"""``logs``, ``follow``, ``wait``: print, follow or search a job's log; wait until a job has ended."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

import click
from click.core import ParameterSource

from raylaunch.cli.connect import as_json, attempt_option, duration, job_argument, rank_option, request
from raylaunch.cli.console import colour_wanted, is_terminal, note, say, say_json, styled
from raylaunch.cli.job_format import environment_hint, exit_status, format_end
from raylaunch.client.client import Client
from raylaunch.client.logs import LogChunk
from raylaunch.models.job import JobView, LogMatch, LogMatches
from raylaunch.models.safe_text import LogView


async def follow_to_end(
    client: Client, job_id: str, *, log_to_stderr: bool = False, tail: int | None = None
) -> JobView:
    """Print a job's log (stdout) and events (stderr) as they come; return the job when it has ended."""
    log = asyncio.ensure_future(_print_log(client, job_id, to_stderr=log_to_stderr, tail=tail))
    try:
        async for event in client.follow(job_id):
            if event.message:
                note(styled(f"· {event.message}", "dim", sys.stderr))
        await log
    finally:
        log.cancel()
        await asyncio.gather(log, return_exceptions=True)  # the log's own cancellation, never ours
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
    for line in (*format_end(job), *environment_hint(job, os.environ)):
        note(line)
    if as_json:
        say_json(job)
    return exit_status(job)


def detachable(work: Callable[[], int], current: Callable[[], str]) -> int:
    """Run `work`; on Ctrl-C leave the job running and print how to follow it again."""
    try:
        return work()
    except KeyboardInterrupt:
        if not current():
            raise
        note("")
        note(f"Detached; the job keeps running. Follow it again: raylaunch follow {current()}")
        return 0


@click.command(epilog="Example:  raylaunch follow last")
@job_argument
@click.option("--tail", type=click.IntRange(0), default=100, show_default=True, help="Log lines to print first.")
@as_json
@click.pass_obj
def follow(cluster_file: Path | None, *, job: str, tail: int, as_json: bool) -> None:
    """Follow a job's log and state until it ends; exit with its status. Ctrl-C detaches; the job keeps running."""
    known: list[str] = []

    async def work(client: Client) -> JobView:
        found = await client.job(job)
        known.append(found.id)
        return await follow_to_end(client, found.id, log_to_stderr=as_json, tail=tail)

    def ended() -> int:
        return say_end(request(cluster_file, work), as_json=as_json)

    click.get_current_context().exit(detachable(ended, lambda: known[0] if known else ""))


@click.command(epilog="Example:  raylaunch wait digits-k3f9qa && raylaunch get digits-k3f9qa")
@job_argument
@click.option("--timeout", metavar="TIME", help="Give up after this time, for example 90s or 2h (exit status 124).")
@as_json
@click.pass_obj
def wait(cluster_file: Path | None, *, job: str, timeout: str | None, as_json: bool) -> None:
    """Wait until a job has ended; exit with its exit code, 128+N for signal N, or 124 if it timed out."""
    timeout_s = None if timeout is None else duration(timeout, option="--timeout")
    try:
        found = request(cluster_file, lambda client: asyncio.wait_for(client.wait(job), timeout_s))
    except asyncio.TimeoutError:
        note(f"{job} did not end within {timeout_s:g} s")
        click.get_current_context().exit(124)
    if as_json:
        say_json(found)
    else:
        say(f"{found.id} {found.state.value}" + (f": {found.why}" if found.why else ""))
    click.get_current_context().exit(exit_status(found))


_TAIL = 100


@click.command(epilog="Example:  raylaunch logs last --tail 1000 --follow")
@job_argument
@click.option("-n", "--tail", type=click.IntRange(0), metavar="N", help=f"The last N lines. Default: {_TAIL}.")
@click.option("--offset", type=click.IntRange(0), metavar="BYTE", help="Start at this byte instead.")
@click.option("--since", hidden=True)
@click.option("-f", "--follow", "follows", is_flag=True, help="Keep printing until the job has ended.")
@click.option(
    "--search", metavar="TEXT", help="Only lines that contain TEXT, with their numbers; with --tail the last N of them."
)
@click.option("--regex", is_flag=True, help="TEXT is a regular expression (RE2).")
@click.option("-i", "--ignore-case", is_flag=True, help="Ignore case when searching.")
@attempt_option
@rank_option
@click.option("--raw", is_flag=True, help="Print the log unchanged.")
@as_json
@click.pass_obj
def logs(  # noqa: PLR0913 -- each is one option
    cluster_file: Path | None,
    *,
    job: str,
    tail: int | None,
    offset: int | None,
    since: str | None,
    follows: bool,
    search: str | None,
    regex: bool,
    ignore_case: bool,
    attempt: int | None,
    rank: int,
    raw: bool,
    as_json: bool,
) -> None:
    """Print the end of a job's log.

    Invalid UTF-8 is replaced, control characters are escaped and long lines truncated; --raw prints the log unchanged.
    """
    offset = _offset(since) if since is not None else offset
    if tail is not None and offset is not None:
        msg = "--tail and --offset exclude each other"
        raise click.UsageError(msg)
    if as_json and search is None:
        msg = "--json needs --search; --raw prints the bytes of a log"
        raise click.UsageError(msg)
    last = None if offset is not None else _TAIL if tail is None else tail

    async def work(client: Client) -> None:
        if search is not None:
            find = partial(
                client.search_logs, job, search, regex=regex, ignore_case=ignore_case, attempt=attempt, rank=rank
            )
            if not await _search(find, offset=offset or 0, last=tail, as_json=as_json):
                note(f"No line contains {search!r}")
            return
        read = client.follow_logs if follows else partial(_present, client)
        ranks = await _print(read(job, attempt=attempt, rank=rank, tail=last, offset=offset), raw=raw)
        if ranks > 1 and click.get_current_context().get_parameter_source("rank") is ParameterSource.DEFAULT:
            note(f"This is rank 0 of {ranks}; for another: raylaunch logs {job} --rank 1")

    def ended() -> int:
        request(cluster_file, work)
        return 0

    click.get_current_context().exit(detachable(ended, lambda: job if follows else ""))


def _offset(since: str) -> int:
    """Read ``--since``, the old name of `--offset`."""
    if since.isdigit():
        return int(since)
    msg = f"--since {since}: log lines have no timestamps; use --tail N for the last lines, or --offset for a byte"
    raise click.UsageError(msg)


async def _present(  # noqa: PLR0913 -- each says where to read
    client: Client, job: str, *, attempt: int | None, rank: int, tail: int | None, offset: int | None
) -> AsyncIterator[LogChunk]:
    """Yield what the log contains now, not what is written meanwhile; otherwise printing might never end."""
    chunk = await client.logs(job, attempt=attempt, rank=rank, tail=tail, offset=offset)
    size = chunk.size
    yield chunk
    while chunk.data and chunk.next_offset < size:
        chunk = await client.logs(job, attempt=chunk.attempt or attempt, rank=rank, offset=chunk.next_offset)
        yield chunk


async def _print(chunks: AsyncIterator[LogChunk], *, raw: bool) -> int:
    """Print the chunks; return how many ranks the attempt has."""
    ranks = 1
    view = LogView(terminal=is_terminal(sys.stdout), colour=colour_wanted(sys.stdout))
    async for chunk in chunks:
        ranks = chunk.ranks
        if raw:
            click.echo(chunk.data, nl=False)
        else:
            click.echo(view.feed(chunk.data), nl=False, color=True)
    click.echo("" if raw else view.finish(), nl=False, color=True)
    return ranks


async def _search(find: Callable[..., Awaitable[LogMatches]], *, offset: int, last: int | None, as_json: bool) -> bool:
    """Print the lines that match; return whether there are any, or JSON was printed."""
    found, line = 0, 0
    kept: deque[LogMatch] = deque(maxlen=last)
    while True:
        page = await find(offset=offset, line=line)
        kept.extend(page.matches)
        if last is None and not as_json:
            _say_matches(kept)
            kept.clear()
        found += len(page.matches)
        if (as_json and last is None) or not page.more or page.next_offset <= offset:
            break
        offset, line = page.next_offset, page.next_line
    if as_json:
        say_json(page.model_copy(update={"matches": tuple(kept)}))
        return True
    _say_matches(kept)
    return found > 0


def _say_matches(matches: Iterable[LogMatch]) -> None:
    """Print lines with their numbers, like grep -n; if the search started in the middle, with their byte offsets."""
    for match in matches:
        say(f"{match.line or f'byte {match.offset}'}:{match.text}")
