"""``train_job`` and ``stop_job``: what begins and ends jobs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator

from mcp_server.arguments import ListJobs, MonitorJob, StopJob, TrainJob
from mcp_server.context import ToolCall, ToolProgress
from mcp_server.policy import ALLOW_VARIABLE, UPLOAD_VARIABLE, Roots
from mcp_server.render import (
    UNTRUSTED,
    UNTRUSTED_LIST,
    UNTRUSTED_WORDS,
    Json,
    job_facts,
    job_row,
    next_for,
    short,
    token,
    without_empty,
)
from mcp_server.results import end_of_log
from raylaunch.client.client import Client
from raylaunch.client.packing import checked_working_dir
from raylaunch.client.submission import with_wandb
from raylaunch.client.transport import NoAnswerError
from raylaunch.config.load import Flag, job_spec_from_flags
from raylaunch.config.yaml_file import YamlFile, parse_yaml
from raylaunch.errors import ClusterError, NotFoundError, SpecError, WithheldError
from raylaunch.models.job import DryRun, JobView, PackReport, format_metrics
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import JobState

_LOG_BYTES = 12_000
_POLL_S = 2.0
_METRICS_SHOWN = 3


async def monitor_job(given: MonitorJob, call: ToolCall) -> Json:
    """Say how a job goes; with `wait_s`, wait for a change first."""
    async with call.client() as client:
        job = await client.retrying(lambda: client.job(given.job))
        known = job.cursor if given.cursor is None else given.cursor
        if given.wait_s and not job.state.ended:
            job = await _after_a_change(client, job, known, given.wait_s, call)
        log = await _end_of_log(client, job, given.log_lines) if given.log_lines else None
    return {
        "job": job_facts(job, now=time.time()),
        "changed": job.cursor > known,
        "cursor": job.cursor,
        **({"yours": False} if client.is_others(job.id) else {}),
        **({"log": log} if log else {}),
        "next": next_for(job),
    }


async def list_jobs(given: ListJobs, call: ToolCall) -> Json:
    """List jobs, newest first."""
    async with call.client() as client:
        page = await client.retrying(
            lambda: client.jobs(
                states=given.states,
                name=given.name,
                owner=given.owner,
                tag=given.tag,
                limit=given.limit,
                cursor=given.cursor,
            )
        )
    rows = [job_row(job, now=time.time()) for job in page.jobs]
    if page.next_cursor:
        then = "next page: list_jobs with this cursor"
    elif rows:
        then = "monitor_job shows one of them"
    else:
        filtered = given.states or given.name or given.owner or given.tag
        then = (
            "no matching jobs; list_jobs without filters shows all"
            if filtered
            else "no jobs yet; train_job submits one"
        )
    return {
        "untrusted": UNTRUSTED_LIST,
        "jobs": rows,
        "total": page.total,
        **without_empty({"cursor": page.next_cursor}),
        "next": then,
    }


async def _after_a_change(client: Client, job: JobView, known: int, wait_s: float, call: ToolCall) -> JobView:
    """Return the job when something happened to it after `known`, or when the time is over.

    Progress and metrics are told meanwhile and do not end the wait: of a training that logs each second, an agent would
    read each second.
    """
    loop = asyncio.get_running_loop()
    began, was_unreachable = loop.time(), job.unreachable
    async with call.telling(lambda: ToolProgress(loop.time() - began, wait_s, _line(job))):
        while (left := began + wait_s - loop.time()) > 0:
            hold_s = min(left, _POLL_S)
            page = await client.retrying(lambda: client.events(job.id, after=known, wait_s=hold_s))  # noqa: B023 -- called before the next turn
            job = await client.retrying(lambda: client.job(job.id))  # noqa: B023 -- as above
            if page.events or job.unreachable != was_unreachable:  # a lost node is no event
                break
    return job


def _line(job: JobView) -> str:
    named = {key: value for key, value in list(job.last_metrics.items())[:_METRICS_SHOWN] if token(key, 40)}
    parts = [f"{token(job.id)} is {job.state_text}", str(job.progress or "")]
    return ", ".join(filter(None, [*parts, format_metrics(named, limit=_METRICS_SHOWN)]))


async def _end_of_log(client: Client, job: JobView, most: int) -> Json | None:
    if job.state in {JobState.QUEUED, JobState.HELD} or not job.attempts:
        return None
    try:
        _, found = await end_of_log(client, job, tail=most, most_bytes=_LOG_BYTES)
    except NoAnswerError:
        raise
    except (NotFoundError, ClusterError) as error:  # what else there is to say about the job is said
        return {"untrusted": UNTRUSTED_WORDS, "unread": short(error.message)}
    if not found.lines:
        return None
    return {
        "untrusted": UNTRUSTED,
        "lines": found.lines,
        **without_empty({"cut": f"{found.cut}; job_logs shows more" if found.cut else ""}),
    }


_NOT_FIELDS = {"job_file", "working_dir", "more", "request_id", "dry_run"}
_RENAMED = {"gpus": ("resources", "gpus"), "timeout": ("timeout_s",)}
_FIELDS = {name: _RENAMED.get(name, (name,)) for name in TrainJob.model_fields if name not in _NOT_FIELDS}
"""The field of the job that each argument of `train_job` sets."""
_LARGEST = 3
_LINKS = 10
_SECRETS = 5


async def train_job(given: TrainJob, call: ToolCall) -> Json:
    """Submit a job, or say what submitting it would do."""
    spec, secrets, taken = with_wandb(await asyncio.to_thread(_spec_of, given, call.roots), os.environ)
    notes = [f"W&B from this server's environment: {short(', '.join(taken))}"] if taken else []
    notes += ["the W&B key of this server's environment is sent, for this job only"] if secrets else []
    async with call.client() as client:
        if given.dry_run:
            with _a_person_allows():
                return _would(await client.dry_run(spec, secrets=secrets, allow=call.allow), spec, notes)
        packed: list[PackReport] = []
        news = [ToolProgress(0, None, "packing the working directory")]

        def travels(what: str, done: int, total: int) -> None:
            news[0] = ToolProgress(done, total or None, what if what.startswith("gathering") else f"sending {what}")

        async with call.telling(lambda: news[0]):
            with _a_person_allows():
                answer = await client.submit(
                    spec,
                    request_id=given.request_id,
                    secrets=secrets,
                    allow=call.allow,
                    on_packed=lambda report, _size: packed.append(report),
                    on_progress=travels,
                )
    if not answer.created:
        notes = ["this request_id was already used for the same job; nothing new was submitted"]
    return {
        "job": job_facts(answer.job, now=time.time()),
        "created": answer.created,
        **without_empty(
            {
                "packed": _packed(packed[0], spec) if packed else None,
                "request_id": given.request_id,
                "notes": notes,
            }
        ),
        "next": next_for(answer.job),
    }


async def stop_job(given: StopJob, call: ToolCall) -> Json:
    """Ask a job to stop."""
    async with call.client() as client:
        job = await client.stop(given.job, grace_s=given.grace_s)
    return {
        "untrusted": UNTRUSTED_LIST,
        "job": job_row(job, now=time.time()),
        "cursor": job.cursor,
        "next": next_for(job),
    }


def _spec_of(given: TrainJob, roots: Roots) -> JobSpec:
    file = _job_file(given, roots)
    flags = _flags(given)
    if given.working_dir is not None or file is None:
        folder = _working_dir(given.working_dir, roots)
        flags.append(Flag("working_dir", ("working_dir",), folder))
    spec = job_spec_from_flags(flags, file=file)
    if not spec.working_dir:
        return spec
    quoted = file is None
    packed = roots.resolve(spec.working_dir, field="working_dir", quoted=quoted).path
    checked_working_dir(packed)
    if spec.environment.kind == "pip" and spec.environment.value:
        roots.resolve(spec.environment.value, field="environment", base=packed, quoted=quoted)
    return spec


def _working_dir(given: str | None, roots: Roots) -> str:
    if given is None:
        return roots.working_dir
    return str(roots.resolve(given, field="working_dir").path) if given else ""


def _job_file(given: TrainJob, roots: Roots) -> YamlFile | None:
    if given.job_file:
        named = roots.resolve(given.job_file, field="job_file")
        return parse_yaml(named.read_text(field="job_file"), named.path, quoted=False)
    if given.entrypoint is None and "entrypoint" not in (given.more or {}):
        msg = "nothing to run: neither entrypoint nor job_file was given"
        raise SpecError(msg, field="entrypoint", hint="pass entrypoint, for example 'python train.py', or job_file")
    return None


def _flags(given: TrainJob) -> list[Flag]:
    flags = []
    for key, value in (given.more or {}).items():
        if key == "working_dir" or (key in _FIELDS and getattr(given, key) not in (None, [])):
            msg = f"{key} is in `more`, but it is an argument of its own"
            raise SpecError(msg, field=key, hint=f"leave {key} out of `more`")
        flags.append(Flag("more", (key,), tuple(value) if isinstance(value, list) and key != "entrypoint" else value))
    for name, field in _FIELDS.items():
        value = getattr(given, name)
        if value not in (None, []):
            flags.append(Flag(name, field, tuple(value) if isinstance(value, list) else value))
    return flags


@contextlib.contextmanager
def _a_person_allows() -> Iterator[None]:
    """Say of what is withheld what an agent can do about it: it cannot allow it itself."""
    try:
        yield
    except WithheldError as error:
        variable = f"{ALLOW_VARIABLE}={':'.join(error.paths[:_SECRETS])}" if error.paths else f"{UPLOAD_VARIABLE}=5GB"
        hint = (
            "leave them out with lines in .raylaunchignore; a person sets values that the job needs with: raylaunch "
            f"secret set NAME. Only a person can allow it: they restart this server with {variable} in its environment"
        )
        raise WithheldError(error.message, hint=hint, paths=error.paths) from None


def _would(found: DryRun, spec: JobSpec, notes: list[str]) -> Json:
    return {
        "dry_run": True,
        "would_run": spec.display_name,
        "entrypoint": short(spec.command),
        **without_empty({"packed": _packed(found.pack, spec) if found.pack else None, "notes": notes}),
        "reported": without_empty(
            {
                "untrusted": UNTRUSTED_WORDS,
                "outcome": short(found.message or f"could run on {', '.join(found.fits)}"),
                "fits": [short(host, 63) for host in found.fits[:20]],
                "python": short(str(found.chosen or "")),
            }
        ),
        "next": "nothing was submitted; call train_job again without dry_run to submit it",
    }


def _packed(report: PackReport, spec: JobSpec) -> Json:
    return without_empty(
        {
            "working_dir": spec.working_dir,
            "files": report.files,
            "bytes": report.bytes,
            "left_out": report.ignored or None,
            "left_out_by": list(dict.fromkeys(_rules_of(rule) for rule in report.ignored_by))[:10],
            "largest": [f"{short(one.path, 100)} {one.bytes} B" for one in report.largest[:_LARGEST]],
            "links_out": [f"{short(one.path, 100)} -> {short(one.target, 100)}" for one in report.links[:_LINKS]],
        }
    )


def _rules_of(rule: str) -> str:
    """Return where a rule stands; the rule itself only where it is built in, for it may be a line of any file."""
    where, _, text = rule.partition(": ")
    return short(rule if where == "built in" else where, 100) if text else short(where, 100)
