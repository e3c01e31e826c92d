"""``metrics``: last values, names, points as CSV, or a plot in the terminal."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import click

from raylaunch.cli.connect import as_json, job_argument, request
from raylaunch.cli.console import is_terminal, note, say_json, say_lines, table
from raylaunch.client.client import Client
from raylaunch.errors import NotFoundError
from raylaunch.models.job import MetricPoint, MetricSeries, MetricsPage
from raylaunch.models.safe_text import LogView, one_line

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800
_ROWS, _COLUMNS = 4, 2


def chart(series: MetricSeries, *, width: int = 72, height: int = 10) -> str:
    """Return a series as a chart of `width` characters, including axis and title.

    Points that are not finite are left out.
    """
    points = [point for point in series.points if math.isfinite(point.value) and math.isfinite(point.step)]
    title = f"{one_line(series.key)}  ({series.total:,} points)"
    if not points:
        return f"{title}\n  nothing to plot: no finite values"
    low, high = min(point.value for point in points), max(point.value for point in points)
    labels = [_short(high), *[""] * (height - 2), _short(low)]
    margin = max(len(label) for label in labels)
    rows = _canvas(points, low, high, max(8, width - margin - 3), height)
    lines = [f"{label:>{margin}} ┤{row}" for label, row in zip(labels, rows, strict=True)]
    first, last = f"step {_short(points[0].step)}", _short(points[-1].step)
    axis = f"{' ' * margin} └{first}{last.rjust(len(rows[0]) - len(first))}"
    ending = f"last {_short(points[-1].value)}, lowest {_short(low)}, highest {_short(high)}"
    return "\n".join([title, *lines, axis, f"{' ' * margin}  {ending}"])


def _short(value: float) -> str:
    return f"{value:.4g}"


def _canvas(points: Sequence[MetricPoint], low: float, high: float, width: int, height: int) -> list[str]:
    cells = [[0] * width for _ in range(height)]
    across, down = width * _COLUMNS - 1, height * _ROWS - 1
    start, stop = points[0].step, points[-1].step
    dots = [
        (
            round((point.step - start) / (stop - start) * across) if stop > start else 0,
            round((high - point.value) / (high - low) * down) if high > low else down // 2,
        )
        for point in points
    ]
    for (x0, y0), (x1, y1) in zip(dots, [*dots[1:], dots[-1]], strict=True):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(steps + 1):
            x, y = round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps)
            if 0 <= x <= across:
                cells[y // _ROWS][x // _COLUMNS] |= _DOTS[y % _ROWS][x % _COLUMNS]
    return ["".join(chr(_BLANK + cell) for cell in row) for row in cells]


_PLOTTED = 4
_RUNS_NAMED = 20


@click.command(epilog="Example:  raylaunch metrics last --key loss --plot")
@job_argument
@click.option("--key", "chosen", multiple=True, metavar="NAME", help="A metric; may be repeated.")
@click.option("--last", "form", flag_value="last", default=True, help="Last values (the default).")
@click.option("--keys", "form", flag_value="keys", help="Only the names.")
@click.option("--csv", "form", flag_value="csv", help="All points: step,at,key,value.")
@click.option("--plot", "form", flag_value="plot", help=f"Plot each --key, by default the first {_PLOTTED}.")
@click.option(
    "--points", type=click.IntRange(2, 10_000), default=500, show_default=True, help="Maximum number of points."
)
@as_json
@click.pass_obj
def metrics(  # noqa: PLR0913 -- each is one option
    cluster_file: Path | None, *, job: str, chosen: tuple[str, ...], form: str, points: int, as_json: bool
) -> None:
    """Show a job's metrics."""

    async def work(client: Client) -> None:
        if form == "csv":
            await _print_csv(client.metrics_csv(job, keys=chosen))
            return
        page = await client.metrics(job, keys=chosen, max_points=points)
        _check(chosen, page)
        if form == "plot" and not chosen:
            page = await client.metrics(job, keys=_worth_plotting(page), max_points=points)
        if as_json:
            say_json(page)
        else:
            _show(page, form=form, chosen=chosen)

    request(cluster_file, work)


async def _print_csv(chunks: AsyncIterator[bytes]) -> None:
    """Print CSV: unchanged to a file or pipe, sanitised on a terminal, because metric names are untrusted."""
    view = LogView(terminal=False, colour=False)
    terminal = is_terminal(sys.stdout)
    async for data in chunks:
        click.echo(view.feed(data) if terminal else data, nl=False)
    click.echo(view.finish(), nl=False)


def _check(chosen: tuple[str, ...], page: MetricsPage) -> None:
    for key in chosen:
        if key not in page.keys:
            msg = f"the job has no metric {key!r}"
            raise NotFoundError(msg, hint=f"it has: {', '.join(page.keys[:20])}" if page.keys else "no metrics yet")


def _worth_plotting(page: MetricsPage) -> list[str]:
    """Return the first metrics that are not W&B's own."""
    return [key for key in page.keys if not key.startswith("_")][:_PLOTTED]


def _show(page: MetricsPage, *, form: str, chosen: tuple[str, ...]) -> None:
    if not page.keys:
        note("No metrics yet; a job logs them with wandb.log() or raylaunch.report()")
    elif form == "keys":
        say_lines(page.keys)
    elif form == "plot":
        width = min(shutil.get_terminal_size((80, 24)).columns, 100)
        say_lines("\n\n".join(chart(series, width=width) for series in page.series).split("\n"))
    else:
        rows = [(key, _value(value)) for key, value in page.last.items() if not chosen or key in chosen]
        say_lines(table(("METRIC", "LAST"), rows))
        if page.last_step is not None:
            note(f"At step {page.last_step:g}")
        for run in [run for run in page.runs if run.prefix and run.name][:_RUNS_NAMED]:
            note(f"{run.prefix}… is run {run.name}")


def _value(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else str(value)
