"""The environment of a raylaunch version on a host behind a real sshd, from a package index of the test's own.

Ray and wandb are stand-ins there, of the client's versions; everything else is what is installed here.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import pytest
from support.disks import fill, small_disk
from support.index import Index, index, installed_wheel, tiny_wheel
from support.sshd import Sshd, sshd
from support.waiting import wait_until

from raylaunch.cluster.install.environment import HostPython, Way, ensure_beside, ensure_environment
from raylaunch.cluster.install.own_wheel import own_wheel
from raylaunch.cluster.install.pins import EXACT, WheelPlatform, installed_pins, installed_version
from raylaunch.cluster.install.resolving import find_uv
from raylaunch.cluster.install.wheels import WheelStore
from raylaunch.cluster.plan import Step
from raylaunch.cluster.ssh.machine import machine
from raylaunch.errors import (
    HostLostError,
    HostStepError,
    HostStorageError,
    RaylaunchError,
    VersionError,
)
from raylaunch.version import __version__

pytestmark = pytest.mark.slow

HERE = WheelPlatform(platform.machine(), platform.libc_ver()[1], platform.python_version())
PYTHON = HostPython(str(getattr(sys, "_base_executable", sys.executable)), HERE)
VERSIONS = {"raylaunch": __version__, **{name: installed_version(name) for name in EXACT}}


def fill_index(folder: Path) -> None:
    """Put what a host needs on the index."""
    requirements = own_wheel().requirements
    tiny_wheel(folder, "ray", VERSIONS["ray"], extras=["default"])
    tiny_wheel(folder, "wandb", VERSIONS["wandb"])
    for name in installed_pins([one for one in requirements if not one.startswith(EXACT)], HERE):
        installed_wheel(folder, name)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    folder = tmp_path_factory.mktemp("index")
    fill_index(folder)
    with index(folder) as found:
        yield found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, served: Index) -> WheelStore:
    home = tmp_path_factory.mktemp("client")
    return WheelStore(home, environ=served.environ(home))


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd"), extra=["LogLevel VERBOSE"]) as found:
        yield found


@dataclass
class Host:
    """A host with nothing of raylaunch on it: a folder of this machine, reached through sshd."""

    daemon: Sshd
    store: WheelStore
    root: Path
    steps: list[Step] = field(default_factory=list)

    def ensure(
        self,
        *,
        python: HostPython = PYTHON,
        way: Way = "push",
        index_reachable: bool = False,
        store: WheelStore | None = None,
        on_step: Callable[[Step], None] = lambda _step: None,
    ) -> Path:
        """Have the environment there; return its Python."""

        async def ensure() -> str:
            async with machine(self.daemon.target) as connection:
                return await ensure_environment(
                    connection,
                    python,
                    store=store or self.store,
                    way=way,
                    index_reachable=index_reachable,
                    root=str(self.root),
                    on_step=self._told(on_step),
                )

        return Path(anyio.run(ensure))

    def ensure_beside(self, environment: str) -> Path:
        """Have raylaunch beside an environment; return the Python of both."""

        async def ensure() -> str:
            async with machine(self.daemon.target) as connection:
                return await ensure_beside(
                    connection, environment, store=self.store, root=str(self.root), on_step=self._told(print)
                )

        return Path(anyio.run(ensure))

    def refused(self, call: Callable[[], object]) -> RaylaunchError:
        """Return the error that a call ends with."""
        with pytest.raises(RaylaunchError) as caught:
            call()
        return caught.value

    def _told(self, on_step: Callable[[Step], None]) -> Callable[[Step], None]:
        self.steps.clear()

        def told(step: Step) -> None:
            self.steps.append(step)
            on_step(step)

        return told

    def did(self, name: str) -> list[str]:
        """Return the states of one step, without how far it was in between."""
        return [step.state for step in self.steps if step.name == name and step.state != "waits"]

    def left_over(self) -> list[Path]:
        """Return what is in the folder of environments beside complete ones and locks."""
        found = (self.root / "versions").glob(".*")
        return [path for path in found if path.suffix != ".lock"]


@pytest.fixture
def fresh(daemon: Sshd, store: WheelStore, tmp_path: Path) -> Host:
    """A host that never saw raylaunch."""
    return Host(daemon, store, tmp_path / "root")


@pytest.fixture(scope="module")
def used(daemon: Sshd, store: WheelStore, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A host that has an environment, which no test may change."""
    host = Host(daemon, store, tmp_path_factory.mktemp("used"))
    host.ensure()
    return host


@pytest.fixture
def host(used: Host, tmp_path: Path) -> Host:
    """A host that has all wheels (the same files), and no environment."""
    root = tmp_path / "root"
    shutil.copytree(used.root / "wheels", root / "wheels", copy_function=os.link)
    return Host(used.daemon, used.store, root)


def runs(python: Path, program: str) -> str:
    """Run a program there, as a user's shell would; return what it prints."""
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(python.parent)}
    done = subprocess.run(
        [str(python), "-c", program], env=environ, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def versions_of(python: Path) -> dict[str, str]:
    names = json.dumps(sorted(VERSIONS))
    program = (
        f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    )
    found: dict[str, str] = json.loads(runs(python, program))
    return found


def test_a_fresh_host_gets_exactly_the_versions_of_the_client(fresh: Host) -> None:
    python = fresh.ensure()
    assert python.is_relative_to(fresh.root / "versions")
    assert python.parent.parent.name.startswith(f"{__version__}-")
    assert versions_of(python) == VERSIONS
    assert [fresh.did(name) for name in ("wheels", "push", "install")] == [["begins", "done"]] * 3
    assert not fresh.left_over()


def test_hosts_get_neither_the_mcp_server_nor_the_ssh_client(used: Host) -> None:
    python = used.ensure()
    for name in ("mcp_server", "mcp", "asyncssh"):
        assert runs(python, f"import importlib.util as u; print(u.find_spec('{name}'))") == "None"


def test_the_second_call_is_one_round_trip_and_changes_nothing(used: Host) -> None:
    python = used.ensure()
    made = (python.parent.parent / "raylaunch.json").stat().st_mtime_ns
    before = used.daemon.log().count("Starting session:")
    assert used.ensure() == python
    assert used.daemon.log().count("Starting session:") == before + 1
    assert [step.state for step in used.steps] == ["kept"]
    assert (python.parent.parent / "raylaunch.json").stat().st_mtime_ns == made


def test_the_program_raylaunch_works_there(host: Host) -> None:
    python = host.ensure()
    program = str(python.parent / "raylaunch")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert __version__ in done.stdout
    modules = sorted(path.stem for path in (Path(__file__).parent.parent / "raylaunch" / "cli").glob("[a-z]*.py"))
    runs(python, "import importlib\n" + "\n".join(f"importlib.import_module('raylaunch.cli.{one}')" for one in modules))


def test_the_environment_is_private_to_its_user(used: Host) -> None:
    used.ensure()
    folders = (used.root, used.root / "versions", used.root / "wheels")
    assert not [path for path in folders if path.stat().st_mode & 0o77]


def test_a_root_with_a_space_and_a_quote_serves(fresh: Host, tmp_path: Path) -> None:
    fresh.root = tmp_path / "it's here"
    python = fresh.ensure()
    assert versions_of(python) == VERSIONS
    program = [str(python.parent / "raylaunch"), "--version"]
    assert __version__ in subprocess.run(program, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_wheel_that_is_there_is_not_pushed_again(host: Host) -> None:
    python = host.ensure()
    shutil.rmtree(python.parent.parent)
    host.ensure()
    assert host.did("push") == ["kept"]


def test_a_wheel_that_was_damaged_on_the_host_is_pushed_anew(host: Host) -> None:
    (wheel,) = host.root.glob("wheels/*/psutil-*.whl")
    whole = wheel.read_bytes()
    wheel.unlink()  # the file is another host's as well
    wheel.write_bytes(whole[:1000])
    assert versions_of(host.ensure()) == VERSIONS
    assert host.did("install") == ["begins", "note", "begins", "done"]
    assert wheel.read_bytes() == whole


def test_another_version_shares_its_files_with_the_first(host: Host) -> None:
    python = host.ensure()
    first = python.parent.parent
    older = first.rename(first.with_name("0.0.9-older"))
    again = host.ensure().parent.parent
    module = "lib/python{}.{}/site-packages/pydantic/main.py".format(*sys.version_info[:2])
    assert (older / module).samefile(again / module)


def test_two_callers_at_once_make_it_once(fresh: Host) -> None:
    made: list[str] = []

    async def one() -> None:
        async with machine(fresh.daemon.target) as connection:
            await ensure_environment(
                connection, PYTHON, store=fresh.store, way="push", root=str(fresh.root), on_step=fresh.steps.append
            )
            made.extend(str(path) for path in (fresh.root / "versions").glob("[!.]*"))

    async def both() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one)
            tasks.start_soon(one)

    anyio.run(both)
    assert len(set(made)) == 1
    assert sum("checks that everything" in step.message for step in fresh.steps) == 1
    assert not fresh.left_over()


def test_a_folder_without_its_mark_is_not_taken_for_an_environment(host: Host) -> None:
    python = host.ensure()
    (python.parent.parent / "raylaunch.json").unlink()
    (python.parent.parent / "lib").rename(host.root / "lib")
    assert host.ensure() == python
    assert versions_of(python) == VERSIONS


def test_an_environment_whose_interpreter_is_gone_is_made_anew(host: Host) -> None:
    python = host.ensure()
    python.unlink()
    python.symlink_to("/nowhere/python")
    assert host.ensure() == python
    assert versions_of(python) == VERSIONS


CLIENT = """
import json, sys
import anyio
from pathlib import Path
from raylaunch.cluster.install.environment import HostPython, ensure_environment
from raylaunch.cluster.install.pins import WheelPlatform
from raylaunch.cluster.ssh.machine import Target, machine
from raylaunch.cluster.install.wheels import WheelStore

asked = json.loads(sys.argv[1])
target = Target(**asked["target"], ssh_config=Path(asked["config"]), known_hosts=Path(asked["known_hosts"]))
python = HostPython(asked["python"], WheelPlatform(*asked["platform"]))

async def main():
    async with machine(target) as connection:
        store = WheelStore(Path(asked["home"]))
        tell = lambda step: print(step.name, step.state, flush=True)
        await ensure_environment(connection, python, store=store, way="push", root=asked["root"], on_step=tell)

anyio.run(main)
"""


@pytest.mark.parametrize(
    "step",
    [
        pytest.param("wheels begins", marks=pytest.mark.long),
        "push waits",
        pytest.param("install begins", marks=pytest.mark.long),
        "install waits",
    ],
)
def test_a_client_killed_in_the_middle_of_a_step_can_be_run_again(
    fresh: Host, served: Index, tmp_path: Path, step: str
) -> None:
    target = fresh.daemon.target
    asked = {
        "target": {"name": "here", "host": target.host, "port": target.port, "user": target.user, "key": target.key},
        "config": str(target.ssh_config),
        "known_hosts": str(target.known_hosts),
        "python": PYTHON.path,
        "platform": [HERE.arch, HERE.glibc, HERE.python],
        "home": str(tmp_path / "client"),
        "root": str(fresh.root),
    }
    environ = {**served.environ(tmp_path / "client"), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, json.dumps(asked)], env=environ, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        assert any(line.strip() == step for line in client.stdout)
        client.send_signal(signal.SIGKILL)
    store = WheelStore(tmp_path / "client", environ=served.environ(tmp_path / "client"))
    assert versions_of(fresh.ensure(store=store)) == VERSIONS
    assert not fresh.left_over()


@pytest.mark.parametrize("step", ["push", "install"])
def test_a_link_that_is_cut_is_an_error_and_the_next_call_goes_on(fresh: Host, step: str) -> None:
    def cut(told: Step) -> None:
        if told.name == step and told.state == "begins":
            fresh.daemon.drop()

    error = fresh.refused(lambda: fresh.ensure(on_step=cut))
    assert isinstance(error, HostLostError)
    assert "lost" in error.message
    assert versions_of(fresh.ensure()) == VERSIONS
    assert not fresh.left_over()


def test_a_disk_without_room_is_said_before_anything_is_pushed(fresh: Host, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", kib=20_000) as disk:
        fresh.root = disk / "root"
        error = fresh.refused(fresh.ensure)
        assert not list(disk.rglob("*.whl"))
    assert isinstance(error, HostStorageError)
    assert error.host == "here"
    assert "are needed" in error.message


@pytest.mark.parametrize("step", ["push", "install"])
def test_a_disk_that_becomes_full_is_said_and_the_next_call_goes_on(fresh: Host, tmp_path: Path, step: str) -> None:
    with small_disk(tmp_path / "small", kib=600_000) as disk:
        fresh.root = disk / "root"
        ballast: list[Path] = []

        def fill_up(told: Step) -> None:
            if told.name == step and told.state == "begins":
                ballast.append(fill(disk, but_kib=200))

        error = fresh.refused(lambda: fresh.ensure(on_step=fill_up))
        assert isinstance(error, HostStorageError)
        assert "free" in error.message
        for file in ballast:
            file.unlink()
        assert versions_of(fresh.ensure()) == VERSIONS


def test_a_disk_from_which_nothing_can_be_run_is_refused(host: Host, tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", kib=600_000, options="noexec") as disk:
        host.root = disk / "root"
        error = host.refused(host.ensure)
    assert isinstance(error, HostStorageError)
    assert "noexec" in error.message
    assert "root:" in error.hint


def test_a_folder_that_may_not_be_written_is_refused(host: Host) -> None:
    host.root = Path("/proc/raylaunch")
    error = host.refused(host.ensure)
    assert isinstance(error, HostStorageError)
    assert "/proc" in error.message


def test_a_python_that_is_gone_is_said(host: Host) -> None:
    error = host.refused(lambda: host.ensure(python=replace(PYTHON, path="/nowhere/python3.11")))
    assert isinstance(error, HostStepError)
    assert "/nowhere/python3.11 cannot be run" in error.message


def test_another_machine_than_was_probed_is_refused(host: Host) -> None:
    other = WheelPlatform({"x86_64": "aarch64", "aarch64": "x86_64"}[HERE.arch], HERE.glibc, HERE.python)
    error = host.refused(lambda: host.ensure(python=replace(PYTHON, platform=other)))
    assert isinstance(error, VersionError)
    assert f"on {HERE.arch}, not" in error.message


def test_an_environment_that_does_not_work_never_gets_its_name(host: Host, served: Index, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(served.folder, folder)
    wheel = tiny_wheel(folder, "wandb", VERSIONS["wandb"], body="raise RuntimeError('no such luck')")
    with index(folder) as broken:
        store = WheelStore(tmp_path / "client", environ=broken.environ(tmp_path / "client"))
        error = host.refused(lambda: host.ensure(store=store))
    assert wheel.exists()
    assert isinstance(error, HostStepError)
    assert "no such luck" in error.message
    assert not list((host.root / "versions").glob("[!.]*"))


@pytest.fixture
def online(served: Index, store: WheelStore, tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Make a host with variables of its own; by default its pip knows the index."""
    with ExitStack() as stack:

        def make(**variables: str) -> Host:
            words = " ".join(f"{name}={value}" for name, value in (variables or {"PIP_INDEX_URL": served.url}).items())
            daemon = stack.enter_context(sshd(tmp_path / "online", extra=[f"SetEnv {words}"]))
            return Host(daemon, store, tmp_path / "root")

        yield make


def test_a_host_that_reaches_an_index_installs_from_there(online: Callable[..., Host], served: Index) -> None:
    host = online()
    served.asked.clear()
    python = host.ensure(way="auto", index_reachable=True)
    assert versions_of(python) == VERSIONS
    assert any(name.startswith("pydantic-") for name in served.fetched)
    pushed = {path.name.split("-")[0] for path in (host.root / "wheels").glob("*/*.whl")}
    assert pushed == {"uv", "raylaunch"}


def test_wheels_are_pushed_where_the_hosts_index_fails(online: Callable[..., Host]) -> None:
    host = online(PIP_INDEX_URL="http://127.0.0.1:9/simple/", UV_HTTP_RETRIES="0")
    python = host.ensure(way="auto", index_reachable=True)
    assert versions_of(python) == VERSIONS
    assert host.did("install")[:2] == ["begins", "note"]
    assert any("did not serve" in step.message for step in host.steps)


def test_an_index_that_was_asked_for_and_fails_is_an_error(online: Callable[..., Host]) -> None:
    host = online(PIP_INDEX_URL="http://127.0.0.1:9/simple/", UV_HTTP_RETRIES="0")
    error = host.refused(lambda: host.ensure(way="index"))
    assert isinstance(error, HostStepError)
    assert "127.0.0.1:9" in error.message


def test_where_no_index_is_reached_from_here_the_hosts_own_uv_serves(
    online: Callable[..., Host], served: Index, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "uv").symlink_to(find_uv(os.environ))
    host = online(PIP_INDEX_URL=served.url, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    offline = {**served.environ(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/simple/"}
    python = host.ensure(way="index", store=WheelStore(tmp_path / "client", environ=offline))
    assert versions_of(python) == VERSIONS


@pytest.fixture
def named(tmp_path: Path, served: Index) -> Path:
    """Make an environment as a user has it: with what is needed, and a package of his own."""
    folder = tmp_path / "named"
    tiny_wheel(tmp_path / "own", "colours", "3.0")
    links = ["--find-links", str(served.folder), "--find-links", str(tmp_path / "own")]
    names = [*(f"{name}=={VERSIONS[name]}" for name in EXACT), *own_wheel().requirements, "colours"]
    uv = find_uv(os.environ)
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "UV_CACHE_DIR": str(tmp_path / "uv")}
    for words in (
        ["venv", "--python", PYTHON.path, str(folder)],
        ["pip", "install", "--python", str(folder), "--no-index", *links, *names],
    ):
        subprocess.run([uv, *words, "--quiet", "--no-config"], env=environ, check=True, timeout=120)
    return folder


def listing(folder: Path) -> dict[str, int]:
    paths = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path): path.lstat().st_mtime_ns for path in paths if not path.is_dir()}


def test_raylaunch_is_put_beside_an_environment_that_the_user_names(host: Host, named: Path) -> None:
    before = listing(named)
    python = host.ensure_beside(str(named))
    assert versions_of(python) == VERSIONS
    assert runs(python, "import colours, raylaunch.cluster.on_host; print(colours.__version__)") == "3.0"
    assert (python.parent / "uv").exists()  # programs of the named environment are found beside it
    assert listing(named) == before
    assert host.ensure_beside(f"{named}/bin/python") != python  # another name, another environment
    assert host.ensure_beside(str(named)) == python
    assert [step.state for step in host.steps] == ["kept"]


def test_the_environment_beside_runs_isolated_as_well(host: Host, named: Path) -> None:
    python = host.ensure_beside(str(named))
    argv = [str(python), "-I", "-c", "import ray, colours, raylaunch.cluster.on_host, sys; print(sys.prefix)"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(python.parent.parent)


def test_an_environment_that_lacks_something_is_refused_with_the_command_that_mends_it(host: Host, named: Path) -> None:
    (packages,) = named.glob("lib/*/site-packages")
    (info,) = packages.glob("wandb-*.dist-info")
    info.rename(packages / "wandb-0.1.dist-info")
    metadata = packages / "wandb-0.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace(f"Version: {VERSIONS['wandb']}", "Version: 0.1"))
    (psutil,) = packages.glob("psutil-*.dist-info")
    shutil.rmtree(psutil)
    error = host.refused(lambda: host.ensure_beside(str(named)))
    assert isinstance(error, VersionError)
    assert f"it has wandb 0.1, not =={VERSIONS['wandb']}" in error.message
    assert "it has no psutil" in error.message
    assert f"{named}/bin/python -m pip install" in error.hint
    assert f"'wandb=={VERSIONS['wandb']}'" in error.hint


def test_an_environment_without_ray_is_refused(host: Host) -> None:
    error = host.refused(lambda: host.ensure_beside(PYTHON.path))
    assert isinstance(error, VersionError)
    assert "it has no ray" in error.message


def test_an_environment_that_does_not_exist_is_said(host: Host) -> None:
    error = host.refused(lambda: host.ensure_beside("/nowhere/env"))
    assert isinstance(error, HostStepError)
    assert "/nowhere/env is neither a Python interpreter nor an environment" in error.message


def test_of_a_named_environment_too_a_later_change_is_noticed(host: Host, named: Path) -> None:
    host.ensure_beside(str(named))
    (packages,) = named.glob("lib/*/site-packages")
    (info,) = packages.glob("ray-*.dist-info")
    shutil.rmtree(info)
    assert "it has no ray" in host.refused(lambda: host.ensure_beside(str(named))).message


def test_progress_is_told_while_wheels_are_pushed(fresh: Host) -> None:
    fresh.ensure()
    pushed = [step.message for step in fresh.steps if step.name == "push" and step.state == "waits"]
    assert pushed
    assert all("pushed" in words and "MB of" in words for words in pushed)
    wait_until(lambda: not fresh.left_over(), 5, "nothing is left over")
