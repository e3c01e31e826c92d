"""A host with nothing of raylaunch on it (a folder of this machine behind a real sshd), and a package index beside it.

Ray and wandb are stand-ins there, of the client's versions; everything else is what is installed here.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest

from raylaunch.cluster.install.environment import ensure_beside, ensure_environment
from raylaunch.cluster.install.platforms import EXACT, HostPython, WheelPlatform, installed_pins, installed_version
from raylaunch.cluster.install.wheel_store import WheelStore, own_wheel
from raylaunch.cluster.types import Step
from raylaunch.errors import RaylaunchError
from raylaunch.ssh.host import machine
from raylaunch.version import __version__
from support.index import Index, index, installed_wheel, tiny_wheel
from support.sshd import Sshd, sshd

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


@pytest.fixture(scope="session")
def wheel_index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    """A package index that has what a host needs."""
    folder = tmp_path_factory.mktemp("index")
    fill_index(folder)
    with index(folder) as found:
        yield found


@pytest.fixture(scope="session")
def wheel_store(tmp_path_factory: pytest.TempPathFactory, wheel_index: Index) -> WheelStore:
    """What a client gathers from that index."""
    home = tmp_path_factory.mktemp("client")
    return WheelStore(home, environ=wheel_index.environ(home))


@pytest.fixture(scope="session")
def bare_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """The way in to all hosts of this kind."""
    with sshd(tmp_path_factory.mktemp("sshd"), extra=["LogLevel VERBOSE"]) as found:
        yield found


@dataclass
class BareHost:
    """A host with nothing of raylaunch on it: a folder of this machine, reached through sshd."""

    daemon: Sshd
    store: WheelStore
    root: Path
    steps: list[Step] = field(default_factory=list)

    def ensure(
        self,
        *,
        python: HostPython = PYTHON,
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

        def report(step: Step) -> None:
            self.steps.append(step)
            on_step(step)

        return report

    def did(self, name: str) -> list[str]:
        """Return the states of one step, without how far it was in between."""
        return [step.state for step in self.steps if step.name == name and step.state != "waits"]

    def left_over(self) -> list[Path]:
        """Return what is in the folder of environments beside complete ones and locks."""
        found = (self.root / "versions").glob(".*")
        return [path for path in found if path.suffix != ".lock"]


@pytest.fixture
def fresh_host(bare_sshd: Sshd, wheel_store: WheelStore, tmp_path: Path) -> BareHost:
    """A host that never saw raylaunch."""
    return BareHost(bare_sshd, wheel_store, tmp_path / "root")


@pytest.fixture(scope="session")
def used_host(bare_sshd: Sshd, wheel_store: WheelStore, tmp_path_factory: pytest.TempPathFactory) -> BareHost:
    """A host that has an environment, which no test may change."""
    host = BareHost(bare_sshd, wheel_store, tmp_path_factory.mktemp("used"))
    host.ensure()
    return host


@pytest.fixture
def stocked_host(used_host: BareHost, tmp_path: Path) -> BareHost:
    """A host that has all wheels (the same files), and no environment."""
    root = tmp_path / "root"
    shutil.copytree(used_host.root / "wheels", root / "wheels", copy_function=os.link)
    return BareHost(used_host.daemon, used_host.store, root)


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
