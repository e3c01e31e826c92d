"""``files``, ``get``, ``du``: the files of jobs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from pydantic import RootModel

from raylaunch.cli.connect import as_json, job_argument, request
from raylaunch.cli.console import count, is_terminal, note, say, say_json, say_lines, shown_text, size, table
from raylaunch.client.client import Client
from raylaunch.client.downloads import Downloaded, IncompleteDownloadError
from raylaunch.client.transport import OnProgress
from raylaunch.models.job import Artifact

_WORTH_SHOWING = 1024 * 1024


@contextlib.contextmanager
def transfer_bar() -> Iterator[OnProgress]:
    """Yield a progress callback that draws a bar on stderr, or does nothing without a terminal."""
    if not is_terminal(sys.stderr):
        yield lambda _what, _done, _total: None
        return
    from rich.console import Console  # noqa: PLC0415 -- only on a terminal
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    bar = Progress(*columns, console=Console(stderr=True), transient=True)

    def draw(what: str, done: int, total: int) -> None:
        if total < _WORTH_SHOWING:
            return
        if what not in tasks:
            bar.start()  # not earlier: there may be a prompt first
            tasks[what] = bar.add_task(shown_text(what).replace("[", r"\["), total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield draw
    finally:
        bar.stop()


@click.command(epilog="Example:  raylaunch files last --kind output")
@job_argument
@click.option(
    "--kind", type=click.Choice(["output", "checkpoint", "log", "wandb", "record"]), help="Only files of this kind."
)
@as_json
@click.pass_obj
def files(cluster_file: Path | None, *, job: str, kind: str | None, as_json: bool) -> None:
    """List the files that a job has produced so far."""
    every = request(cluster_file, lambda client: client.files(job))
    found = [file for file in every if kind is None or file.kind == kind]
    if as_json:
        say_json(RootModel[list[Artifact]](found))
    elif found:
        rows = [(file.kind, size(file.bytes), file.sha256[:12] or "-", _name(file)) for file in found]
        say_lines(table(("KIND", "SIZE", "SHA256", "FILE"), rows, right=(1,)))
    else:
        note("No files yet")


def _name(file: Artifact) -> str:
    if file.link:
        return f"{file.path} -> {file.link}"
    if file.withheld:
        return f"{file.path} (not stored, looks like a secret; on its node)"
    return f"{file.path} (not stored, on its node)" if file.left else file.path


@click.command(epilog="Example:  raylaunch get last model.pt --to models/")
@job_argument
@click.argument("paths", nargs=-1, metavar="[FILE]...")
@click.option(
    "--to",
    "dest",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder. Default: one named after the job's id.",
)
@click.option("--all", "everything", is_flag=True, help="Also checkpoints, logs, W&B files and records.")
@click.option("--force", is_flag=True, help="Replace files that differ, even in a folder with another job's files.")
@as_json
@click.pass_obj
def get(  # noqa: PLR0913 -- each is one option
    cluster_file: Path | None,
    *,
    job: str,
    paths: tuple[str, ...],
    dest: Path | None,
    everything: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Download a job's outputs, or the named files, folders or globs.

    Each file is verified against its checksum. An interrupted download resumes, and files that already exist are not
    downloaded again. A local file that differs is kept, unless an earlier 'get' wrote it. The paths of the files are
    printed to stdout.
    """

    async def download(client: Client) -> tuple[Downloaded, ...]:
        found = await client.own_job(job)
        folder = dest or Path(found.id)
        with transfer_bar() as progress:
            return await client.download(
                found.id, paths, dest=folder, everything=everything, replace=force, on_progress=progress
            )

    try:
        done = request(cluster_file, download)
    except IncompleteDownloadError as error:
        if as_json:  # stdout is for one document, that of the error
            for file in error.done:
                note(str(file.local))
        else:
            _say_downloaded(error.done, as_json=False)
        raise
    _say_downloaded(done, as_json=as_json)
    if not done:
        note("No outputs. All files of the job: --all; list them: raylaunch files")


def _say_downloaded(done: tuple[Downloaded, ...], *, as_json: bool) -> None:
    if as_json:
        say_json(
            [
                {"file": str(file.local), "bytes": file.bytes, "fetched": file.fetched, "verified": file.verified}
                for file in done
            ]
        )
    if not done:
        return
    if not as_json:
        say_lines(str(file.local) for file in done)
    fetched = [file for file in done if file.fetched]
    present = f", {count(len(done) - len(fetched), 'file')} already present" if len(fetched) < len(done) else ""
    unknown = sum(not file.verified for file in done)
    checked = f"; {count(unknown, 'file')} without a recorded checksum" if unknown else "; checksums verified"
    note(f"Downloaded {count(len(fetched), 'file')}, {size(sum(file.bytes for file in fetched))}{present}{checked}")


@click.command(epilog="Example:  raylaunch du --json")
@as_json
@click.pass_obj
def du(cluster_file: Path | None, *, as_json: bool) -> None:
    """Show the disk usage of jobs, largest first, and of nodes: environments, code, attempts."""
    page = request(cluster_file, lambda client: client.usage())
    if as_json:
        say_json(page)
        return
    rows = [
        (
            job.job,
            job.state.value,
            *(size(part) for part in (job.bytes, job.outputs, job.checkpoints, job.logs, job.wandb)),
        )
        for job in page.jobs
    ]
    titles = ("JOB", "STATE", "TOTAL", "OUTPUTS", "CHECKPOINTS", "LOGS", "W&B")
    say_lines(table(titles, rows, right=(2, 3, 4, 5, 6)))
    say()
    say(f"{size(page.total)} in the store, {size(page.packages)} of it code; {size(page.free)} free")
    if page.nodes:
        say()
        usage = [(node.host, size(node.environments), size(node.packages), size(node.attempts)) for node in page.nodes]
        say_lines(table(("NODE", "ENVIRONMENTS", "CODE, WHEELS", "ATTEMPTS"), usage, right=(1, 2, 3)))
