"""What a notebook shows: pure functions over views, and hostile words in them."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from support.hostile import HOSTILE as EVERY_KIND
from support.hostile import bad_in, model

from raylaunch.models.cluster import ControllerStatus, NodeView
from raylaunch.models.job import JobView, MetricPoint, MetricSeries, MetricsPage, Progress, WandbLink
from raylaunch.models.states import JobState
from raylaunch.sdk.dataframe import LONGEST, LineReader
from raylaunch.sdk.display import Card, Metrics, cluster_html, cluster_line, curve_svg, job_line, loss_key

HOSTILE = "<script>alert('x')</script>\x1b[31m&\u202e"


class Tags(HTMLParser):
    """Notes every tag and every attribute's name."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen |= {tag, *(name for name, _ in attrs)}

    def handle_data(self, data: str) -> None:
        self.text += data


def job(state: JobState = JobState.RUNNING, **facts: object) -> JobView:
    base = {"id": "digits-k3f9qa", "name": "digits", "owner": "ana", "created_at": 1.0, "updated_at": 1.0}
    return JobView.model_validate({**base, "state": state, **facts})


def curve(*values: float, key: str = "loss") -> MetricSeries:
    points = tuple(MetricPoint(step=n, value=value, at=n) for n, value in enumerate(values))
    return MetricSeries(key=key, points=points, total=len(points))


def test_a_card_shows_state_progress_last_metrics_and_the_curve() -> None:
    view = job(progress=Progress(step=15, total=30, at=1.0), last_metrics={"loss": 0.25, "accuracy": 0.5})
    html = Card(view, curve=curve(2, 1, 0.25))._repr_html_()
    assert 'value="0.5000"' in html
    for words in ("digits-k3f9qa", "running", "step 15 of 30", "loss", "0.25", "accuracy", "<polyline"):
        assert words in html


def test_words_of_a_job_are_text_and_never_markup() -> None:
    link = WandbLink(mode="online", run_id="r", project="p", url="javascript:alert(1)")
    view = job(
        JobState.FAILED, message=HOSTILE, last_metrics={HOSTILE: 1.0}, log_tail=(HOSTILE,), wandb=link, name="digits"
    )
    html = Card(view, curve=curve(1, 2, key=HOSTILE), note=HOSTILE)._repr_html_()
    tags = Tags(html)
    assert not tags.seen & {"script", "a", "href", "onload"}
    assert "<script>alert('x')</script>&" in tags.text
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_a_link_to_wandb_is_shown() -> None:
    link = WandbLink(mode="online", run_id="r", project="p", url="https://wandb.example/r")
    assert 'href="https://wandb.example/r"' in Card(job(wandb=link))._repr_html_()


@pytest.mark.parametrize(
    ("view", "line"),
    [
        (
            job(progress=Progress(step=7, total=30, at=1.0), last_metrics={"loss": 0.21}),
            "<Job digits-k3f9qa: running, step 7 of 30, loss 0.21>",
        ),
        (
            job(JobState.QUEUED, message="needs 2 GPUs; dgx has 1 free"),
            "<Job digits-k3f9qa: queued, needs 2 GPUs; dgx has 1 free>",
        ),
        (job(JobState.RUNNING, unreachable=True), "<Job digits-k3f9qa: running (unreachable)>"),
        (job(JobState.SUCCEEDED, message="it ended"), "<Job digits-k3f9qa: succeeded>"),
        (job(JobState.FAILED, message="status 7\x1b[2J\nmore"), "<Job digits-k3f9qa: failed, status 7 more>"),
    ],
)
def test_a_terminal_shows_a_job_in_a_line(view: JobView, line: str) -> None:
    assert job_line(view) == line


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [
        (("accuracy", "loss", "val/loss"), "loss"),
        (("accuracy", "validation/loss", "train/Loss"), "train/Loss"),
        (("accuracy", "epoch"), "accuracy"),
        ((), ""),
    ],
)
def test_the_loss_is_drawn_where_nobody_chose(keys: tuple[str, ...], chosen: str) -> None:
    assert loss_key(keys) == chosen


@pytest.mark.parametrize(
    "values",
    [(1.0,), (1.0, 1.0), (1.0, math.nan, 3.0, math.inf), (1.7e308, -1.7e308), (1e-320, 0.0), (math.nan,), ()],
)
def test_every_curve_is_well_formed_and_inside_its_frame(values: tuple[float, ...]) -> None:
    svg = ET.fromstring(curve_svg(curve(*values)))  # noqa: S314 -- our own
    for line in svg.iter("polyline"):
        for place in line.attrib["points"].split():
            x, y = map(float, place.split(","))
            assert 0 <= x <= 300
            assert 0 <= y <= 90


def test_points_that_are_not_finite_are_said() -> None:
    assert "loss 3 (2 not finite)" in curve_svg(curve(1.0, math.nan, math.inf, 3.0))


def test_metrics_are_a_table_of_last_values_and_a_curve_each() -> None:
    page = MetricsPage(keys=("acc", "loss"), last={"acc": 0.5, "loss": 1.0}, series=(curve(2, 1), curve(1, key="acc")))
    metrics = Metrics(page)
    assert metrics._repr_html_().count("<svg") == 2
    assert repr(metrics) == "<Metrics acc 0.5, loss 1>"


def test_a_cluster_shows_its_nodes_and_what_is_free() -> None:
    node = NodeView(id="n", hostname="<dgx>", address="10.0.0.1", alive=True, gpus=8, gpus_free=3)
    status = ControllerStatus(
        cluster="lab", version="1", api=1, pid=1, person="ana", role="admin", started_at=1, ray="up", nodes=(node,)
    )
    assert cluster_line("lab", status) == "<Cluster lab: 1 node, 3 of 8 GPUs free, 0 running, 0 queued>"
    assert "<td>&lt;dgx&gt;</td><td>3 of 8 GPUs free</td>" in cluster_html("lab", status)


def test_lines_come_whole_and_a_line_without_end_is_not_held_for_ever() -> None:
    lines = LineReader()
    assert lines.feed(b"one\r\nt") == ["one"]
    assert lines.feed(b"wo\n") == ["two"]
    assert lines.feed(b"x" * (LONGEST + 1)) == ["x" * (LONGEST + 1)]
    assert lines.feed("ü".encode()[:1]) == []
    assert lines.finish() == ["�"]
    assert lines.finish() == []


def test_no_field_of_what_a_notebook_shows_is_markup_or_hidden() -> None:
    script = "<script>" + EVERY_KIND
    status = model(ControllerStatus)
    nodes = tuple(node.model_copy(update={"hostname": script}) for node in status.nodes)
    job = model(JobView, id=script, message=script, state="failed", attempts=[])
    for html in (Card(job)._repr_html_(), cluster_html(script, status.model_copy(update={"nodes": nodes}))):
        assert "<script>" not in html
        assert not bad_in(html)
