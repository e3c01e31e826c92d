"""``run`` and ``submit``: from words on a command line to a job."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click

from raylaunch.cli.connect import Place, finish
from raylaunch.cli.console import is_terminal, note, say, say_json, say_lines, size
from raylaunch.cli.follow import detachable, follow_to_end, say_end
from raylaunch.cli.job_flags import job_options, spec_of, warn_of_options_after
from raylaunch.cli.job_words import dry_run_words, pack_words, sentence, wandb_words
from raylaunch.cli.options import as_json
from raylaunch.cli.transfer_bar import transfer_bar
from raylaunch.client import Client, with_wandb
from raylaunch.job_files import check_here
from raylaunch.sensitive import ASKED_ABOVE, Allowed, allowed
from raylaunch.spec import JobSpec
from raylaunch.state import JobView, PackReport, SubmitAnswer

_SETTINGS = {"ignore_unknown_options": False, "allow_interspersed_args": False}


def _prepared(given: dict[str, Any]) -> JobSpec:
    """Return the spec, checked as far as can be done without a cluster."""
    spec = spec_of(given, os.environ)
    warn_of_options_after(given["command"])
    check_here(spec)
    return spec


def _uploads(allow: Allowed) -> Callable[[int], Awaitable[None]]:
    """Return what is asked before an upload begins: a person at a terminal, when it is large."""

    async def ask(size_bytes: int) -> None:
        if size_bytes > ASKED_ABOVE and allow.asked and is_terminal(sys.stdin):
            question = f"{size(size_bytes)} to upload. Continue?"
            await asyncio.to_thread(click.confirm, question, abort=True, err=True)

    return ask


async def _submit(client: Client, spec: JobSpec, *, request_id: str, allow: Allowed) -> SubmitAnswer:
    spec, secrets, taken = with_wandb(spec, os.environ)
    for line in wandb_words(taken, key=bool(secrets)):
        note(line)

    def packed(report: PackReport, archive_bytes: int) -> None:
        for line in pack_words(report, archive_bytes):
            note(line)

    with transfer_bar() as progress:
        answer = await client.submit(
            spec,
            request_id=request_id,
            secrets=secrets,
            allow=allow,
            on_packed=packed,
            on_upload=_uploads(allow),
            on_progress=progress,
        )
    job = answer.job
    if job.chosen:
        note(str(job.chosen))
    if not answer.created:
        note(f"{job.id} was submitted with this request id before; it is {job.state.value}")
    else:
        why = sentence(job)
        note(f"submitted {job.id}: {job.state.value}" + (f", {why}" if why else ""))
    return answer


async def _dry_run(client: Client, spec: JobSpec, *, allow: Allowed, as_json: bool) -> None:
    spec, secrets, taken = with_wandb(spec, os.environ)
    for line in wandb_words(taken, key=bool(secrets)):
        note(line)
    found = await client.dry_run(spec, secrets=secrets, allow=allow)
    if as_json:
        say_json(found)
    else:
        say_lines(dry_run_words(found))


@click.command(
    context_settings=_SETTINGS,
    epilog="Example:  raylaunch run --gpus 2 --env SEED=1 -- python train.py --lr 0.1",
)
@job_options
@as_json
@click.pass_obj
def run(cluster_file: Path | None, /, *, as_json: bool, **given: Any) -> None:  # noqa: ANN401 -- options of job_options
    """Submit a job and follow it to its end; start the cluster when there is none.

    The program stands after --. Its log goes to stdout, all else to stderr. The exit status is the job's own: its exit
    code, 128+N for signal N, 124 when it timed out. Ctrl-C detaches; the job goes on.
    """
    spec = _prepared(given)
    allow = allowed(given["allow"], given["max_upload"])
    known: list[str] = []

    async def work() -> JobView | None:
        async with Place(cluster_file).client(start=True) as client:
            if given["dry_run"]:
                await _dry_run(client, spec, allow=allow, as_json=as_json)
                return None
            answer = await _submit(client, spec, request_id=given["request_id"], allow=allow)
            known.append(answer.job.id)
            return await follow_to_end(client, answer.job.id, log_to_stderr=as_json)

    def ended() -> int:
        job = finish(work())
        return say_end(job, as_json=as_json) if job else 0

    click.get_current_context().exit(detachable(ended, lambda: known[0] if known else ""))


@click.command(
    context_settings=_SETTINGS, epilog="Example:  raylaunch submit -f job.yaml --request-id nightly-2026-03-01"
)
@job_options
@as_json
@click.pass_obj
def submit(cluster_file: Path | None, /, *, as_json: bool, **given: Any) -> None:  # noqa: ANN401 -- as above
    """Submit a job and print its id; start the cluster when there is none."""
    spec = _prepared(given)
    allow = allowed(given["allow"], given["max_upload"])

    async def work() -> None:
        async with Place(cluster_file).client(start=True) as client:
            if given["dry_run"]:
                await _dry_run(client, spec, allow=allow, as_json=as_json)
                return
            answer = await _submit(client, spec, request_id=given["request_id"], allow=allow)
            if as_json:
                say_json(answer)
            else:
                say(answer.job.id)

    finish(work())
