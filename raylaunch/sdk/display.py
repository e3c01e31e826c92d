"""How jobs, metrics, clusters and the steps of ``up`` look: HTML in a notebook, a few lines in a terminal.

Everything that a job wrote is untrusted: it is escaped and shown as text.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING

from raylaunch.cluster.types import Step
from raylaunch.models.cluster import ControllerStatus
from raylaunch.models.job import JobView, MetricPoint, MetricSeries, MetricsPage, MetricsRun, format_metrics
from raylaunch.models.safe_text import clean, one_line
from raylaunch.models.states import JobState

if TYPE_CHECKING:
    import pandas as pd

_WIDTH, _HEIGHT = 300, 90
_LEFT, _TOP, _RIGHT, _BOTTOM = 4, 18, 4, 16


def curve_svg(series: MetricSeries) -> str:
    """Return a series as an SVG; points that are not finite are left out and counted in the title."""
    points = [point for point in series.points if math.isfinite(point.value) and math.isfinite(point.step)]
    if not points:
        return _framed(f"{series.key}: no finite value", "", "")
    low, high = min(point.value for point in points), max(point.value for point in points)
    places = _placed(points, low, high)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    end = f'<circle cx="{places[-1][0]:.1f}" cy="{places[-1][1]:.1f}" r="2.5" fill="#268bd2"/>'
    line = f'<polyline points="{path}" fill="none" stroke="#268bd2" stroke-width="1.5"/>{end}'
    left_out = len(series.points) - len(points)
    title = f"{series.key} {points[-1].value:.4g}" + (f" ({left_out} not finite)" if left_out else "")
    return _framed(title, f"{low:.4g} to {high:.4g}, step {points[0].step:g} to {points[-1].step:g}", line)


def _placed(points: list[MetricPoint], low: float, high: float) -> list[tuple[float, float]]:
    """Return the points' positions; works for all finite numbers, even if their difference overflows."""
    first, last = points[0].step, max(point.step for point in points)
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return [
        (
            _LEFT + _share(point.step, first, last) * across,
            _TOP + (1 - _share(point.value, low, high)) * down,
        )
        for point in points
    ]


def _share(value: float, low: float, high: float) -> float:
    span = high / 2 - low / 2
    return min(max((value / 2 - low / 2) / span, 0.0), 1.0) if span > 0 else 0.5


def _framed(title: str, below: str, inside: str) -> str:
    style = "font:11px system-ui,sans-serif;color:inherit;margin:2px"
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" style="{style}">'
        f"<title>{escape(clean(title, colour=False))}</title>"
        f'<text x="{_LEFT}" y="12" fill="currentColor">{escape(clean(title, colour=False))}</text>{inside}'
        f'<text x="{_LEFT}" y="{_HEIGHT - 3}" fill="currentColor" opacity=".65">{escape(below)}</text></svg>'
    )


_COLOURS = {
    JobState.HELD: "#b58900",
    JobState.QUEUED: "#b58900",
    JobState.STARTING: "#268bd2",
    JobState.RUNNING: "#268bd2",
    JobState.STOPPING: "#268bd2",
    JobState.SUCCEEDED: "#3a9a3a",
    JobState.FAILED: "#d33",
    JobState.STOPPED: "#888",
    JobState.TIMED_OUT: "#d33",
    JobState.LOST: "#d33",
}
_MARKS = {"begins": "…", "waits": "…", "done": "✓", "kept": "=", "note": "!"}
_NOTES_SHOWN = 8
_METRICS_SHOWN = 8
_METRICS_IN_LINE = 6
_LINES_SHOWN = 10
_MUTED = "opacity:.65"


def sentence(job: JobView) -> str:
    """Return why a job is in its state, on one line."""
    return one_line(job.why)


def loss_key(keys: Sequence[str]) -> str:
    """Return the metric to plot by default: the loss, else the first; "" if there is none.

    ``loss`` itself is preferred to the shortest name that contains the word, for example ``train/loss``.
    """
    losses = sorted((key for key in keys if "loss" in key.lower()), key=lambda key: (len(key), key))
    return losses[0] if losses else next(iter(keys), "")


@dataclass(frozen=True, repr=False)
class Card:
    """A snapshot of a job: state, progress, last metrics, and a curve. A notebook shows it as a small panel."""

    job: JobView
    curve: MetricSeries | None = None
    note: str = ""
    """Why this is not the latest state, if it is not."""

    def __repr__(self) -> str:
        return job_line(self.job)

    def _repr_html_(self) -> str:
        job = self.job
        parts = [
            _head(job),
            _muted(sentence(job)),
            _progress(job),
            _table(list(job.last_metrics.items())[:_METRICS_SHOWN]),
            curve_svg(self.curve) if self.curve else "",
            _lines(job.log_tail),
            _tracking(job),
            _muted(self.note),
        ]
        return _panel(parts)


@dataclass(frozen=True, repr=False)
class Metrics:
    """A job's metrics: last values, and curves thinned to a given number of points."""

    page: MetricsPage

    @property
    def last(self) -> dict[str, float]:
        """The last value of each metric."""
        return self.page.last

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of all metrics."""
        return self.page.keys

    @property
    def series(self) -> tuple[MetricSeries, ...]:
        """The requested curves, each with its points, oldest first."""
        return self.page.series

    @property
    def runs(self) -> tuple[MetricsRun, ...]:
        """The job's W&B runs, its own first; the keys of each other run start with its prefix."""
        return self.page.runs

    def to_pandas(self) -> pd.DataFrame:
        """Return the curves as a table: one row per step, one column per metric. `metrics_frame` has every point.

        Raises:
            RaylaunchError: pandas is not installed.
        """
        from raylaunch.sdk.dataframe import frame_of_series  # noqa: PLC0415 -- pandas takes half a second

        return frame_of_series(self.page.series)

    def __repr__(self) -> str:
        values = format_metrics(self.last, limit=_METRICS_IN_LINE)
        return f"<Metrics {values}>" if values else "<Metrics: nothing logged yet>"

    def _repr_html_(self) -> str:
        if not self.last:
            return _panel([_muted("nothing logged yet")])
        curves = "".join(curve_svg(series) for series in self.series[:_METRICS_SHOWN])
        return _panel([_table(list(self.last.items())), f'<div style="display:flex;flex-wrap:wrap">{curves}</div>'])


@dataclass(frozen=True, repr=False)
class Steps:
    """The state of a bring-up: the last step of each host, and notes. A notebook shows it as lines."""

    cluster: str
    last: dict[str, Step] = field(default_factory=dict)
    """By host; for a cluster on this machine by step."""
    notes: tuple[Step, ...] = ()

    def with_step(self, step: Step) -> Steps:
        """Return it with one more step."""
        if step.state == "note":
            return replace(self, notes=(*self.notes, step)[-_NOTES_SHOWN:])
        return replace(self, last={**self.last, step.name.partition(":")[0]: step})

    def __repr__(self) -> str:
        lines = [f"{_MARKS[step.state]} {step}" for step in (*self.last.values(), *self.notes)]
        return "\n".join([f"cluster {self.cluster}", *(clean(line, colour=False) for line in lines)])

    def _repr_html_(self) -> str:
        lines = [f"{_MARKS[step.state]} {_escaped(str(step))}" for step in self.last.values()]
        return _panel([f"<b>{_escaped(self.cluster)}</b>", *lines, *(_muted(f"! {note}") for note in self.notes)])


def job_line(job: JobView) -> str:
    """Return a job on one line, for example ``<Job digits-k3f9qa: running, step 7 of 30, loss 0.21>``."""
    parts = [job.state_text]
    if not job.state.active:
        parts += [sentence(job)] if job.state is not JobState.SUCCEEDED else []
    elif job.progress:
        parts.append(str(job.progress))
    parts.append(format_metrics(job.last_metrics, limit=3))
    return f"<Job {clean(job.id, colour=False)}: {', '.join(filter(None, parts))}>"


def cluster_line(name: str, status: ControllerStatus) -> str:
    """Return a cluster on one line."""
    return f"<Cluster {name}: {_summary(status)}>"


def cluster_html(name: str, status: ControllerStatus) -> str:
    """Return a cluster as a small panel: its nodes, their free GPUs, queued and running jobs."""
    nodes = [(node.hostname, f"{node.gpus_free:g} of {node.gpus:g} GPUs free") for node in status.nodes]
    rows = "".join(f"<tr><td>{_escaped(host)}</td><td>{_escaped(free)}</td></tr>" for host, free in nodes)
    parts = [f"<b>{_escaped(name)}</b> {_escaped(_summary(status))}", f"<table>{rows}</table>" if rows else ""]
    return _panel([*parts, *(_muted(problem) for problem in status.problems)])


def _summary(status: ControllerStatus) -> str:
    free, gpus = sum(node.gpus_free for node in status.nodes), sum(node.gpus for node in status.nodes)
    nodes = f"{len(status.nodes)} node{'' if len(status.nodes) == 1 else 's'}"
    return f"{nodes}, {free:g} of {gpus:g} GPUs free, {status.running} running, {status.queued} queued"


def _escaped(text: str) -> str:
    """Return text for HTML: names, reasons and messages come from jobs, hosts and other people."""
    return escape(clean(text, colour=False))


def _panel(parts: Iterable[str]) -> str:
    inside = "".join(f"<div>{part}</div>" for part in parts if part)
    return f'<div style="font-family:system-ui,sans-serif;line-height:1.5;max-width:42em">{inside}</div>'


def _head(job: JobView) -> str:
    dot = f'<span style="color:{_COLOURS[job.state]}">●</span>'
    return f"{dot} <b>{_escaped(job.id)}</b> {_escaped(job.state_text)}"


def _muted(text: str) -> str:
    return f'<span style="{_MUTED}">{_escaped(text)}</span>' if text else ""


def _progress(job: JobView) -> str:
    text = _escaped(str(job.progress or ""))
    if job.progress is None or not job.progress.total or not math.isfinite(job.progress.step):
        return text
    part = min(max(job.progress.step / job.progress.total, 0.0), 1.0)
    return f'<progress value="{part:.4f}" max="1"></progress> {text}'


def _table(items: Sequence[tuple[str, float]]) -> str:
    rows = "".join(f"<tr><td>{_escaped(key)}</td><td>{value:.6g}</td></tr>" for key, value in items)
    return f"<table>{rows}</table>" if rows else ""


def _lines(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    text = "\n".join(clean(line, colour=False) for line in lines[-_LINES_SHOWN:])
    return f'<pre style="font-size:.85em;white-space:pre-wrap">{escape(text)}</pre>'


def _tracking(job: JobView) -> str:
    if job.wandb is None or not job.wandb.url.startswith("https://"):
        return ""
    return f'<a href="{_escaped(job.wandb.url)}" target="_blank" rel="noopener noreferrer">Weights &amp; Biases</a>'


_log = logging.getLogger(__name__)

OnStep = Callable[[Step], None]
"""Called with each step when it starts, takes long, is done, or had nothing to do."""


def show_steps(cluster: str) -> OnStep:
    """Return a callback that shows a cluster's steps: live in a notebook, else in the log."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()  # IPython is not imported for this
    if getattr(shell, "kernel", None) is None:
        return _log_step
    handle = importlib.import_module("IPython.display").DisplayHandle()
    steps = Steps(cluster)

    def show(step: Step) -> None:
        nonlocal steps
        first, steps = not (steps.last or steps.notes), steps.with_step(step)
        (handle.display if first else handle.update)(steps)

    return show


def _log_step(step: Step) -> None:
    _log.info("%s", step)
