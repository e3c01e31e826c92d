"""``run`` and ``submit``: from words on a command line to a job."""

from __future__ import annotations

import asyncio
import os
import sys
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
from raylaunch.cluster.plan import Plan
from raylaunch.errors import UnsatisfiableError
from raylaunch.job_files import check_here
from raylaunch.packing import Packed
from raylaunch.sensitive import ASKED_ABOVE, Allowed, allowed
from raylaunch.spec import JobSpec
from raylaunch.state import DryRun, JobView, PackReport, SubmitAnswer
from raylaunch.submitting import checked

_SETTINGS = {"ignore_unknown_options": False, "allow_interspersed_args": False}


def _prepared(given: dict[str, Any]) -> JobSpec:
    """Return the spec, checked as far as can be done without a cluster."""
    spec = spec_of(given, os.environ)
    warn_of_options_after(given["command"])
    check_here(spec)
    return spec


class _Before:
    """What is checked and asked before a missing cluster is started, so that nothing of it is refused afterwards."""

    def __init__(self, place: Place, spec: JobSpec, allow: Allowed) -> None:
        self._place = place
        self._spec = spec
        self._allow = allow
        self._asked = False
        self.packed: Packed | None = None

    async def start(self) -> None:
        """Check and pack the job, and ask about its size: the cluster has nothing of it yet."""
        spec = with_wandb(self._spec, os.environ).spec
        self.packed = (await checked(spec, self._place.spec, allow=self._allow)).packed
        if self.packed:
            await self.upload(self.packed.bytes)

    async def upload(self, size_bytes: int) -> None:
        """Ask a person at a terminal, once, whether a large upload is to begin."""
        if size_bytes > ASKED_ABOVE and self._allow.asked and not self._asked and is_terminal(sys.stdin):
            question = f"{size(size_bytes)} to upload. Continue?"
            await asyncio.to_thread(click.confirm, question, abort=True, err=True)
            self._asked = True


async def _submit(client: Client, spec: JobSpec, *, request_id: str, allow: Allowed, before: _Before) -> SubmitAnswer:
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
            packed=before.packed,
            on_packed=packed,
            on_upload=before.upload,
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


async def _dry_run(place: Place, spec: JobSpec, *, allow: Allowed, as_json: bool) -> int:
    """Print what a submission would do, and return the exit status. Nothing is sent or started."""
    spec, secrets, taken = with_wandb(spec, os.environ)
    for line in wandb_words(taken, key=bool(secrets)):
        note(line)
    plan = None
    if await place.would_start():
        found, plan = await _without_cluster(place, spec, allow)
    else:
        async with place.client() as client:
            found = await client.dry_run(spec, secrets=secrets, allow=allow)
    if as_json:
        say_json(found)
    else:
        say_lines([*dry_run_words(found), *(str(plan).split("\n") if plan else ())])
    return 1 if plan and plan.problems else 0


async def _without_cluster(place: Place, spec: JobSpec, allow: Allowed) -> tuple[DryRun, Plan]:
    name = place.spec.name
    with await checked(spec, place.spec, allow=allow) as ready:
        plan = await place.plan()
        for what, most in plan.offers.items():
            if (getattr(spec.resources, what) or 0) > most:
                msg = f"{spec.display_name} can never run on cluster {name}: it asks for {what}, and there are {most:g}"
                raise UnsatisfiableError(msg, hint=f"ask for at most {most:g} {what}")
        return ready.dry_run(f"cluster {name!r} does not run, and would be started first"), plan


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

    async def work() -> JobView:
        place = Place(cluster_file)
        before = _Before(place, spec, allow)
        async with place.client(start=True, before_start=before.start) as client:
            answer = await _submit(client, spec, request_id=given["request_id"], allow=allow, before=before)
            known.append(answer.job.id)
            return await follow_to_end(client, answer.job.id, log_to_stderr=as_json)

    def ended() -> int:
        if given["dry_run"]:
            return finish(_dry_run(Place(cluster_file), spec, allow=allow, as_json=as_json))
        return say_end(finish(work()), as_json=as_json)

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

    async def work() -> int:
        place = Place(cluster_file)
        if given["dry_run"]:
            return await _dry_run(place, spec, allow=allow, as_json=as_json)
        before = _Before(place, spec, allow)
        async with place.client(start=True, before_start=before.start) as client:
            answer = await _submit(client, spec, request_id=given["request_id"], allow=allow, before=before)
        if as_json:
            say_json(answer)
        else:
            say(answer.job.id)
        return 0

    click.get_current_context().exit(finish(work()))
