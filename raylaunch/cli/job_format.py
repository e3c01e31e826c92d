"""Jobs as text, with colours, and as exit statuses. Pure functions."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping

from raylaunch.cli.console import count, size, span, styled, table
from raylaunch.client.environment_choice import active_python, import_hint
from raylaunch.models.job import AttemptView, DryRun, JobView, PackReport, format_metrics
from raylaunch.models.states import JobState

TIMED_OUT = 124
_METRICS_SHOWN = 8
_SIGNALLED = 128
_STYLES = {
    JobState.HELD: "yellow",
    JobState.QUEUED: "yellow",
    JobState.STARTING: "cyan",
    JobState.RUNNING: "cyan",
    JobState.STOPPING: "cyan",
    JobState.SUCCEEDED: "green",
    JobState.FAILED: "red",
    JobState.STOPPED: "dim",
    JobState.TIMED_OUT: "red",
    JobState.LOST: "red",
}


def exit_status(job: JobView) -> int:
    """Return the exit status for an ended job: its own, 128+N for signal N, or 124 if it timed out."""
    if job.state is JobState.SUCCEEDED:
        return 0
    if job.state is JobState.TIMED_OUT:
        return TIMED_OUT
    attempt = job.attempt
    if attempt and attempt.signal:
        return _SIGNALLED + _signal_number(attempt.signal)
    if attempt and attempt.exit_code:
        return attempt.exit_code & 0xFF or 1
    return _SIGNALLED + signal.SIGTERM if job.state is JobState.STOPPED else 1


def _signal_number(name: str) -> int:
    try:
        return int(signal.Signals[name])
    except KeyError:
        return int(signal.SIGKILL)


def format_state(job: JobView) -> str:
    """Return the state, coloured on a terminal."""
    return styled(job.state_text, _STYLES[job.state])


def jobs_table(jobs: tuple[JobView, ...], *, now: float) -> list[str]:
    """Return jobs as a table."""
    rows = [
        (
            job.id + (" (ray job)" if job.foreign else ""),
            job.state_text,
            job.owner or "-",
            str(job.spec.resources.gpus) if job.spec else "-",
            f"{span(now - job.created_at)} ago",
            _ran(job, now) or "-",
            job.why,
        )
        for job in jobs
    ]
    return table(("JOB", "STATE", "OWNER", "GPUS", "SUBMITTED", "RAN", "WHY"), rows, right=(3,))


def _ran(job: JobView, now: float) -> str:
    ran_s = job.ran_s(now)
    return "" if ran_s is None else span(ran_s)


def format_job(job: JobView, *, now: float) -> list[str]:
    """Return everything about a job, for people, one fact per line."""
    facts = [(title, words) for title, words in _facts(job, now) if words]
    width = max(len(title) for title, _ in facts)
    lines = [f"{title:<{width}}  {words}" for title, words in facts]
    lines += [_attempt_line(attempt, now) for attempt in job.attempts]
    return [*lines, *log_lines(job)]


def _facts(job: JobView, now: float) -> Iterator[tuple[str, str]]:
    yield "job", job.id + (" (submitted with plain ray job submit)" if job.foreign else "")
    yield "state", format_state(job)
    yield "why", job.why
    yield "owner", job.owner
    yield "command", job.entrypoint or (job.spec.command if job.spec else "")
    yield "resources", _resources(job)
    yield "launcher", _launcher(job)
    yield "submitted", f"{span(now - job.created_at)} ago"
    yield "ran" if job.state.ended else "running for", _ran(job, now)
    yield "progress", str(job.progress or "")
    yield "metrics", format_metrics(job.last_metrics, limit=_METRICS_SHOWN)
    yield "W&B", _wandb(job)
    yield "code", _code(job)
    yield "environment", str(job.chosen) if job.chosen else ""
    if job.environment:
        found = job.environment
        names = [f"torch {found.torch}" if found.torch else "", f"wandb {found.wandb}" if found.wandb else ""]
        where = f"({found.python})" if found.python else ""
        yield "python", " ".join(word for word in (found.version, where, *names) if word)
        yield "warnings", "; ".join(found.warnings)
    yield "outputs", f"{count(job.outputs, 'file')}, {size(job.output_bytes)}" if job.outputs else ""
    yield "tags", ", ".join(job.spec.tags) if job.spec else ""


def _resources(job: JobView) -> str:
    if job.spec is None:
        return ""
    wanted = job.spec.resources
    cpus = wanted.effective_cpus
    words = [count(wanted.gpus, "GPU") if wanted.gpus else "", f"{cpus:g} {'CPU' if cpus == 1 else 'CPUs'}"]
    words += [size(wanted.memory) if wanted.memory else "", *(f"{n:g} {name}" for name, n in wanted.custom.items())]
    return ", ".join(word for word in words if word)


def _launcher(job: JobView) -> str:
    if job.spec is None or job.spec.launcher == "script":
        return ""
    return f"{job.spec.launcher}, {count(job.spec.processes, 'rank')}" if job.spec.processes else job.spec.launcher


def _wandb(job: JobView) -> str:
    link = job.wandb
    if link is None:
        return ""
    why = f" ({link.why})" if link.why else ""
    if link.mode == "disabled":
        return f"off{why}"
    more = [f"{len(link.runs)} runs"] if len(link.runs) > 1 else []
    if link.staged_bytes:
        more.append(f"{size(link.staged_bytes)} of artifacts stored with the job, not uploaded yet")
    return "  ".join(filter(None, (f"{link.mode}{why}", link.url, ", ".join(more))))


def _code(job: JobView) -> str:
    words = []
    if job.pack:
        words.append(f"{count(job.pack.files, 'file')}, {size(job.pack.bytes)}")
    if job.git and job.git.commit:
        branch = f" on {job.git.branch}" if job.git.branch else ""
        words.append(f"commit {job.git.commit[:10]}{branch}{', with changes' if job.git.dirty else ''}")
    return "; ".join(words)


def _attempt_line(attempt: AttemptView, now: float) -> str:
    words = [f"attempt {attempt.n}", f"on {attempt.node}" if attempt.node else ""]
    words.append(f"GPUs {','.join(attempt.gpus)}" if attempt.gpus else "")
    words.append(f"{attempt.ranks} ranks (logs --rank 0 to {attempt.ranks - 1})" if attempt.ranks > 1 else "")
    if attempt.started_at:
        ran = span((attempt.ended_at or now) - attempt.started_at)
        words.append(f"ran {ran}" if attempt.ended_at else f"running for {ran}")
    words.append(attempt.signal or (f"exit code {attempt.exit_code}" if attempt.exit_code is not None else ""))
    words.append(attempt.message)
    return ", ".join(word for word in words if word)


def log_lines(job: JobView) -> list[str]:
    """Return the last lines of a job that is running or did not succeed, under a title; nothing for others."""
    if not job.log_tail:
        return []
    rank = job.attempt.failed_rank if job.attempt else None
    whose = f"rank {rank}'s" if rank else "its"
    return [f"last lines of {whose} log:", *(f"  │ {line}" for line in job.log_tail)]


def format_end(job: JobView) -> list[str]:
    """Return the lines for a job that has ended: state, why, last lines, metrics, and how to get its files."""
    failed = job.state is not JobState.SUCCEEDED
    lines = [f"{job.id} {format_state(job)}" + (f": {job.why}" if job.why and failed else "")]
    lines += log_lines(job)
    if job.last_metrics:
        metrics = format_metrics(job.last_metrics, limit=_METRICS_SHOWN)
        lines.append(f"metrics: {metrics}   (raylaunch metrics {job.id} --plot)")
    if job.outputs:
        lines.append(f"outputs: {count(job.outputs, 'file')}, {size(job.output_bytes)}   (raylaunch get {job.id})")
    if job.wandb and job.wandb.url:
        lines.append(f"W&B: {job.wandb.url}")
    elif job.wandb and job.wandb.mode == "offline" and job.last_metrics:
        lines.append(f"W&B: {_wandb(job)}")
    if job.environment:
        lines += [f"warning: {warning}" for warning in job.environment.warnings]
    return lines


def environment_hint(job: JobView, environ: Mapping[str, str]) -> list[str]:
    """Return a hint for a failed job that did not find a module which the active environment here has."""
    hint = import_hint(job, active_python(environ)) if job.log_tail else ""
    return [f"hint: {hint}"] if hint else []


def format_pack(report: PackReport, archive_bytes: int) -> list[str]:
    """Return what was packed, what was skipped by which rules, and the largest files."""
    lines = [f"Packed {count(report.files, 'file')} ({size(report.bytes)}, {size(archive_bytes)} compressed)"]
    if report.ignored:
        rules = "; ".join(report.ignored_by)
        lines.append(f"Skipped {count(report.ignored, 'file or folder', 'files and folders')} ({rules})")
    if report.largest and report.bytes:
        largest = ", ".join(f"{one.path} {size(one.bytes)}" for one in report.largest)
        lines.append(f"Largest: {largest}")
    if report.links:
        shown = ", ".join(f"{one.path} → {one.target}" for one in report.links)
        more = f" and {report.links_out - len(report.links)} more" if report.links_out > len(report.links) else ""
        lines.append(f"Links out of the folder, sent as links: {shown}{more}")
    return lines


def format_wandb(names: tuple[str, ...], *, key: bool) -> list[str]:
    """Return which of this environment's W&B settings are sent with a job."""
    lines = [f"W&B settings from this environment: {', '.join(names)}"] if names else []
    return [*lines, "Sending the W&B key of this environment (WANDB_API_KEY), for this job only"] if key else lines


def format_dry_run(found: DryRun) -> list[str]:
    """Return what a submission would send, with which environment, and where it would run."""
    sent = format_pack(found.pack, found.package_bytes) if found.pack else ["No files would be sent"]
    placed = found.message or f"Could run on: {', '.join(found.fits)}"
    return [*sent, *(one for one in (str(found.chosen or ""), placed) if one)]
