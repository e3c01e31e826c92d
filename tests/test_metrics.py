"""Metrics of a job over all its attempts, from files in the store."""

from __future__ import annotations

import itertools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.run_writer import framed, history, run, step_metric, summary, write_run
from support.store import job_view

from raylaunch.controller.metrics.reader import Measured, MetricsStore
from raylaunch.models.job import MetricSeries


def _attempt(store: Path, n: int = 1) -> Path:
    folder = store / "jobs" / "digits-k3f9qa" / f"attempt-{n}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _report(attempt: Path, *lines: dict[str, object]) -> None:
    with (attempt / "progress.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"at": 5.0, "step": None, "total": None, "metrics": {}, **line}) + "\n" for line in lines
        )


def _series(store: Path, key: str, *, attempts: int = 1, max_points: int = 500) -> MetricSeries:
    (series,) = MetricsStore(store).page(job_view(attempts=attempts), keys=[key], max_points=max_points).series
    return series


def _curve(store: Path, key: str, *, attempts: int = 1) -> list[tuple[float, float]]:
    return [(point.step, point.value) for point in _series(store, key, attempts=attempts).points]


def test_a_job_without_files_has_no_metrics(tmp_path: Path) -> None:
    page = MetricsStore(tmp_path).page(job_view(), keys=["loss"])
    assert (page.keys, page.last, page.last_step, page.series) == ((), {}, None, ())


def test_keys_last_values_and_the_points_asked_for(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path), [run(), *(history(n, {"loss": 1 / (n + 1), "acc": n}) for n in range(4))])
    page = MetricsStore(tmp_path).page(job_view(), keys=["loss", "unknown"])
    assert page.keys == ("acc", "loss")
    assert page.last == {"acc": 3.0, "loss": 0.25}
    assert page.last_step == 3
    (loss,) = page.series
    assert [(point.step, point.value, point.at) for point in loss.points][-1] == (3.0, 0.25, 1003.0)
    assert loss.total == 4


def test_rows_that_are_appended_later_are_seen_by_the_next_page(tmp_path: Path) -> None:
    rows = [history(n, {"loss": float(n)}) for n in range(5)]
    path = write_run(_attempt(tmp_path), rows[:2])
    metrics = MetricsStore(tmp_path)
    assert metrics.page(job_view()).last == {"loss": 1.0}
    path.write_bytes(framed(rows))
    assert metrics.page(job_view()).last == {"loss": 4.0}


def test_a_file_that_was_replaced_by_a_shorter_one_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = write_run(_attempt(tmp_path), [history(n, {"loss": float(n)}) for n in range(5)])
    metrics = MetricsStore(tmp_path)
    metrics.page(job_view())
    path.write_bytes(framed([history(0, {"loss": 9.0})]))
    page = metrics.page(job_view(), keys=["loss"])
    assert [point.value for point in page.series[0].points] == [9.0]


def test_many_points_are_thinned_evenly_with_first_and_last_and_their_total(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path), [history(n, {"loss": float(n)}) for n in range(20_001)])
    series = _series(tmp_path, "loss", max_points=101)
    steps = [point.step for point in series.points]
    assert series.total == 20_001
    assert (len(steps), steps[0], steps[-1]) == (101, 0, 20_000)
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert max(gaps) - min(gaps) <= 16


def test_the_exact_last_point_is_kept_however_many_there_are(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path), [history(n, {"loss": float(n)}) for n in range(4_098)])
    assert _series(tmp_path, "loss").points[-1].value == 4_097
    assert [point.value for point in _series(tmp_path, "loss", max_points=1).points] == [4_097]


def test_a_resumed_attempt_replaces_the_steps_that_it_draws_again(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path, 1), [history(n, {"loss": 1.0}) for n in range(10)])
    write_run(_attempt(tmp_path, 2), [history(n, {"loss": 2.0}) for n in range(6, 9)])
    assert _curve(tmp_path, "loss", attempts=2) == [*((n, 1.0) for n in range(6)), *((n, 2.0) for n in range(6, 9))]
    assert _series(tmp_path, "loss", attempts=2).total == 9


def test_an_attempt_that_begins_while_the_first_was_already_read_replaces_its_steps_too(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path, 1), [history(n, {"loss": 1.0}) for n in range(10)])
    metrics = MetricsStore(tmp_path)
    metrics.page(job_view(attempts=1), keys=["loss"])
    write_run(_attempt(tmp_path, 2), [history(6, {"loss": 2.0})])
    page = metrics.page(job_view(attempts=2), keys=["loss"])
    assert [point.step for point in page.series[0].points] == list(range(7))
    assert page.last == {"loss": 2.0}


def test_an_offline_attempt_that_counts_from_0_again_is_drawn_behind_the_earlier_one(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path, 1), [run(), *(history(n, {"loss": 1.0}) for n in range(3))])
    write_run(_attempt(tmp_path, 2), [run(), *(history(n, {"loss": 2.0}) for n in range(2))])
    assert _curve(tmp_path, "loss", attempts=2) == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    assert MetricsStore(tmp_path).page(job_view(attempts=2)).last_step == 4


def test_a_global_step_puts_a_resumed_offline_attempt_where_it_belongs(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path, 1), [history(n, {"loss": 1.0, "global_step": 10 * n}) for n in range(5)])
    write_run(_attempt(tmp_path, 2), [history(n, {"loss": 2.0, "global_step": 30 + 10 * n}) for n in range(3)])
    assert _curve(tmp_path, "loss", attempts=2) == [(0, 1.0), (10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0), (50, 2.0)]
    assert MetricsStore(tmp_path).page(job_view(attempts=2)).last_step == 50


def test_a_metric_is_drawn_over_its_step_metric_and_others_over_wandbs_step(tmp_path: Path) -> None:
    rows = [history(n, {"loss": 1.0, "epoch": n // 2, "val/acc": n / 10}) for n in range(4)]
    write_run(_attempt(tmp_path), [step_metric("val/*", "epoch"), *rows])
    assert [step for step, _ in _curve(tmp_path, "val/acc")] == [0, 0, 1, 1]
    assert [step for step, _ in _curve(tmp_path, "loss")] == [0, 1, 2, 3]


def test_a_row_without_its_step_metric_stands_at_the_last_value_of_it(tmp_path: Path) -> None:
    rows = [history(0, {"epoch": 7, "acc": 0.1}), history(1, {"acc": 0.2})]
    write_run(_attempt(tmp_path), [step_metric("acc", "epoch"), *rows])
    assert _curve(tmp_path, "acc") == [(7, 0.1), (7, 0.2)]


def test_a_second_run_of_the_attempt_stands_under_its_id(tmp_path: Path) -> None:
    attempt = _attempt(tmp_path)
    write_run(attempt, [history(0, {"loss": 1.0})], run_id="own")
    write_run(attempt, [run("other"), history(0, {"loss": 2.0})], run_id="other", started="20260101_120001")
    page = MetricsStore(tmp_path).page(job_view())
    assert page.last == {"loss": 1.0, "other/loss": 2.0}
    assert [(one.id, one.name, one.prefix) for one in page.runs] == [("own", "", ""), ("other", "brave-net", "other/")]


def test_two_files_of_one_run_in_one_attempt_are_one_curve(tmp_path: Path) -> None:
    attempt = _attempt(tmp_path)
    write_run(attempt, [history(0, {"loss": 1.0})])
    write_run(attempt, [history(0, {"loss": 2.0})], started="20260101_130000")
    assert _curve(tmp_path, "loss") == [(0, 1.0), (1, 2.0)]


def test_numbers_of_the_summary_are_last_values_but_the_rows_own_are_not_hidden_by_it(tmp_path: Path) -> None:
    records = [summary({"best": 0.5}), history(0, {"loss": 2.0}), summary({"best": 0.9, "loss": 7.0})]
    write_run(_attempt(tmp_path), records)
    page = MetricsStore(tmp_path).page(job_view())
    assert page.last == {"best": 0.9, "loss": 2.0}
    assert page.keys == ("loss",)


def test_nan_and_infinity_are_values(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path), [history(0, {"loss": math.nan}), history(1, {"loss": math.inf})])
    points = _series(tmp_path, "loss").points
    assert math.isnan(points[0].value)
    assert points[1].value == math.inf


def _rows(count: int, *, first: int = 0) -> list[bytes]:
    return [history(n, {"loss": n / 2}, at=1000.0) for n in range(first, first + count)]


def test_at_the_end_of_a_job_its_last_values_are_those_of_all_its_rows(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path), [run(), history(0, {"early": 7}), *_rows(50, first=1), summary({"best": 0.5})])
    _report(_attempt(tmp_path), {"step": 3, "total": 9, "metrics": {"seen": 5, "loss": 99}})
    last, progress, _ = MetricsStore(tmp_path).latest(job_view(), ran_s=1)
    assert last == MetricsStore(tmp_path).latest(job_view()).last
    assert last == {"best": 0.5, "early": 7.0, "loss": 25.0, "seen": 5.0}
    assert progress is not None
    assert (progress.step, progress.total) == (3, 9)


def test_of_a_job_that_logged_very_much_in_a_short_time_the_end_of_its_file_is_read(tmp_path: Path) -> None:
    rows = [run(), history(0, {"early": 7}), *_rows(20_000, first=1), summary({"best": 0.5})]
    path = write_run(_attempt(tmp_path), rows)
    _report(_attempt(tmp_path), {"step": 3, "metrics": {"seen": 5, "loss": 99}})
    assert path.stat().st_size > 600_000
    last, progress, _ = MetricsStore(tmp_path).latest(job_view(), ran_s=1)
    assert last == {"best": 0.5, "loss": 10_000.0, "seen": 5.0}
    assert progress is not None
    assert "early" in MetricsStore(tmp_path).page(job_view()).keys
    slow, _, _ = MetricsStore(tmp_path).latest(job_view(), ran_s=3600)
    assert slow == {**last, "early": 7.0}


def test_of_a_job_of_several_attempts_all_is_read(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path), [run(), history(0, {"early": 7}), *_rows(20_000, first=1)])
    write_run(_attempt(tmp_path, 2), [run(), history(20_001, {"loss": 1})], started="20260102_120000")
    last, _, _ = MetricsStore(tmp_path).latest(job_view(attempts=2), ran_s=1)
    assert last == {"early": 7.0, "loss": 1.0}


def test_a_file_that_is_not_wandbs_has_no_last_values(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path), [run()]).write_bytes(b"nonsense" * 100_000)
    assert MetricsStore(tmp_path).latest(job_view(), ran_s=1) == Measured({}, None)


def test_reports_are_metrics_and_progress(tmp_path: Path) -> None:
    _report(_attempt(tmp_path), {"step": 1, "total": 4, "metrics": {"loss": 0.5}}, {"step": 2, "total": 4})
    metrics = MetricsStore(tmp_path)
    assert metrics.page(job_view()).last == {"loss": 0.5}
    progress = metrics.latest(job_view()).progress
    assert progress is not None
    assert (progress.step, progress.total, progress.at) == (2.0, 4.0, 5.0)


def test_a_job_that_never_reported_has_no_progress(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path), [history(0, {"loss": 1.0})])
    assert MetricsStore(tmp_path).latest(job_view()).progress is None


def test_a_report_whose_line_is_half_written_waits_for_its_end(tmp_path: Path) -> None:
    attempt = _attempt(tmp_path)
    line = json.dumps({"at": 1.0, "step": 3, "total": None, "metrics": {"loss": 0.5}}) + "\n"
    metrics = MetricsStore(tmp_path)
    (attempt / "progress.jsonl").write_text(line[:20])
    assert metrics.page(job_view()).last == {}
    (attempt / "progress.jsonl").write_text(line)
    assert metrics.page(job_view()).last == {"loss": 0.5}


def test_a_broken_report_line_is_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempt = _attempt(tmp_path)
    (attempt / "progress.jsonl").write_text("[1]\n{nonsense\n")
    _report(attempt, {"step": 1, "metrics": {"loss": 0.5}})
    metrics = MetricsStore(tmp_path)
    assert metrics.page(job_view()).last == {"loss": 0.5}
    assert metrics.page(job_view()).last == {"loss": 0.5}
    (message,) = caplog.messages
    assert "progress.jsonl: 2 parts" in message


def test_a_metric_that_is_reported_and_logged_is_wandbs(tmp_path: Path) -> None:
    attempt = _attempt(tmp_path)
    write_run(attempt, [history(0, {"loss": 1.0})])
    _report(attempt, {"step": 70, "metrics": {"loss": 7.0, "extra": 3.0}})
    page = MetricsStore(tmp_path).page(job_view(), keys=["loss"])
    assert page.last == {"extra": 3.0, "loss": 1.0}
    assert page.last_step == 0
    assert [point.value for point in page.series[0].points] == [1.0]
    assert "7" not in "".join(MetricsStore(tmp_path).csv(job_view(), keys=["loss"]))


def test_a_file_that_is_not_wandbs_is_logged_and_hides_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = _attempt(tmp_path)
    write_run(attempt, [history(0, {"loss": 1.0})])
    write_run(attempt, [], run_id="bad", started="20260101_130000").write_bytes(b"not a run")
    metrics = MetricsStore(tmp_path)
    assert metrics.page(job_view()).last == {"loss": 1.0}
    assert metrics.page(job_view()).last == {"loss": 1.0}
    (message,) = caplog.messages
    assert "is not a W&B file" in message


def test_csv_has_every_point_with_keys_quoted_but_no_superseded_ones(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path, 1), [history(n, {'a,"b"': 0.5, "loss": 1.0}) for n in range(3)])
    write_run(_attempt(tmp_path, 2), [history(2, {"loss": math.nan})])
    text = "".join(MetricsStore(tmp_path).csv(job_view(attempts=2)))
    assert sorted(text.splitlines()) == sorted(
        [
            "step,at,key,value",
            '0,1000.0,"a,""b""",0.5',
            '1,1001.0,"a,""b""",0.5',
            "0,1000.0,loss,1",
            "1,1001.0,loss,1",
            "2,1002.0,loss,nan",
        ]
    )


def test_csv_of_many_points_comes_in_pieces_and_is_complete(tmp_path: Path) -> None:
    write_run(_attempt(tmp_path), [history(n, {"loss": float(n), "acc": 0.0}) for n in range(10_000)])
    pieces = list(MetricsStore(tmp_path).csv(job_view(), keys=["loss"]))
    lines = "".join(pieces).splitlines()
    assert len(pieces) > 1
    assert (len(lines), lines[0], lines[-1]) == (10_001, "step,at,key,value", "9999,10999.0,loss,9999")


def test_what_is_held_of_a_job_is_dropped_after_many_others_were_asked_for(tmp_path: Path) -> None:
    metrics = MetricsStore(tmp_path)
    files = [write_run(tmp_path / "jobs" / f"j{n}" / "attempt-1", [history(0, {"loss": float(n)})]) for n in range(40)]
    assert [metrics.latest(job_view(f"j{n}")).last["loss"] for n in range(40)] == list(range(40))
    for path in files:
        path.unlink()
    assert metrics.latest(job_view("j39")).last == {"loss": 39.0}
    assert metrics.latest(job_view("j0")).last == {}


def test_a_job_whose_file_takes_long_to_read_keeps_no_other_job_waiting(tmp_path: Path) -> None:
    slow = tmp_path / "jobs" / "slow-k3f9qa" / "attempt-1"
    slow.mkdir(parents=True)
    os.mkfifo(slow / "progress.jsonl")  # opening it waits for somebody who writes
    write_run(_attempt(tmp_path), [run(), history(0, {"loss": 0.5})])
    metrics = MetricsStore(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        waits = pool.submit(metrics.latest, job_view("slow-k3f9qa"))
        try:
            assert pool.submit(metrics.latest, job_view()).result(60).last == {"loss": 0.5}
            assert not waits.done()
        finally:
            with (slow / "progress.jsonl").open("w"):
                waits.result(60)
