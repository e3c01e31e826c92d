"""``logs``: print, follow or search what a job has written."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable
from functools import partial
from pathlib import Path

import click
from click.core import ParameterSource

from raylaunch.cli.connect import Place, finish
from raylaunch.cli.console import colour_wanted, is_terminal, note, say, say_json
from raylaunch.cli.follow import detachable
from raylaunch.cli.options import as_json, attempt_option, job_argument, rank_option
from raylaunch.client import Client, LogChunk
from raylaunch.log_view import LogView
from raylaunch.state import LogMatch

_TAIL = 100


@click.command(epilog="Example:  raylaunch logs last --tail 1000 --follow")
@job_argument
@click.option("-n", "--tail", type=click.IntRange(0), metavar="N", help=f"The last N lines; by default {_TAIL}.")
@click.option("--offset", type=click.IntRange(0), metavar="BYTE", help="From this byte on, instead.")
@click.option("--since", hidden=True)
@click.option("-f", "--follow", "follows", is_flag=True, help="Go on until the job has ended.")
@click.option(
    "--search", metavar="TEXT", help="Only lines that hold this, each with its number; the last N of them with --tail."
)
@click.option("--regex", is_flag=True, help="TEXT is a regular expression (RE2).")
@click.option("-i", "--ignore-case", is_flag=True, help="Search in any case.")
@attempt_option
@rank_option
@click.option("--raw", is_flag=True, help="The bytes as they were written.")
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

    Bytes that are no text are replaced, control characters written out, long lines cut; --raw changes nothing.
    """
    offset = _offset(since) if since is not None else offset
    if tail is not None and offset is not None:
        msg = "give --tail or --offset, not both"
        raise click.UsageError(msg)
    if as_json and search is None:
        msg = "--json goes with --search; --raw gives the bytes of a log"
        raise click.UsageError(msg)
    last = None if offset is not None else _TAIL if tail is None else tail

    async def work() -> None:
        async with Place(cluster_file).client() as client:
            if search is not None:
                await _search(
                    client,
                    job,
                    search,
                    regex=regex,
                    ignore_case=ignore_case,
                    offset=offset or 0,
                    last=tail,
                    attempt=attempt,
                    rank=rank,
                    as_json=as_json,
                )
            else:
                read = client.follow_logs if follows else partial(_present, client)
                ranks = await _print(read(job, attempt=attempt, rank=rank, tail=last, offset=offset), raw=raw)
                if ranks > 1 and click.get_current_context().get_parameter_source("rank") is ParameterSource.DEFAULT:
                    note(f"this is rank 0 of {ranks}; of another: raylaunch logs {job} --rank 1")

    def ended() -> int:
        finish(work())
        return 0

    click.get_current_context().exit(detachable(ended, lambda: job if follows else ""))


def _offset(since: str) -> int:
    """Read ``--since``, which `--offset` was once called."""
    if since.isdigit():
        return int(since)
    msg = f"--since {since}: the lines of a log carry no time; --tail N begins at the last lines, --offset at a byte"
    raise click.UsageError(msg)


async def _present(  # noqa: PLR0913 -- each says where to read
    client: Client, job: str, *, attempt: int | None, rank: int, tail: int | None, offset: int | None
) -> AsyncIterator[LogChunk]:
    """Yield what a log holds now: not what is written to it meanwhile, or printing would never end."""
    chunk = await client.logs(job, attempt=attempt, rank=rank, tail=tail, offset=offset)
    size = chunk.size
    yield chunk
    while chunk.data and chunk.next_offset < size:
        chunk = await client.logs(job, attempt=chunk.attempt or attempt, rank=rank, offset=chunk.next_offset)
        yield chunk


async def _print(chunks: AsyncIterator[LogChunk], *, raw: bool) -> int:
    """Print what comes; return how many ranks the attempt has."""
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


async def _search(  # noqa: PLR0913 -- each is one option of the search
    client: Client,
    job: str,
    pattern: str,
    *,
    regex: bool,
    ignore_case: bool,
    offset: int,
    last: int | None,
    attempt: int | None,
    rank: int,
    as_json: bool,
) -> None:
    found, line = 0, 0
    kept: deque[LogMatch] = deque(maxlen=last)
    while True:
        page = await client.search_logs(
            job, pattern, regex=regex, ignore_case=ignore_case, offset=offset, line=line, attempt=attempt, rank=rank
        )
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
        return
    _say_matches(kept)
    if not found:
        note(f"no line holds {pattern!r}")


def _say_matches(matches: Iterable[LogMatch]) -> None:
    """Print lines with their numbers, as grep -n; where a search began in the middle, with their bytes."""
    for match in matches:
        say(f"{match.line or f'byte {match.offset}'}:{match.text}")
