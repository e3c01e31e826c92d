"""What bounds the answers of the MCP server, and what reads its arguments: pure functions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_server import arguments, render
from mcp_server.arguments import DownloadModel, MonitorJob, StopJob, TrainJob
from mcp_server.policy import may_write
from mcp_server.render import next_for, when
from raylaunch.errors import SpecError
from raylaunch.models.job import JobView
from raylaunch.models.states import JobState, Reason


def test_the_end_of_too_many_lines_is_kept_and_the_cut_is_said() -> None:
    found = render.last_lines([f"line {n}" for n in range(100)], most=3)
    assert found.lines == ["line 97", "line 98", "line 99"]
    assert found.cut == "97 earlier lines are left out here"


def test_lines_that_fit_are_not_said_to_be_cut() -> None:
    assert render.last_lines(["a", "b"], most=2) == render.BoundedLines(["a", "b"], "")


def test_of_one_line_that_is_too_long_its_end_is_kept() -> None:
    found = render.last_lines(["x" * 100 + "the end"], most=5, most_bytes=20)
    assert found.lines[0].endswith("the end")
    assert len(found.lines[0].encode()) <= 20
    assert found.cut


@given(st.binary(max_size=3000), st.integers(1, 20), st.integers(50, 500))
def test_whatever_a_log_holds_it_fits_and_is_utf8(data: bytes, most: int, most_bytes: int) -> None:
    found = render.last_lines(render.lines_of(data), most=most, most_bytes=most_bytes)
    assert len(found.lines) <= most
    assert sum(len(line.encode()) + 1 for line in found.lines) <= most_bytes + 1


@given(st.text(max_size=600), st.integers(20, 100))
def test_a_short_text_is_one_line_of_bounded_length(text: str, limit: int) -> None:
    found = render.short(text, limit)
    assert "\n" not in found
    assert len(found) <= limit


def test_what_json_cannot_bear_becomes_text() -> None:
    found = render.plain({"loss": math.nan, "best": math.inf, "name": "a\ud800b", "deep": [{"x": -math.inf}]})
    assert found == {"loss": "nan", "best": "inf", "name": "a?b", "deep": [{"x": "-inf"}]}
    json.dumps(found, allow_nan=False).encode()


def test_false_and_zero_are_facts_and_emptiness_is_not() -> None:
    assert render.without_empty({"a": 0, "b": False, "c": "", "d": None, "e": []}) == {"a": 0, "b": False}


def test_a_list_that_a_client_sends_as_text_is_read() -> None:
    assert arguments.read("download_model", DownloadModel, {"files": '["a.pt", "b.pt"]'}).files == ["a.pt", "b.pt"]
    assert arguments.read("download_model", DownloadModel, {"files": "a.pt"}).files == ["a.pt"]
    read = arguments.read("train_job", TrainJob, {"entrypoint": '["python", "train.py"]', "env": '{"SEED": 1}'})
    assert (read.entrypoint, read.env) == (["python", "train.py"], {"SEED": 1})


def test_a_shell_command_that_begins_with_a_bracket_stays_a_command() -> None:
    command = "[ -f data ] && python train.py"
    assert arguments.read("train_job", TrainJob, {"entrypoint": command}).entrypoint == command


def test_null_says_nothing() -> None:
    assert arguments.read("monitor_job", MonitorJob, {"job": None, "wait_s": None}) == MonitorJob()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"jb": "last"}, "stop_job has no argument 'jb'"),
        ({}, "the key 'job' is missing"),
        ({"job": 7}, "job: 7 is not text; write it in quotes"),
        ({"job": ["a"]}, "job: a list is not text"),
        ({"job": "a", "grace_s": "soon"}, "grace_s: 'soon' is not a number"),
        ({"job": "a", "grace_s": -1}, "grace_s: -1 is less than 0"),
    ],
)
def test_wrong_arguments_are_named_with_those_that_there_are(given: Mapping[str, object], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        arguments.read("stop_job", StopJob, given)
    assert caught.value.message == words
    assert caught.value.hint == "stop_job takes job, grace_s"


def test_only_a_viewer_does_not_write() -> None:
    assert not may_write({"RAYLAUNCH_ROLE": "viewer"})
    assert may_write({})
    assert may_write({"RAYLAUNCH_ROLE": "operator"})


def test_a_role_that_there_is_not_starts_no_server() -> None:
    with pytest.raises(SpecError, match="RAYLAUNCH_ROLE=veiwer is not a role"):
        may_write({"RAYLAUNCH_ROLE": "veiwer"})


def _job(state: JobState, **facts: object) -> JobView:
    base = {"id": "digits-1", "name": "digits", "owner": "ana", "created_at": 1.0, "updated_at": 1.0}
    return JobView.model_validate({**base, "state": state, **facts})


@pytest.mark.parametrize("state", list(JobState))
def test_every_state_says_what_to_do_next(state: JobState) -> None:
    assert next_for(_job(state))


def test_the_next_step_fits_the_reason() -> None:
    assert "raylaunch secret set NAME" in next_for(_job(JobState.FAILED, reason=Reason.SECRET_MISSING))
    assert "smaller batch" in next_for(_job(JobState.FAILED, reason=Reason.GPU_OUT_OF_MEMORY))
    assert next_for(_job(JobState.SUCCEEDED, outputs=1)) == "download its outputs: download_model job=digits-1"
    assert "cannot be reached" in next_for(_job(JobState.RUNNING, unreachable=True))
    assert "plain ray job submit" in next_for(_job(JobState.SUCCEEDED, foreign=True))


def test_a_time_is_said_as_people_write_it() -> None:
    assert when(0.0) == "1970-01-01T00:00:00Z"
    assert when(None) == ""
