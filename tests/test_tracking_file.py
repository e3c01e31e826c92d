"""A ``.wandb`` file read while it grows, torn and damaged."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.run_writer import BLOCK, PREAMBLE, ended, framed, history, run, step_metric, summary, write_run
from wandb.proto import wandb_internal_pb2 as pb

from raylaunch.errors import TrackingError
from raylaunch.runner.wandb_env import has_history
from raylaunch.tracking.frames import Frames
from raylaunch.tracking.run_file import History, RunExit, RunFile, RunInfo, StepMetric, Summary

DATA = Path(__file__).parent / "data"


def _rows(reader: RunFile) -> list[History]:
    return [item for item in reader.stream() if isinstance(item, History)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(st.binary(min_size=1, max_size=40), st.integers(1, 3 * BLOCK).map(lambda n: b"x" * n)), max_size=12
    )
)
def test_what_was_framed_is_read_back(records: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.wandb")
        path.write_bytes(framed(records))
        assert list(Frames(path).read()) == records


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 2 * BLOCK).map(lambda n: bytes([n % 251]) * n), min_size=1, max_size=8),
    st.lists(st.integers(0, 10 * BLOCK), max_size=12),
)
def test_however_a_file_grows_its_records_come_once_and_in_order(records: list[bytes], stops: list[int]) -> None:
    whole = framed(records)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.wandb")
        frames, found = Frames(path), []
        for stop in [*sorted(stops), len(whole)]:
            path.write_bytes(whole[:stop])
            found += list(frames.read())
        assert found == records
        assert frames.skipped == 0


def test_a_file_cut_at_any_byte_gives_its_complete_records_and_later_the_rest(tmp_path: Path) -> None:
    rows = [history(step, {"loss": step / 2}) for step in range(6)]
    whole = framed(rows)
    ends = [len(framed(rows[:count])) for count in range(len(rows) + 1)]
    path = tmp_path / "run-r1.wandb"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        reader = RunFile(path)
        early = _rows(reader)
        assert len(early) == max(0, sum(end <= cut for end in ends) - 1), cut
        path.write_bytes(whole)
        assert [row.step for row in early + _rows(reader)] == list(range(6)), cut
        assert reader.skipped == 0, cut


def test_a_record_over_several_blocks_cut_inside_each_of_them_is_read_once(tmp_path: Path) -> None:
    big, small = b"a" * (3 * BLOCK), b"b"
    whole = framed([big, small])
    path = tmp_path / "run-r1.wandb"
    for cut in range(0, len(whole), 997):
        path.write_bytes(whole[:cut])
        frames = Frames(path)
        early = list(frames.read())
        path.write_bytes(whole)
        assert early + list(frames.read()) == [big, small]


def test_a_file_that_does_not_exist_yet_has_no_records(tmp_path: Path) -> None:
    assert list(RunFile(tmp_path / "run-r1.wandb").stream()) == []


def test_a_damaged_block_is_skipped_and_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    whole = bytearray(framed([history(step, {"loss": 1.0}) for step in range(2000)]))
    assert len(whole) > 3 * BLOCK
    whole[BLOCK + 200] ^= 0xFF
    path = tmp_path / "run-r1.wandb"
    path.write_bytes(whole)
    reader = RunFile(path)
    steps = [row.step for row in _rows(reader)]
    assert (steps[0], steps[-1]) == (0, 1999)
    assert 1000 < len(steps) < 2000
    assert reader.skipped == 1


def test_damage_at_the_end_waits_for_the_rest_of_its_block(tmp_path: Path) -> None:
    rows = [history(step, {"loss": 1.0}) for step in range(2000)]
    whole = framed(rows)
    path = tmp_path / "run-r1.wandb"
    torn = bytearray(whole[:600])
    torn[-100:] = bytes(100)
    path.write_bytes(torn)
    reader = RunFile(path)
    early = len(_rows(reader))
    assert reader.skipped == 0
    path.write_bytes(whole)
    assert early + len(_rows(reader)) == 2000
    assert reader.skipped == 0


def test_a_file_that_is_not_wandbs_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run-r1.wandb"
    path.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(TrackingError, match=r"run-r1\.wandb is not a W&B file"):
        list(RunFile(path).stream())


def test_a_file_of_a_later_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "run-r1.wandb"
    path.write_bytes(PREAMBLE[:-1] + b"\x01")
    with pytest.raises(TrackingError, match="file format 1, this raylaunch knows 0"):
        list(RunFile(path).stream())


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "run-r1.wandb"
    path.write_bytes(framed([history(0, {"a": 1})]))
    reader = RunFile(path)
    list(reader.stream())
    path.write_bytes(PREAMBLE)
    with pytest.raises(TrackingError, match="became shorter"):
        list(reader.stream())


def test_a_row_has_its_numbers_under_dotted_keys_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run-r1.wandb"
    values = {
        "a": 1,
        "b.c": -2.5e-3,
        "text": "7",
        "flag": True,
        "none": None,
        "list": [1],
        "nan": math.nan,
        "inf": -math.inf,
    }
    image = {"img._type": "image-file", "img.width": 64, "image_count": 2}
    path.write_bytes(framed([history(4, {**values, **image})]))
    (row,) = _rows(RunFile(path))
    assert math.isnan(row.values.pop("nan"))
    assert row == History(4, 1004.0, {"a": 1.0, "b.c": -0.0025, "inf": -math.inf, "image_count": 2.0})


def test_a_text_that_holds_the_bytes_of_a_fields_tag_is_still_a_text(tmp_path: Path) -> None:
    record = pb.Record()
    record.history.item.add(nested_key=["tricky"], value_json='"\u0082\x01\x027"')
    record.history.item.add(nested_key=["a"], value_json="7")
    record.history.item.add(nested_key=["typed"], number=2.5)
    record.history.item.add(nested_key=["whole"], integer=-3)
    path = tmp_path / "run-r1.wandb"
    path.write_bytes(framed([record.SerializeToString()]))
    (row,) = _rows(RunFile(path))
    assert row.values == {"a": 7.0, "typed": 2.5, "whole": -3.0}


def test_a_field_that_a_later_wandb_adds_to_an_item_is_ignored(tmp_path: Path) -> None:
    item = b"\x12\x01a" + b"\x82\x01\x017" + b"\x8a\x01\x03new"
    path = tmp_path / "run-r1.wandb"
    path.write_bytes(framed([b"\x12" + bytes([len(item) + 2]) + b"\x0a" + bytes([len(item)]) + item]))
    (row,) = _rows(RunFile(path))
    assert row.values == {"a": 7.0}


def test_run_step_metrics_summary_and_exit_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run-r1.wandb"
    records = [run(starting_step=12), step_metric("val/*", "epoch"), summary({"best": 3, "_runtime": 1}), ended(-9)]
    path.write_bytes(framed(records))
    assert list(RunFile(path).stream()) == [
        RunInfo("r1", "digits", "brave-net", 12),
        StepMetric("val/*", "epoch"),
        Summary({"best": 3.0}),
        RunExit(-9),
    ]


def test_a_record_that_cannot_be_parsed_is_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "run-r1.wandb"
    path.write_bytes(framed([b"\xff\xff\xff", history(0, {"a": 1})]))
    reader = RunFile(path)
    assert len(_rows(reader)) == 1
    assert reader.skipped == 1


def test_a_file_by_wandb_0_28_is_read() -> None:
    items = list(RunFile(DATA / "wandb-0.28.2.wandb").stream())
    rows = [item for item in items if isinstance(item, History)]
    assert [row.step for row in rows] == list(range(21))
    assert rows[3].values == {"loss": 0.25, "train.lr": pytest.approx(0.3), "epoch": 0.0}
    assert rows[20].values["worse"] == -math.inf
    assert StepMetric("val/*", "epoch") in items
    assert Summary({"best": 0.9}) in items
    assert items[-1] == RunExit(3)


def test_the_runner_finds_out_whether_a_run_has_a_row(tmp_path: Path) -> None:
    rows = {
        "none": [run()],
        "one": [run(), history(0, {"loss": 1.0})],
        "unreadable": [b"\x0b"],
    }
    found = {name: has_history(write_run(tmp_path / name, records)) for name, records in rows.items()}
    assert found == {"none": False, "one": True, "unreadable": False}


def test_a_file_that_is_not_wandbs_has_no_row(tmp_path: Path) -> None:
    (tmp_path / "x.wandb").write_bytes(b"something else")
    assert not has_history(tmp_path / "x.wandb")
    assert not has_history(tmp_path / "missing.wandb")
