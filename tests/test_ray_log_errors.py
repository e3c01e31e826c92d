"""A start of Ray that was given up is told by what Ray's own programs said."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylaunch.cluster.local.steps import DiedError, StepLog, ray_log_errors
from raylaunch.paths import ClusterPaths

_CALM = "[2026-11-27 17:16:05,821 I 29585 29636] (raylet) agent_manager.cc:83: Agent process with name {}\n"
_SEVERE = "[2026-11-27 17:16:05,826 E 29585 14965] (raylet) grpc_server.cc:150: Failed to start: {}\n"


def _logs(temp: Path) -> Path:
    logs = temp / "session_latest" / "logs"
    logs.mkdir(parents=True)
    return logs


def test_the_errors_of_each_log_are_shown_by_its_name_and_what_is_calm_is_not(tmp_path: Path) -> None:
    logs = _logs(tmp_path)
    (logs / "raylet.out").write_text(_CALM.format("a") + _SEVERE.format("address in use") + _CALM.format("b"))
    (logs / "gcs_server.out").write_text(_CALM.format("c"))
    (logs / "dashboard_agent.err").write_text("Traceback\nOSError: no space left\n")
    words = ray_log_errors(tmp_path)
    assert words.splitlines() == [
        f"the end of {logs}/raylet.out:",
        "    " + _SEVERE.format("address in use").strip(),
        f"the end of {logs}/dashboard_agent.err:",
        "    Traceback",
        "    OSError: no space left",
    ]


def test_without_an_error_the_last_lines_of_the_raylet_tell_what_it_waits_for(tmp_path: Path) -> None:
    (_logs(tmp_path) / "raylet.out").write_text("".join(_CALM.format(n) for n in range(9)))
    assert [line[-1] for line in ray_log_errors(tmp_path).splitlines()[1:]] == ["6", "7", "8"]


def test_of_a_session_that_goes_on_the_latest_start_is_told(tmp_path: Path) -> None:
    logs = _logs(tmp_path)
    (logs / "raylet.out").write_text(_SEVERE.format("of the first start"))
    (logs / "raylet.2.out").write_text(_CALM.format("b"))
    (logs / "raylet.10.out").write_text(_SEVERE.format("address in use"))
    (logs / "raylet.old.out").write_text(_SEVERE.format("of nobody"))
    assert ray_log_errors(tmp_path).splitlines() == [
        f"the end of {logs}/raylet.10.out:",
        "    " + _SEVERE.format("address in use").strip(),
    ]


def test_a_ray_that_never_wrote_a_log_adds_no_words(tmp_path: Path) -> None:
    assert ray_log_errors(tmp_path) == ""


def test_a_ray_that_ended_while_it_was_waited_for_is_told_with_them(tmp_path: Path) -> None:
    (tmp_path / "temp").write_text(str(tmp_path / "ray"))
    paths = ClusterPaths(name="lab", home=tmp_path, root=tmp_path / "lab")
    paths.root.mkdir()
    paths.ray_log.write_text("The current node timed out during startup.\n")
    (_logs(paths.temp) / "raylet.out").write_text(_SEVERE.format("address in use"))
    with pytest.raises(DiedError) as caught:
        StepLog(paths, lambda _: None).must_live("ray", "Ray", None, paths.ray_log)
    assert str(caught.value).splitlines()[1:4] == [
        "    The current node timed out during startup.",
        f"the end of {paths.temp}/session_latest/logs/raylet.out:",
        "    " + _SEVERE.format("address in use").strip(),
    ]
