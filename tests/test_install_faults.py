"""Installing on a host, and a client that is killed, a link that is cut, a disk that is full, a Python that is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.bare_host import HERE, PYTHON, VERSIONS, BareHost, versions_of
from support.disks import fill, small_disk
from support.index import Index, index, tiny_wheel

from raylaunch.cluster.install.platforms import WheelPlatform
from raylaunch.cluster.install.wheel_store import WheelStore
from raylaunch.cluster.types import Step
from raylaunch.errors import HostLostError, HostStepError, HostStorageError, VersionError

pytestmark = pytest.mark.slow


CLIENT = """
import json, sys
import anyio
from pathlib import Path
from raylaunch.cluster.install.environment import HostPython, ensure_environment
from raylaunch.cluster.install.platforms import WheelPlatform
from raylaunch.ssh.host import Target, machine
from raylaunch.cluster.install.wheel_store import WheelStore

asked = json.loads(sys.argv[1])
target = Target(**asked["target"], ssh_config=Path(asked["config"]), known_hosts=Path(asked["known_hosts"]))
python = HostPython(asked["python"], WheelPlatform(*asked["platform"]))

async def main():
    async with machine(target) as connection:
        store = WheelStore(Path(asked["home"]))
        tell = lambda step: print(step.name, step.state, flush=True)
        await ensure_environment(connection, python, store=store, root=asked["root"], on_step=tell)

anyio.run(main)
"""


@pytest.mark.parametrize(
    "step",
    [
        pytest.param("wheels begins", marks=pytest.mark.long),
        "push waits",
        pytest.param("install begins", marks=pytest.mark.long),
        pytest.param("install waits", marks=pytest.mark.long),
    ],
)
def test_a_client_killed_in_the_middle_of_a_step_can_be_run_again(
    fresh_host: BareHost, wheel_index: Index, tmp_path: Path, step: str
) -> None:
    target = fresh_host.daemon.target
    asked = {
        "target": {"name": "here", "host": target.host, "port": target.port, "user": target.user, "key": target.key},
        "config": str(target.ssh_config),
        "known_hosts": str(target.known_hosts),
        "python": PYTHON.path,
        "platform": [HERE.arch, HERE.glibc, HERE.python],
        "home": str(tmp_path / "client"),
        "root": str(fresh_host.root),
    }
    environ = {**wheel_index.environ(tmp_path / "client"), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, json.dumps(asked)], env=environ, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        assert any(line.strip() == step for line in client.stdout)
        client.send_signal(signal.SIGKILL)
    store = WheelStore(tmp_path / "client", environ=wheel_index.environ(tmp_path / "client"))
    assert versions_of(fresh_host.ensure(store=store)) == VERSIONS
    assert not fresh_host.left_over()


@pytest.mark.parametrize("step", [pytest.param("push", marks=pytest.mark.long), "install"])
def test_a_link_that_is_cut_is_an_error_and_the_next_call_goes_on(fresh_host: BareHost, step: str) -> None:
    def cut(reported: Step) -> None:
        if reported.name == step and reported.state == "begins":
            fresh_host.daemon.drop()

    error = fresh_host.refused(lambda: fresh_host.ensure(on_step=cut))
    assert isinstance(error, HostLostError)
    assert "lost" in error.message
    assert versions_of(fresh_host.ensure()) == VERSIONS
    assert not fresh_host.left_over()


def test_a_disk_without_room_is_said_before_anything_is_pushed(fresh_host: BareHost, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", kib=20_000) as disk:
        fresh_host.root = disk / "root"
        error = fresh_host.refused(fresh_host.ensure)
        assert not list(disk.rglob("*.whl"))
    assert isinstance(error, HostStorageError)
    assert error.host == "here"
    assert "are needed" in error.message


@pytest.mark.parametrize("step", ["push", pytest.param("install", marks=pytest.mark.long)])
def test_a_disk_that_becomes_full_is_said_and_the_next_call_goes_on(
    fresh_host: BareHost, tmp_path: Path, step: str
) -> None:
    with small_disk(tmp_path / "small", kib=600_000) as disk:
        fresh_host.root = disk / "root"
        ballast: list[Path] = []

        def fill_up(reported: Step) -> None:
            if reported.name == step and reported.state == "begins":
                ballast.append(fill(disk, but_kib=200))

        error = fresh_host.refused(lambda: fresh_host.ensure(on_step=fill_up))
        assert isinstance(error, HostStorageError)
        assert "free" in error.message
        for file in ballast:
            file.unlink()
        assert versions_of(fresh_host.ensure()) == VERSIONS


def test_a_disk_from_which_nothing_can_be_run_is_refused(stocked_host: BareHost, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", kib=600_000, options="noexec") as disk:
        stocked_host.root = disk / "root"
        error = stocked_host.refused(stocked_host.ensure)
    assert isinstance(error, HostStorageError)
    assert "noexec" in error.message
    assert "root:" in error.hint


def test_a_folder_that_may_not_be_written_is_refused(stocked_host: BareHost) -> None:
    stocked_host.root = Path("/proc/raylaunch")
    error = stocked_host.refused(stocked_host.ensure)
    assert isinstance(error, HostStorageError)
    assert "/proc" in error.message


def test_a_python_that_is_gone_is_said(stocked_host: BareHost) -> None:
    error = stocked_host.refused(lambda: stocked_host.ensure(python=replace(PYTHON, path="/nowhere/python3.11")))
    assert isinstance(error, HostStepError)
    assert "/nowhere/python3.11 cannot be run" in error.message


def test_another_machine_than_was_probed_is_refused(stocked_host: BareHost) -> None:
    other = WheelPlatform({"x86_64": "aarch64", "aarch64": "x86_64"}[HERE.arch], HERE.glibc, HERE.python)
    error = stocked_host.refused(lambda: stocked_host.ensure(python=replace(PYTHON, platform=other)))
    assert isinstance(error, VersionError)
    assert f"on {HERE.arch}, not" in error.message


def test_an_environment_that_does_not_work_never_gets_its_name(
    stocked_host: BareHost, wheel_index: Index, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(wheel_index.folder, folder)
    wheel = tiny_wheel(folder, "wandb", VERSIONS["wandb"], body="raise RuntimeError('no such luck')")
    with index(folder) as broken:
        store = WheelStore(tmp_path / "client", environ=broken.environ(tmp_path / "client"))
        error = stocked_host.refused(lambda: stocked_host.ensure(store=store))
    assert wheel.exists()
    assert isinstance(error, HostStepError)
    assert "no such luck" in error.message
    assert not list((stocked_host.root / "versions").glob("[!.]*"))
