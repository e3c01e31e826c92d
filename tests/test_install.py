"""The environment of a raylaunch version on a host behind a real sshd, from a package index of the test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import pytest
from support.bare_host import PYTHON, VERSIONS, BareHost, runs, versions_of
from support.index import Index
from support.sshd import sshd
from support.waiting import wait_until

from raylaunch.cluster.install.environment import ensure_environment
from raylaunch.cluster.install.resolve import find_uv
from raylaunch.cluster.install.wheel_store import WheelStore
from raylaunch.ssh.host import machine
from raylaunch.version import __version__

pytestmark = pytest.mark.slow


def test_a_fresh_host_gets_exactly_the_versions_of_the_client(fresh_host: BareHost) -> None:
    python = fresh_host.ensure()
    assert python.is_relative_to(fresh_host.root / "versions")
    assert python.parent.parent.name.startswith(f"{__version__}-")
    assert versions_of(python) == VERSIONS
    assert [fresh_host.did(name) for name in ("wheels", "push", "install")] == [["begins", "done"]] * 3
    assert not fresh_host.left_over()


def test_hosts_get_neither_the_mcp_server_nor_the_ssh_client(used_host: BareHost) -> None:
    python = used_host.ensure()
    for name in ("mcp_server", "mcp", "asyncssh"):
        assert runs(python, f"import importlib.util as u; print(u.find_spec('{name}'))") == "None"


def test_the_second_call_is_one_round_trip_and_changes_nothing(used_host: BareHost) -> None:
    python = used_host.ensure()
    made = (python.parent.parent / "raylaunch.json").stat().st_mtime_ns
    before = used_host.daemon.log().count("Starting session:")
    assert used_host.ensure() == python
    assert used_host.daemon.log().count("Starting session:") == before + 1
    assert [step.state for step in used_host.steps] == ["kept"]
    assert (python.parent.parent / "raylaunch.json").stat().st_mtime_ns == made


def test_the_program_raylaunch_works_there(stocked_host: BareHost) -> None:
    python = stocked_host.ensure()
    program = str(python.parent / "raylaunch")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert __version__ in done.stdout
    modules = sorted(path.stem for path in (Path(__file__).parent.parent / "raylaunch" / "cli").glob("[a-z]*.py"))
    runs(python, "import importlib\n" + "\n".join(f"importlib.import_module('raylaunch.cli.{one}')" for one in modules))


def test_the_environment_is_private_to_its_user(used_host: BareHost) -> None:
    used_host.ensure()
    folders = (used_host.root, used_host.root / "versions", used_host.root / "wheels")
    assert not [path for path in folders if path.stat().st_mode & 0o77]


@pytest.mark.long
def test_a_root_with_a_space_and_a_quote_serves(fresh_host: BareHost, tmp_path: Path) -> None:
    fresh_host.root = tmp_path / "it's here"
    python = fresh_host.ensure()
    assert versions_of(python) == VERSIONS
    program = [str(python.parent / "raylaunch"), "--version"]
    assert __version__ in subprocess.run(program, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_wheel_that_is_there_is_not_pushed_again(stocked_host: BareHost) -> None:
    python = stocked_host.ensure()
    shutil.rmtree(python.parent.parent)
    stocked_host.ensure()
    assert stocked_host.did("push") == ["kept"]


def test_a_wheel_that_was_damaged_on_the_host_is_pushed_anew(stocked_host: BareHost) -> None:
    (wheel,) = stocked_host.root.glob("wheels/*/psutil-*.whl")
    whole = wheel.read_bytes()
    wheel.unlink()  # the file is another host's as well
    wheel.write_bytes(whole[:1000])
    assert versions_of(stocked_host.ensure()) == VERSIONS
    assert stocked_host.did("install") == ["begins", "note", "begins", "done"]
    assert wheel.read_bytes() == whole


@pytest.mark.long
def test_another_version_shares_its_files_with_the_first(stocked_host: BareHost) -> None:
    python = stocked_host.ensure()
    first = python.parent.parent
    older = first.rename(first.with_name("0.0.9-older"))
    again = stocked_host.ensure().parent.parent
    module = "lib/python{}.{}/site-packages/pydantic/main.py".format(*sys.version_info[:2])
    assert (older / module).samefile(again / module)


@pytest.mark.long
def test_two_callers_at_once_make_it_once(fresh_host: BareHost) -> None:
    made: list[str] = []

    async def one() -> None:
        async with machine(fresh_host.daemon.target) as connection:
            await ensure_environment(
                connection,
                PYTHON,
                store=fresh_host.store,
                root=str(fresh_host.root),
                on_step=fresh_host.steps.append,
            )
            made.extend(str(path) for path in (fresh_host.root / "versions").glob("[!.]*"))

    async def both() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            tasks.start_soon(one)

    anyio.run(both)
    assert len(set(made)) == 1
    assert sum("checking that everything" in step.message for step in fresh_host.steps) == 1
    assert not fresh_host.left_over()


@pytest.mark.long
def test_a_folder_without_its_mark_is_not_taken_for_an_environment(stocked_host: BareHost) -> None:
    python = stocked_host.ensure()
    (python.parent.parent / "raylaunch.json").unlink()
    (python.parent.parent / "lib").rename(stocked_host.root / "lib")
    assert stocked_host.ensure() == python
    assert versions_of(python) == VERSIONS


@pytest.mark.long
def test_an_environment_whose_interpreter_is_gone_is_made_anew(stocked_host: BareHost) -> None:
    python = stocked_host.ensure()
    python.unlink()
    python.symlink_to("/nowhere/python")
    assert stocked_host.ensure() == python
    assert versions_of(python) == VERSIONS


@pytest.fixture
def online(wheel_index: Index, wheel_store: WheelStore, tmp_path: Path) -> Iterator[Callable[..., BareHost]]:
    """Make a host with variables of its own; by default its pip knows the index."""
    with ExitStack() as stack:

        def make(**variables: str) -> BareHost:
            words = " ".join(
                f"{name}={value}" for name, value in (variables or {"PIP_INDEX_URL": wheel_index.url}).items()
            )
            daemon = stack.enter_context(sshd(tmp_path / "online", extra=[f"SetEnv {words}"]))
            return BareHost(daemon, wheel_store, tmp_path / "root")

        yield make


def test_a_host_that_reaches_an_index_installs_from_there(online: Callable[..., BareHost], wheel_index: Index) -> None:
    host = online()
    wheel_index.asked.clear()
    python = host.ensure(index_reachable=True)
    assert versions_of(python) == VERSIONS
    assert any(name.startswith("pydantic-") for name in wheel_index.fetched)
    pushed = {path.name.split("-")[0] for path in (host.root / "wheels").glob("*/*.whl")}
    assert pushed == {"uv", "raylaunch"}


def test_wheels_are_pushed_where_the_hosts_index_fails(online: Callable[..., BareHost]) -> None:
    host = online(PIP_INDEX_URL="http://127.0.0.1:9/simple/", UV_HTTP_RETRIES="0")
    python = host.ensure(index_reachable=True)
    assert versions_of(python) == VERSIONS
    assert host.did("install")[:2] == ["begins", "note"]
    assert any("pushing wheels" in step.message and "127.0.0.1:9" in step.message for step in host.steps)


@pytest.mark.long
def test_where_no_index_is_reached_from_here_the_hosts_own_uv_serves(
    online: Callable[..., BareHost], wheel_index: Index, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").symlink_to(find_uv(os.environ))
    host = online(PIP_INDEX_URL=wheel_index.url, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    offline = {**wheel_index.environ(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/simple/"}
    python = host.ensure(index_reachable=True, store=WheelStore(tmp_path / "client", environ=offline))
    assert versions_of(python) == VERSIONS


@pytest.mark.long
def test_progress_is_told_while_wheels_are_pushed(fresh_host: BareHost) -> None:
    fresh_host.ensure()
    pushed = [step.message for step in fresh_host.steps if step.name == "push" and step.state == "waits"]
    assert pushed
    assert all("pushed" in words and "MB of" in words for words in pushed)
    wait_until(lambda: not fresh_host.left_over(), 60, "nothing is left over")
