"""The real Ray on hosts without a route out and with nothing but a Python: by pushing, over links that are cut."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from support.fittings import add_user, bare_python, find_python, only_python
from support.hosts import Host, World, world

from raylaunch.cluster.install.environment import ensure_environment
from raylaunch.cluster.install.platforms import EXACT, HostPython, WheelPlatform, installed_version
from raylaunch.cluster.install.wheel_store import WheelStore
from raylaunch.cluster.types import Step
from raylaunch.errors import HostError, HostLostError
from raylaunch.ssh.host import machine
from raylaunch.version import __version__

pytestmark = [pytest.mark.machines, pytest.mark.slow, pytest.mark.long]

VERSIONS = " ".join([__version__, *(installed_version(name) for name in EXACT)])
SLOW_BYTES_PER_S = 20e6


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture(scope="module")
def host(lab: World) -> Host:
    """A host as a minimal Debian is: a Python without pip, ensurepip and venv."""
    made = lab.host("bare")
    bare_python(made)
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> WheelStore:
    return WheelStore(tmp_path_factory.mktemp("client"))


def python_of(host: Host, path: str = "/usr/bin/python3") -> HostPython:
    version = host.out(f"{path} -c 'import platform; print(platform.python_version())'")
    return HostPython(path, WheelPlatform(platform.machine(), platform.libc_ver()[1], version))


async def installed(  # noqa: PLR0913 -- what the tests vary
    host: Host,
    store: WheelStore,
    *,
    root: str = "~/.raylaunch",
    user: str = "root",
    python: HostPython | None = None,
    on_step: Callable[[Step], None] = lambda _step: None,
    limit_bytes_per_s: float | None = None,
) -> str:
    async with machine(host.target(user)) as connection:
        return await ensure_environment(
            connection,
            python or python_of(host),
            store=store,
            root=root,
            on_step=on_step,
            limit_bytes_per_s=limit_bytes_per_s,
        )


def versions_on(host: Host, python: str, *, user: str = "root") -> str:
    program = "import ray, wandb, raylaunch.version as r; print(r.__version__, ray.__version__, wandb.__version__)"
    return host.out(f"cd /; {python} -c '{program}'", user=user, timeout_s=120)


def test_a_host_without_pip_venv_and_network_gets_the_clients_ray(host: Host, store: WheelStore) -> None:
    assert host.run("python3 -m venv /tmp/none", check=False).status != 0
    python = anyio.run(lambda: installed(host, store))
    assert python.startswith("/root/.raylaunch/versions/")
    assert versions_on(host, python) == VERSIONS
    assert "ray, version" in host.out(f"{Path(python).parent}/ray --version", timeout_s=120)


def test_several_hosts_and_an_ordinary_user_are_served_at_once(lab: World, host: Host, store: WheelStore) -> None:
    other = lab.host("other")
    add_user(other, "ada")
    found: dict[str, str] = {}

    async def one(which: Host, user: str, root: str) -> None:
        found[user] = await installed(which, store, user=user, root=root)

    async def both() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, other, "ada", "~/.raylaunch")
            tasks.start_soon(one, host, "root", "/root/second")

    anyio.run(both)
    assert found["ada"].startswith("/home/ada/.raylaunch/")
    assert versions_on(other, found["ada"], user="ada") == VERSIONS
    assert versions_on(host, found["root"]) == VERSIONS
    other.power_off()


def test_a_host_with_an_older_python_gets_versions_that_fit_it(lab: World, store: WheelStore) -> None:
    prefix = find_python("3.10")
    older = lab.host("older", share={prefix: Path("/opt/python")})
    only_python(prefix, older)
    python = anyio.run(lambda: installed(older, store, python=python_of(older, "/opt/python/bin/python3.10")))
    assert versions_on(older, python) == VERSIONS
    assert older.out(f"{python} -c 'import sys; print(sys.version_info[:2])'") == "(3, 10)"
    older.power_off()


@pytest.mark.parametrize("step", ["push", "install"])
def test_a_cut_link_ends_in_an_error_and_the_next_call_goes_on(host: Host, store: WheelStore, step: str) -> None:
    root = f"/root/cut-{step}"

    def cut(reported: Step) -> None:
        if reported.name == step and reported.state == "waits":
            host.cut()

    with pytest.raises(HostError) as caught:
        anyio.run(lambda: installed(host, store, root=root, on_step=cut, limit_bytes_per_s=SLOW_BYTES_PER_S))
    host.restore()
    assert isinstance(caught.value, HostLostError)
    named = host.out(f"ls {root}/versions 2>/dev/null || true").split()
    assert all(host.path(f"{root}/versions/{name}/raylaunch.json").exists() for name in named)  # whole, if at all
    assert versions_on(host, anyio.run(lambda: installed(host, store, root=root))) == VERSIONS


def test_what_arrived_before_the_cut_is_not_sent_again(host: Host, store: WheelStore) -> None:
    reported: list[Step] = []

    def cut(step: Step) -> None:
        if step.name == "push" and step.message.startswith("pushed 1") and len(step.message.split()[1]) == len("100"):
            host.cut()  # it has pushed 100 MB or more, of 150

    with pytest.raises(HostLostError):
        anyio.run(lambda: installed(host, store, root="/root/part", on_step=cut, limit_bytes_per_s=SLOW_BYTES_PER_S))
    host.restore()
    reported.clear()
    anyio.run(lambda: installed(host, store, root="/root/part", on_step=reported.append))
    started = next(step.message for step in reported if step.name == "push" and step.state == "begins")
    first = next(step.message for step in reported if step.message.startswith("pushed") and step.state == "waits")
    total = started.rpartition(", ")[2]
    assert first.endswith(f"of {total}")
    assert not first.startswith("pushed 0 MB")
