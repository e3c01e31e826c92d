"""Clusters brought up from Python: plans, steps as they happen, refusals. Without Ray; `test_sdk_cluster` has it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.agent import cluster_of_paper
from support.api import token_of
from support.api_use import start
from support.laptop import empty_laptop
from support.sshd import LOOPBACK, Sshd, fingerprint, free_port, sshd
from test_notebook import EXECUTE

import raylaunch
from raylaunch import AsyncCluster, Cluster, ClusterSpec
from raylaunch.cluster.client_record import ClientRecord, save_client
from raylaunch.cluster.types import Endpoint, Step
from raylaunch.errors import ClusterStartError, ConflictError, HostKeyError, HostUnreachableError, SpecError
from raylaunch.paths import cluster_paths
from raylaunch.sdk.arguments import cluster_of
from raylaunch.sdk.display import Steps


@pytest.fixture(autouse=True)
def nowhere(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, and no cluster.yaml in the current folder."""
    monkeypatch.delenv("RAYLAUNCH_CLUSTER_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    return home


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd")) as served:
        yield served


def lab(*ports: int) -> ClusterSpec:
    """Hosts on loopback, on these ports."""
    hosts = [{"host": LOOPBACK, "name": f"dgx-{n}", "port": port} for n, port in enumerate(ports, start=1)]
    return ClusterSpec.model_validate({"name": "lab", "hosts": hosts})


def test_a_plan_says_what_would_be_started_and_starts_nothing(home: Path) -> None:
    plan = Cluster.plan(ClusterSpec(name="local", gpus=2))
    assert str(plan).startswith("cluster local: would start")
    assert "2 logical GPUs" in str(plan)
    assert not list(home.rglob("cluster.json"))


def test_a_cluster_that_was_never_started_is_looked_at_and_taken_down_without_an_error() -> None:
    assert Cluster.look().state == "stopped"
    assert not Cluster.down("local").was_running


def test_a_cluster_is_meant_by_a_name_a_file_a_spec_or_by_nothing(tmp_path: Path) -> None:
    dgx = ClusterSpec.model_validate({"name": "dgx", "hosts": ["dgx-1"]})
    cluster_paths("dgx").root.mkdir(parents=True)
    save_client(cluster_paths("dgx"), ClientRecord(spec=dgx))
    (tmp_path / "other.yaml").write_text("name: other\n")
    assert cluster_of("dgx") == dgx
    assert cluster_of(dgx) is dgx
    assert cluster_of(tmp_path / "other.yaml") == ClusterSpec(name="other")
    assert cluster_of("another") == ClusterSpec(name="another")
    assert cluster_of("") == ClusterSpec()
    with pytest.raises(SpecError, match=r"'\.\./x' is not a cluster name"):
        cluster_of("../x")


def test_a_host_that_cannot_be_reached_is_named_in_the_plan_in_a_step_and_in_the_error() -> None:
    spec, steps = lab(free_port()), list[Step]()
    plan = Cluster.plan(spec)
    assert "dgx-1" in plan.problems[0]
    assert str(plan).startswith("cluster lab: up would fail\n  x dgx-1: ")
    with pytest.raises(HostUnreachableError, match="dgx-1"):
        Cluster.up(spec, on_step=steps.append)
    assert [(step.name, step.state) for step in steps] == [("dgx-1", "note")]


def test_a_plan_is_refused_as_up_would_be_where_a_fixed_port_is_taken(home: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken, pytest.raises(ConflictError):
        Cluster.plan(ClusterSpec(name="local", gpus=2, port=taken.getsockname()[1]))
    assert not (home / "clusters" / "local").exists()


def test_a_plan_names_every_host_that_cannot_be_reached() -> None:
    plan = Cluster.plan(lab(free_port(), free_port()))
    assert [problem.partition(":")[0] for problem in sorted(plan.problems)] == ["dgx-1", "dgx-2"]
    assert plan.actions == ()


def test_an_upgrade_is_an_up_where_nothing_runs_and_stop_is_for_it_alone() -> None:
    with pytest.raises(HostUnreachableError, match="dgx-1"):
        Cluster.up(lab(free_port()), upgrade=True, stop=True, on_step=lambda _: None)
    with pytest.raises(SpecError, match="upgrade=True"):
        Cluster.up(stop=True)


def test_every_host_that_failed_is_in_the_error() -> None:
    with pytest.raises(ClusterStartError) as caught:
        Cluster.up(lab(free_port(), free_port()), on_step=lambda _: None)
    assert "2 of 2 hosts failed" in str(caught.value)
    assert "dgx-1" in str(caught.value)
    assert "dgx-2" in str(caught.value)


def test_steps_are_yielded_before_the_error_is_raised() -> None:
    steps = Cluster.up_steps(lab(free_port()))
    assert next(steps).name == "dgx-1"
    with pytest.raises(HostUnreachableError):
        next(steps)


def test_whoever_stops_listening_ends_the_bring_up(host: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_laptop(host, monkeypatch)

    async def left_behind(spec: ClusterSpec) -> set[str]:
        async with contextlib.aclosing(AsyncCluster.up_steps(spec)) as steps:
            await steps.__anext__()
        return {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}}

    assert not asyncio.run(left_behind(lab(free_port(), host.port)))


def test_an_unknown_host_key_is_asked_of_nobody_and_the_error_says_how_a_person_accepts_it(
    host: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_laptop(host, monkeypatch)
    with pytest.raises(HostKeyError) as caught:
        Cluster.up(lab(host.port), on_step=lambda _: None)
    shown = fingerprint(host.host_keys[0])
    assert f"accept it in a terminal with raylaunch, or write it into cluster.yaml as  fingerprint: {shown}" in str(
        caught.value
    )
    assert shown in str(Cluster.plan(lab(host.port)))


def test_a_cluster_is_not_taken_down_while_jobs_run(home: Path, tmp_path: Path) -> None:
    with cluster_of_paper(home, tmp_path / "store") as api:
        reach = Endpoint(url=api.url, token=token_of("tom"))
        with raylaunch.connect(reach=reach) as cluster:
            job = cluster.submit("x", name="digits", working_dir="")
        start(api, job.view)
        with pytest.raises(ConflictError) as caught:
            Cluster.down("local")
        assert f"cluster local has 1 running job: {job.id}" in str(caught.value)
        assert "down(…, stop=True); or at once: force=True" in str(caught.value)


def test_of_each_host_the_last_step_is_shown_and_what_hosts_say_is_text() -> None:
    shown = Steps("lab")
    for step in (
        Step("dgx-1: probe", "done", "looked", 0.5),
        Step("dgx-2: probe", "waits", "5 s so far"),
        Step("dgx-1: ray", "begins", "starts <b>Ray</b>\x1b[31m"),
        Step("dgx-2", "note", "its disk is <i>full</i>"),
    ):
        shown = shown.with_step(step)
    html = shown._repr_html_()
    assert "looked" not in html
    assert "… dgx-1: ray: starts &lt;b&gt;Ray&lt;/b&gt;" in html
    assert "! dgx-2: its disk is &lt;i&gt;full&lt;/i&gt;" in html
    assert "\x1b" not in html + repr(shown)


CELL = """
import raylaunch
raylaunch.Cluster.up(raylaunch.ClusterSpec.model_validate(
    {"name": "lab", "hosts": [{"host": "127.0.0.1", "name": "dgx-1", "port": PORT}]}
))
"""


NOTEBOOK = """
{"cells": [
    {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": null, "source": SOURCE}
], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
"""


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nbclient", "ipykernel")),
    reason="needs what notebooks need: pip install 'raylaunch[dev]'",
)
def test_a_notebook_shows_the_steps_in_the_cell_that_brings_up(home: Path, tmp_path: Path) -> None:
    source = json.dumps(CELL.replace("PORT", str(free_port())))
    (tmp_path / "up.ipynb").write_text(NOTEBOOK.replace("SOURCE", source))
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE.replace("timeout=120", "timeout=120, allow_errors=True"), "up.ipynb"],
        env={**os.environ, "RAYLAUNCH_HOME": str(home), "IPYTHONDIR": str(tmp_path), "JUPYTER_PLATFORM_DIRS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outputs = json.loads((tmp_path / "up.ipynb").read_text())["cells"][0]["outputs"]
    (live,) = [one for one in outputs if one["output_type"] == "display_data"]
    assert "! dgx-1: " in "".join(live["data"]["text/html"])
    (error,) = [one for one in outputs if one["output_type"] == "error"]
    assert "dgx-1" in error["evalue"]


def test_the_package_gives_the_cluster_file_as_an_object() -> None:
    assert raylaunch.ClusterSpec is ClusterSpec
