"""The environment of this raylaunch version on a host: looked for in one round trip, and made where it is missing.

``<root>/versions/<version>-<digest>`` on the host is a virtual environment that never changes. Its name stands for all
that decides what is in it: raylaunch's own code, the versions that are installed here, the host's platform and Python.
"""

from __future__ import annotations

from typing import Literal

from raylaunch.cluster.install.call import STEP, Interpreter, OnStep
from raylaunch.cluster.install.host import HostInstaller
from raylaunch.cluster.install.pins import HostPython
from raylaunch.cluster.install.wanted import wanted_beside, wanted_on
from raylaunch.cluster.install.wheels import WheelStore
from raylaunch.cluster.plan import Step
from raylaunch.cluster.ssh.machine import Machine
from raylaunch.errors import HostStepError

__all__ = ["HostPython", "OnStep", "Way", "ensure_beside", "ensure_environment"]

Way = Literal["auto", "index", "push"]

ROOT = "~/.raylaunch"


async def ensure_environment(  # noqa: PLR0913 -- all keywords, each with a sentence
    machine: Machine,
    python: HostPython,
    *,
    store: WheelStore,
    way: Way = "auto",
    index_reachable: bool = False,
    root: str = ROOT,
    limit_bytes_per_s: float | None = None,
    on_step: OnStep,
) -> str:
    """Have this raylaunch's environment on a host; return the path of its Python there.

    Args:
        machine: the host.
        python: its interpreter, and what it runs on.
        store: where wheels are gathered here.
        way: ``index``: the host installs from its own package index; ``push``: wheels are gathered here and sent;
            ``auto``: from the index where the host reaches one, and by pushing if that fails.
        index_reachable: whether the host reaches a package index.
        root: raylaunch's folder on the host.
        limit_bytes_per_s: how much of the link pushing may take.
        on_step: told each step, and how far it is.

    Raises:
        HostError: the host cannot be used as it is, a step failed there, or it was lost.
        ClusterStartError: what it needs cannot be had here.
        VersionError: what it needs does not exist for its platform.
        StorageError: the disk here is full.
    """
    wanted = wanted_on(store.own, python.platform)
    host = HostInstaller(
        machine,
        Interpreter(python.path),
        wanted,
        store,
        on_step,
        root=root,
        limit_bytes_per_s=limit_bytes_per_s,
        platform=python.platform,
    )
    if ready := await host.look():
        return ready
    if way == "push" or (way == "auto" and not index_reachable):
        return await host.by_pushing(python.platform)
    try:
        return await host.from_index(python.platform)
    except HostStepError as error:
        if way == "index":
            raise
        words = f"the host's package index did not serve, so wheels are pushed: {error.message}"
        on_step(Step(STEP, "note", words))
        return await host.by_pushing(python.platform)


async def ensure_beside(  # noqa: PLR0913 -- as above
    machine: Machine,
    environment: str,
    *,
    store: WheelStore,
    root: str = ROOT,
    limit_bytes_per_s: float | None = None,
    on_step: OnStep,
) -> str:
    """Check an environment that the user names, and have raylaunch beside it; return the path of a Python of both.

    Args:
        machine: the host.
        environment: a virtual or conda environment there, or the interpreter of one.
        store: where wheels are gathered here.
        root: raylaunch's folder on the host.
        limit_bytes_per_s: how much of the link pushing may take.
        on_step: told each step.

    Raises:
        VersionError: it does not hold what is needed; the hint is the command that mends it.
        HostError: it cannot be used, a step failed on the host, or it was lost.
    """
    wanted = wanted_beside(store.own, environment)
    interpreter = Interpreter(environment, named=True)
    host = HostInstaller(machine, interpreter, wanted, store, on_step, root=root, limit_bytes_per_s=limit_bytes_per_s)
    return await host.look() or await host.beside()
