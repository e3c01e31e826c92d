"""``raylaunch demo``: the whole way once: a cluster, real training, its metrics, and the downloaded model."""

from __future__ import annotations

import asyncio
import importlib.util
import shlex
import shutil
import sys
import textwrap
import time
from pathlib import Path

import click

from raylaunch.cli.connect import ClusterCommand, finish
from raylaunch.cli.console import note, note_lines, say_lines, size, styled
from raylaunch.cli.job_format import format_job
from raylaunch.cli.metrics import chart
from raylaunch.client.client import Client
from raylaunch.config.load import job_spec_from_flags
from raylaunch.errors import ClusterError, ConflictError, RaylaunchError
from raylaunch.models.fields import Environment
from raylaunch.models.job import JobView, MetricsPage
from raylaunch.models.states import JobState

LIMIT_S = 20 * 60.0
_POLL_S = 0.2
_EVALUATE_LIMIT_S = 120.0
_EPOCHS_PER_LINE = 5
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
    finish(_demo(ClusterCommand(cluster_file), folder, dest))


def example_folder() -> Path:
    """Return the folder of the digits example, in the installed package or in the clone."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "demo" / "digits", package.parent / "examples" / "digits"):
        if (folder / "job.yaml").is_file():
            return folder
    msg = "the demo's training script is missing from this installation of raylaunch"
    raise RaylaunchError(msg, hint="install it again: pip install --force-reinstall 'raylaunch[demo]'")


async def _demo(place: ClusterCommand, folder: Path, dest: Path) -> None:
    _heading("A cluster", "Ray and raylaunch's controller on this machine, reachable only from here")
    await place.up()

    async with place.client() as client:
        _heading("A job", f"train.py learns to read handwritten digits ({_shown(folder)})")
        spec = job_spec_from_flags((), file=folder / "job.yaml")
        if place.spec.kind == "local":  # scikit-learn is installed here; another environment may lack it
            current = Environment(kind="python", value=sys.executable)
            spec = spec.model_copy(update={"environment": current, "packages": ()})
        answer = await client.submit(spec)
        note(f"  {answer.job.id}: {answer.job.entrypoint}")

        _heading("Training", "epochs, loss and accuracy, logged by the script with wandb")
        job = await _watch(client, answer.job)
        _check(job)

        metrics = await client.metrics(job.id, keys=_SHOWN)
        _heading("Metrics", "read from the run's own W&B file, online or offline")
        for series in metrics.series:
            note_lines(textwrap.indent(chart(series, width=64, height=5), "  "), indent="")
        _heading("Job details", f"raylaunch show {job.id}")
        for line in format_job(job, now=time.time()):
            note(f"  {line}")

        _heading("The model", f"from the cluster's store to {dest}")
        for fetched in await client.download(job.id, dest=dest, replace=True):
            note(f"  {fetched.local}  {size(fetched.bytes)}")

    _heading("Using it", "evaluate.py loads it in a new process")
    output = await _evaluate(sys.executable, folder / "evaluate.py", dest)  # no program that the cluster names
    say_lines(output.split("\n"))
    _heading("Next steps", "")
    note_lines(_next_steps(), indent="")


def _heading(title: str, what: str) -> None:
    note("")
    note(styled(title, "bold", sys.stderr) + (f"  {styled(what, 'dim', sys.stderr)}" if what else ""))


async def _watch(client: Client, job: JobView) -> JobView:
    """Show a job's progress until it has ended; Ctrl-C detaches, and the job keeps running."""
    try:
        return await asyncio.wait_for(_follow(client, job), LIMIT_S)
    except asyncio.TimeoutError:
        msg = f"{job.id} has not ended after {LIMIT_S / 60:g} minutes; it keeps running"
        raise ClusterError(msg, hint=f"raylaunch follow {job.id}") from None
    except asyncio.CancelledError:
        note(f"  Detached; {job.id} keeps running. Follow it again: raylaunch follow {job.id}")
        raise


async def _follow(client: Client, job: JobView) -> JobView:
    printed = ""
    while True:
        job = await client.job(job.id)
        line = progress_line(job, await client.metrics(job.id, keys=_SHOWN, max_points=60))
        if line != printed:
            note(line)
            printed = line
        if job.state.ended:
            return job
        await asyncio.sleep(_POLL_S)


def progress_line(job: JobView, metrics: MetricsPage) -> str:
    """Return the progress of the training on one line, which changes every few epochs."""
    passed = int(metrics.last.get("epoch", 0)) // _EPOCHS_PER_LINE * _EPOCHS_PER_LINE
    if job.state.ended or not passed:
        return f"  {job.state.value}" + (f": {job.message}" if job.message else "")
    at = {series.key: series.points[min(passed, len(series.points)) - 1].value for series in metrics.series}
    return f"  epoch {passed:>2}" + "".join(f"  {key} {value:.4f}" for key, value in at.items())


def _check(job: JobView) -> None:
    if job.state is not JobState.SUCCEEDED:
        tail = "\n".join(f"    {line}" for line in job.log_tail)
        msg = f"{job.id} ended as {job.state.value}: {job.message}" + (f"\n{tail}" if tail else "")
        raise ConflictError(msg, hint=f"raylaunch logs {job.id}")


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
