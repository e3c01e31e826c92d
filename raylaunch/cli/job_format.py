"""Jobs in words and colours, and as exit statuses. Pure functions."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping

from raylaunch.cli.console import count, size, span, styled, table
from raylaunch.client.environment_choice import active_python, import_hint
from raylaunch.models.job import AttemptView, DryRun, JobView, PackReport
from raylaunch.models.states import JobState

TIMED_OUT = 124
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
    """Return what a shell should see of an ended job: its own status; 128+N for signal N; 124 when it timed out."""
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


def state_words(job: JobView) -> str:
    """Return the state, coloured on a terminal, with what stands beside it."""
    beside = " (unreachable)" if job.unreachable else ""
    return styled(job.state.value, _STYLES[job.state]) + beside


def sentence(job: JobView) -> str:
    """Return why a job stands where it stands."""
    return job.message or (job.reason.sentence if job.reason else "")


def jobs_table(jobs: tuple[JobView, ...], *, now: float) -> list[str]:
    """Return jobs as a table."""
    rows = [
        (
            job.id + (" (ray job)" if job.foreign else ""),
            job.state.value + (" (unreachable)" if job.unreachable else ""),
            job.owner or "-",
            str(job.spec.resources.gpus) if job.spec else "-",
            f"{span(now - job.created_at)} ago",
            _ran(job, now) or "-",
            sentence(job),
        )
        for job in jobs
    ]
    return table(("JOB", "STATE", "OWNER", "GPUS", "SUBMITTED", "RAN", "WHY"), rows, right=(3,))


def _ran(job: JobView, now: float) -> str:
    ran_s = job.ran_s(now)
    return "" if ran_s is None else span(ran_s)


def describe(job: JobView, *, now: float) -> list[str]:
    """Return everything about a job, for people, a line each."""
    facts = [(title, words) for title, words in _facts(job, now) if words]
    width = max(len(title) for title, _ in facts)
    lines = [f"{title:<{width}}  {words}" for title, words in facts]
    lines += [_attempt_line(attempt, now) for attempt in job.attempts]
    return [*lines, *log_lines(job)]


def _facts(job: JobView, now: float) -> Iterator[tuple[str, str]]:
    yield "job", job.id + (" (submitted with plain ray job submit)" if job.foreign else "")
    yield "state", state_words(job)
    yield "why", sentence(job)
    yield "owner", job.owner
    yield "runs", job.entrypoint or (job.spec.command if job.spec else "")
    yield "asks for", _asks(job)
    yield "launcher", _launcher(job)
    yield "submitted", f"{span(now - job.created_at)} ago"
    yield "ran", _ran(job, now)
    if job.progress:
        total = f" of {job.progress.total:g}" if job.progress.total else ""
        yield "progress", f"step {job.progress.step:g}{total}"
    yield "metrics", metrics_words(job.last_metrics)
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


def _asks(job: JobView) -> str:
    if job.spec is None:
        return ""
    asked = job.spec.resources
    words = [count(asked.gpus, "GPU") if asked.gpus else "", f"{asked.effective_cpus:g} CPU"]
    words += [size(asked.memory) if asked.memory else "", *(f"{n:g} {name}" for name, n in asked.custom.items())]
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
        more.append(f"{size(link.staged_bytes)} of artifacts kept with the job, not sent yet")
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
        words.append(f"ran {span((attempt.ended_at or now) - attempt.started_at)}")
    words.append(attempt.signal or (f"exit code {attempt.exit_code}" if attempt.exit_code is not None else ""))
    words.append(attempt.message)
    return ", ".join(word for word in words if word)


def log_lines(job: JobView) -> list[str]:
    """Return the last lines of a job that runs or did not succeed, under a title; nothing for others."""
    if not job.log_tail:
        return []
    rank = job.attempt.failed_rank if job.attempt else None
    whose = f"rank {rank}'s" if rank else "its"
    return [f"last lines of {whose} log:", *(f"  │ {line}" for line in job.log_tail)]


def metrics_words(last: dict[str, float], *, limit: int = 8) -> str:
    """Return the last values in one line."""
    shown = [f"{key} {value:.5g}" for key, value in list(last.items())[:limit]]
    more = [f"… {len(last) - limit} more"] if len(last) > limit else []
    return ", ".join([*shown, *more])


def final_facts(job: JobView) -> list[str]:
    """Return what to say when a job has ended: state, why, last lines, metrics, and how to get what it left."""
    why = sentence(job)
    lines = [f"{job.id} {state_words(job)}" + (f": {why}" if why and job.state is not JobState.SUCCEEDED else "")]
    lines += log_lines(job)
    if job.last_metrics:
        lines.append(f"metrics: {metrics_words(job.last_metrics)}   (raylaunch metrics {job.id} --plot)")
    if job.outputs:
        lines.append(f"outputs: {count(job.outputs, 'file')}, {size(job.output_bytes)}   (raylaunch get {job.id})")
    if job.wandb and job.wandb.url:
        lines.append(f"W&B: {job.wandb.url}")
    elif job.wandb and job.wandb.mode == "offline" and job.last_metrics:
        lines.append(f"W&B: {_wandb(job)}")
    if job.environment:
        lines += [f"warning: {warning}" for warning in job.environment.warnings]
    return lines


def environment_words(job: JobView, environ: Mapping[str, str]) -> list[str]:
    """Return what to do about a module that a failed job did not find, by what is active where this is asked."""
    hint = import_hint(job, active_python(environ)) if job.log_tail else ""
    return [f"hint: {hint}"] if hint else []


def pack_words(report: PackReport, archive_bytes: int) -> list[str]:
    """Return what was packed, what was left out by which rules, and the largest files."""
    lines = [f"packed {count(report.files, 'file')}, {size(report.bytes)} ({size(archive_bytes)} to send)"]
    if report.ignored:
        rules = "; ".join(report.ignored_by)
        what = count(report.ignored, "file or folder", "files and folders")
        lines.append(f"left out {what} ({rules})")
    if report.largest and report.bytes:
        largest = ", ".join(f"{one.path} {size(one.bytes)}" for one in report.largest)
        lines.append(f"largest: {largest}")
    if report.links:
        shown = ", ".join(f"{one.path} → {one.target}" for one in report.links)
        more = f" and {report.links_out - len(report.links)} more" if report.links_out > len(report.links) else ""
        lines.append(f"links that lead out of the folder, sent as links: {shown}{more}")
    return lines


def wandb_words(taken: tuple[str, ...], *, key: bool) -> list[str]:
    """Return what of the environment's W&B settings goes along with a job."""
    lines = [f"W&B from this environment: {', '.join(taken)}"] if taken else []
    return [*lines, "the W&B key of this environment (WANDB_API_KEY) goes along, for this job alone"] if key else lines


def dry_run_words(found: DryRun) -> list[str]:
    """Return what a submission would send, with which environment, and where it would run."""
    sent = pack_words(found.pack, found.package_bytes) if found.pack else ["no files would be sent"]
    placed = found.message or f"could run on: {', '.join(found.fits)}"
    return [*sent, *(one for one in (str(found.chosen or ""), placed) if one)]
