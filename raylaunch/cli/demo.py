"""``raylaunch demo``: the whole way once: a cluster, real training, its metrics, and the downloaded model."""

from __future__ import annotations

import asyncio
import importlib.util
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from raylaunch.cli.connect import ClusterCommand, finish
from raylaunch.cli.console import say_lines, shown_text, size
from raylaunch.cli.job_format import format_job
from raylaunch.cli.metrics import chart
from raylaunch.client.client import Client
from raylaunch.cluster.types import Step
from raylaunch.config.load import job_spec_from_flags
from raylaunch.errors import ClusterError, ConflictError, RaylaunchError
from raylaunch.models.fields import Environment
from raylaunch.models.job import JobView, MetricSeries, MetricsPage
from raylaunch.models.safe_text import clean_lines, one_line
from raylaunch.models.states import JobState

LIMIT_S = 20 * 60.0
_POLL_S = 0.2
_EVALUATE_LIMIT_S = 120.0
_EPOCHS_PER_LINE = 5
_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = ("loss", "accuracy")


@click.command(epilog="Example:  raylaunch demo --to /tmp/digits")
@click.option(
    "--to",
    "--dest",
    "dest",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("raylaunch-demo"),
    show_default=True,
    help="Folder for the model.",
)
@click.pass_obj
def demo(cluster_file: Path | None, dest: Path) -> None:
    """Start a cluster here, train on real data, download the model and use it."""
    folder = example_folder()
    if importlib.util.find_spec("sklearn") is None:
        msg = "the demo trains with scikit-learn, which is not installed here"
        raise RaylaunchError(msg, hint="pip install 'raylaunch[demo]'")
    console = Console(stderr=True, highlight=False)
    place = ClusterCommand(cluster_file, on_step=lambda step: say_step(console, step))
    finish(_demo(place, folder, dest, console))


def example_folder() -> Path:
    """Return the folder of the digits example, in the installed package or in the clone."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "demo" / "digits", package.parent / "examples" / "digits"):
        if (folder / "job.yaml").is_file():
            return folder
    msg = "the demo's training script is missing from this installation of raylaunch"
    raise RaylaunchError(msg, hint="install it again: pip install --force-reinstall 'raylaunch[demo]'")


async def _demo(place: ClusterCommand, folder: Path, dest: Path, console: Console) -> None:
    _heading(console, "A cluster", "Ray and raylaunch's controller on this machine, reachable only from here")
    await place.up()

    async with place.client() as client:
        _heading(console, "A job", f"train.py learns to read handwritten digits ({_shown(folder)})")
        spec = job_spec_from_flags((), file=folder / "job.yaml")
        if place.spec.kind == "local":  # scikit-learn is installed here; another environment may lack it
            current = Environment(kind="python", value=sys.executable)
            spec = spec.model_copy(update={"environment": current, "packages": ()})
        answer = await client.submit(spec)
        _say(console, one_line(f"  {answer.job.id}: {answer.job.entrypoint}"))

        _heading(console, "Training", "epochs, loss and accuracy, logged by the script with wandb")
        job = await _watch(client, answer.job, console)
        _check(job)

        metrics = await client.metrics(job.id, keys=_SHOWN)
        _heading(console, "Metrics", "read from the run's own W&B file, online or offline")
        for series in metrics.series:
            _say(console, textwrap.indent(chart(series, width=64, height=5), "  "))
        _heading(console, "Job details", f"raylaunch show {job.id}")
        for line in format_job(job, now=time.time()):
            _say(console, f"  {line}")

        _heading(console, "The model", f"from the cluster's store to {dest}")
        for fetched in await client.download(job.id, dest=dest, replace=True):
            _say(console, one_line(f"  {fetched.local}  {size(fetched.bytes)}"))

    _heading(console, "Using it", "evaluate.py loads it in a new process")
    output = await _evaluate(sys.executable, folder / "evaluate.py", dest)  # no program that the cluster names
    say_lines(output.split("\n"))
    _heading(console, "Next steps", "")
    _say(console, _next_steps())


def _heading(console: Console, title: str, what: str) -> None:
    console.print()
    what = one_line(what)
    console.print(Text.assemble((title, "bold"), "  " if what else "", (what, "dim")), soft_wrap=True)


def _say(console: Console, text: str) -> None:
    console.print(Text(shown_text(text)), soft_wrap=True)


def say_step(console: Console, step: Step) -> None:
    """Print a step of ``up``."""
    if step.state != "begins":
        _say(console, clean_lines(f"  {step}", indent="    "))


async def _watch(client: Client, job: JobView, console: Console) -> JobView:
    """Show a job's progress until it has ended; Ctrl-C detaches, and the job keeps running."""
    try:
        return await asyncio.wait_for(_follow(client, job, console), LIMIT_S)
    except asyncio.TimeoutError:
        msg = f"{job.id} has not ended after {LIMIT_S / 60:g} minutes; it keeps running"
        raise ClusterError(msg, hint=f"raylaunch follow {job.id}") from None
    except asyncio.CancelledError:
        _say(console, f"  Detached; {job.id} keeps running. Follow it again: raylaunch follow {job.id}")
        raise


async def _follow(client: Client, job: JobView, console: Console) -> JobView:
    printed = ""
    bar = Progress(TextColumn("  epoch"), BarColumn(40), MofNCompleteColumn(), console=console)
    task = bar.add_task("epochs", total=None)
    with Live(console=console, refresh_per_second=8, auto_refresh=console.is_terminal) as live:
        while True:
            job = await client.job(job.id)
            metrics = await client.metrics(job.id, keys=_SHOWN, max_points=60)
            total = job.progress.total if job.progress else None
            bar.update(task, completed=_epoch(metrics), total=None if total is None else int(total))
            if console.is_terminal:
                live.update(Group(bar, curves(metrics.series)) if metrics.last else Text(_state(job), style="dim"))
            elif (line := _line(job, metrics)) != printed:
                say_state(console, job, metrics)
                printed = line
            if job.state.ended:
                return job
            await asyncio.sleep(_POLL_S)


def say_state(console: Console, job: JobView, metrics: MetricsPage) -> None:
    """Print the progress of the training."""
    _say(console, _line(job, metrics))


def _epoch(metrics: MetricsPage) -> int:
    return int(metrics.last.get("epoch", 0))


def _state(job: JobView) -> str:
    return one_line(f"  {job.state.value}" + (f": {job.message}" if job.message else ""))


def _line(job: JobView, metrics: MetricsPage) -> str:
    """Return the progress on one line, for output without a terminal; it changes every few epochs."""
    passed = _epoch(metrics) // _EPOCHS_PER_LINE * _EPOCHS_PER_LINE
    if job.state.ended or not passed:
        return _state(job)
    at = {series.key: series.points[min(passed, len(series.points)) - 1].value for series in metrics.series}
    return f"  epoch {passed:>2}" + "".join(f"  {one_line(key)} {value:.4f}" for key, value in at.items())


def _check(job: JobView) -> None:
    if job.state is not JobState.SUCCEEDED:
        tail = "\n".join(f"    {line}" for line in job.log_tail)
        msg = f"{job.id} ended as {job.state.value}: {job.message}" + (f"\n{tail}" if tail else "")
        raise ConflictError(msg, hint=f"raylaunch logs {job.id}")


def sparkline(values: Sequence[float]) -> str:
    """Draw values as a row of small bars."""
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


def curves(series: Sequence[MetricSeries]) -> Text:
    """Return one line per metric: its name, its curve, its first and last value."""
    lines = []
    for one in series:
        values = [point.value for point in one.points]
        if values:
            lines.append(f"  {one_line(one.key):<9} {sparkline(values)}  {values[0]:.4f} → {values[-1]:.4f}")
    return Text("\n".join(lines))


async def _evaluate(python: str, program: Path, folder: Path) -> str:
    """Run the example's evaluate.py on the downloaded model, and return what it printed."""
    process = await asyncio.create_subprocess_exec(
        python,
        str(program),
        str(folder),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), _EVALUATE_LIMIT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        msg = f"the model in {folder} could not be used: {errors.decode(errors='replace').strip()[-2000:]}"
        raise RaylaunchError(msg, hint=f"try it by hand: {shlex.join([python, str(program), str(folder)])}")
    return output.decode().strip()


def _next_steps() -> str:
    activate = _shown(Path(sys.executable).with_name("activate"))
    on_path = shutil.which("raylaunch") is not None
    steps = (
        *(() if on_path else ((f"source {activate}", "once per shell, to find raylaunch and ray"),)),
        ("raylaunch list", "this job and all others"),
        ("raylaunch logs last", "the output of the training"),
        ("raylaunch metrics last --plot", "its curves"),
        ("raylaunch run -- python train.py", "your own script, from its folder"),
        ('eval "$(raylaunch env)" && ray job list', "Ray's own tools on the same cluster"),
        ("raylaunch down", "stop the cluster; jobs and files stay"),
    )
    return "\n".join(f"  {command:<40} {what}" for command, what in steps)


def _shown(path: Path) -> str:
    """Return a path relative to the current folder if possible."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
