"""Which of several clusters is meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from raylaunch.cli.app import raylaunch
from raylaunch.cli.hosts import ssh_argv
from raylaunch.cluster.client_record import ClientRecord, save_client
from raylaunch.config.load import load_cluster_file
from raylaunch.errors import NotFoundError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec
from raylaunch.paths import cluster_paths


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home of its own, and no cluster.yaml in the current folder."""
    monkeypatch.setenv("RAYLAUNCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAYLAUNCH_CLUSTER_FILE", raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")


def brought_up(name: str, *hosts: str) -> ClusterSpec:
    """Leave behind what an `up` from here leaves."""
    spec = ClusterSpec.model_validate({"name": name, "hosts": list(hosts), "gpus": 8, "defaults": {"user": "ml"}})
    paths = cluster_paths(name)
    paths.root.mkdir(parents=True)
    save_client(paths, ClientRecord(spec=spec, token="-"))  # noqa: S106 -- none
    return spec


def run(*words: str) -> str:
    done = CliRunner().invoke(raylaunch, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_cluster_that_was_brought_up_is_meant_after_switch_and_local_again_after_switch_local() -> None:
    dgx = brought_up("dgx", "dgx-1", "dgx-2")
    run("switch", "dgx")
    assert load_cluster_file().spec == dgx
    run("switch", "local")
    assert load_cluster_file().spec == ClusterSpec()


def test_switch_alone_lists_the_clusters_and_marks_the_one_that_is_meant() -> None:
    brought_up("dgx", "dgx-1")
    brought_up("sparks", "spark1", "spark2")
    run("switch", "sparks")
    assert run("switch").splitlines() == ["  local", "  dgx", "* sparks"]


def test_a_file_in_the_current_folder_wins_over_switch() -> None:
    brought_up("dgx", "dgx-1")
    run("switch", "dgx")
    Path("cluster.yaml").write_text("name: here\n")
    assert load_cluster_file().spec.name == "here"


def test_an_unknown_cluster_is_said_with_the_known_ones() -> None:
    brought_up("dgx", "dgx-1")
    with pytest.raises(NotFoundError, match="no cluster 'dgz' was started from here; known: dgx"):
        run("--cluster", "dgz", "status")


def test_ssh_is_called_with_what_the_file_says_of_the_host() -> None:
    host = HostSpec.model_validate({"host": "ml@dgx-1:2222", "key": "/k", "jump": ["gate"]})
    assert ssh_argv(host, ("nvidia-smi", "-L")) == [
        "ssh",
        "-p",
        "2222",
        "-l",
        "ml",
        "-i",
        "/k",
        "-J",
        "gate",
        "--",
        "dgx-1",
        "nvidia-smi",
        "-L",
    ]


def test_ssh_to_a_host_that_there_is_not_names_those_that_there_are() -> None:
    brought_up("dgx", "dgx-1", "dgx-2")
    with pytest.raises(NotFoundError, match="has no host 'dgx-3'; it has dgx-1, dgx-2"):
        run("--cluster", "dgx", "ssh", "dgx-3")
