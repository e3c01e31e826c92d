"""A cluster's processes: started in the background, identified by pid and start time, found, and ended."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals

import anyio
import psutil
from pydantic import BaseModel, ConfigDict

from raylaunch.errors import ClusterStartError
from raylaunch.files import rotate
from raylaunch.paths import storage_error
from raylaunch.runner.processes import kernel_boot_id, started_ticks

VAR_CONTROLLER_OF = "RAYLAUNCH_CONTROLLER_OF"
"""In the environment of the controller and its children; not in Ray's, which may be restarted alone."""

CONTROLLER = "raylaunch.controller"

VAR_CLUSTER_ID = "RAYLAUNCH_CLUSTER_ID"
"""In the environment of Ray and of everything that it starts: `down` finds them by it."""

_VAR_ATTEMPT = "RAYLAUNCH_ATTEMPT_ID"  # runner.contract.VAR_ATTEMPT: ``<cluster id>/<job>-<n>``
_AGENT_TITLES = ("ray::NodeAgent", "ray::Steward")
"""The titles of node agents of this version and of 0.1."""
_OWN = ("raylet", "gcs_server", "ray::", "ray-")
_POLL_S = 0.05

# The launcher exits at once, so that init adopts what it starts: no zombie stays behind in a long-lived notebook.
_LAUNCHER = """
import json, os, signal, subprocess, sys
order = json.load(sys.stdin)
os.umask(0o077)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
try:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(log, order["first_line"].encode())
    child = subprocess.Popen(order["argv"], env=order["env"], cwd=order["cwd"], stdin=subprocess.DEVNULL,
                             stdout=log, stderr=log, start_new_session=True)
    answer = {"pid": child.pid}
except OSError as error:
    answer = {"errno": error.errno, "strerror": error.strerror, "filename": str(error.filename or order["log"])}
sys.stdout.write(json.dumps(answer))
sys.stdout.flush()
os._exit(0)
"""


class ProcessIdentity(BaseModel):
    """One process, uniquely: a reused pid has another start time, and another boot another id."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started_at: float
    """Seconds since the epoch, to be shown."""
    ticks: int
    """Start time in the kernel's clock ticks; 0 without /proc."""
    boot_id: str
    argv: tuple[str, ...] = ()


@functools.cache
def boot_id() -> str:
    """Return the id of this boot of this machine."""
    try:
        return kernel_boot_id()
    except OSError:
        return f"boot-{psutil.boot_time():.0f}"


def identify(pid: int, argv: Sequence[str] = ()) -> ProcessIdentity | None:
    """Return the identity of the process that has `pid` now; None if there is none, or it is a zombie."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        started_at = process.create_time()
    except psutil.NoSuchProcess:
        return None
    return ProcessIdentity(
        pid=pid, started_at=started_at, ticks=started_ticks(pid), boot_id=boot_id(), argv=tuple(argv or _argv(process))
    )


def is_alive(identity: ProcessIdentity | None) -> bool:
    """Return whether exactly this process still runs."""
    if identity is None or identity.boot_id != boot_id():
        return False
    now = identify(identity.pid, identity.argv or ("?",))
    if now is None or now.ticks != identity.ticks:
        return False
    return bool(now.ticks) or abs(now.started_at - identity.started_at) < 1


def _argv(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


async def start_apart(
    argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path, first_line: str = ""
) -> ProcessIdentity:
    """Start a program in its own session, with umask 077, its output appended to `log`.

    Raises:
        StorageError: the log cannot be written.
        ClusterStartError: the program cannot be started.
    """
    order = {"argv": list(argv), "env": dict(env), "cwd": str(cwd), "log": str(log), "first_line": first_line}
    rotate(log)
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER]
    with anyio.CancelScope(shield=True):  # otherwise a started process could be lost
        done = await anyio.run_process(launcher, input=json.dumps(order).encode(), check=True, stderr=subprocess.STDOUT)
    answer = json.loads(done.stdout)
    if "pid" not in answer:
        error = OSError(answer["errno"], answer["strerror"])
        if answer["filename"] == str(log):
            raise storage_error(error, log)
        msg = f"cannot start {argv[0]}: {answer['strerror']} ({answer['filename']})"
        raise ClusterStartError(msg, hint="check that this Python environment is complete", step="start")
    found = identify(answer["pid"], argv)
    if found is None:
        msg = (
            f"{Path(argv[0]).name} ended as soon as it was started: {last_lines(log, count=1) or 'it printed nothing'}"
        )
        raise ClusterStartError(msg, hint=f"see {log}", step="start", log_path=str(log))
    return found


async def end(identities: Iterable[ProcessIdentity], *, grace_s: float) -> dict[int, str]:
    """End processes: SIGTERM, up to `grace_s` seconds, SIGKILL. Return by pid how each ended.

    The values are ``already gone``, ``SIGTERM``, ``SIGKILL``, or ``still there`` for a process that SIGKILL did not end
    within 10 s because it waits for a broken disk or driver.
    """
    ours = list(identities)
    how = {one.pid: "SIGTERM" if _send(one, SIGTERM) else "already gone" for one in ours}
    left = await wait_gone(ours, limit_s=grace_s)
    for one in left:
        if _send(one, SIGKILL):
            how[one.pid] = "SIGKILL"
    for one in await wait_gone(left, limit_s=10):
        how[one.pid] = "still there"
    return how


async def kill(identities: Iterable[ProcessIdentity]) -> None:
    """End processes by SIGKILL, and wait up to 10 s until they have exited."""
    ours = list(identities)
    for one in ours:
        _send(one, SIGKILL)
    await wait_gone(ours, limit_s=10)


async def wait_gone(identities: Iterable[ProcessIdentity], *, limit_s: float) -> list[ProcessIdentity]:
    """Wait until none of them runs; return those that still run after `limit_s` seconds."""
    left = [one for one in identities if is_alive(one)]
    with anyio.move_on_after(limit_s):
        while left:
            await anyio.sleep(_POLL_S)
            left = [one for one in left if is_alive(one)]
    return left


def _send(identity: ProcessIdentity, signal: Signals) -> bool:
    if not is_alive(identity):
        return False
    try:
        os.kill(identity.pid, signal)
    except ProcessLookupError:
        return False
    return True


def matching(wanted: Callable[[psutil.Process], bool], *, uid: int | None) -> list[ProcessIdentity]:
    """Return the processes of user `uid` (None: of every user) for which `wanted` is true, except this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or (uid is not None and process.uids().real != uid):
                continue
            if process.status() != psutil.STATUS_ZOMBIE and wanted(process):
                found.append(identify(process.pid))
        except (psutil.Error, OSError):  # it has exited meanwhile, or may not be inspected
            continue
    return [one for one in found if one is not None]


def of_ray(cluster_id: str, head: ProcessIdentity | None, temp: Path) -> list[ProcessIdentity]:
    """Return a cluster's Ray processes: the head's descendants, its session, and all with its id in the environment."""
    tree = _descendants(head)

    def ours(process: psutil.Process) -> bool:
        if process.pid in tree or _has_id(process, cluster_id):
            return True
        return head is not None and os.getsid(process.pid) == head.pid and _looks_like_ray(process, temp)

    return matching(ours, uid=os.getuid())


def of_controller(cluster_id: str) -> list[ProcessIdentity]:
    """Return the controller's processes of a cluster: itself, its bridge to Ray, and the restart of Ray."""
    return matching(lambda process: process.environ().get(VAR_CONTROLLER_OF) == cluster_id, uid=os.getuid())


def runners(cluster_id: str) -> list[ProcessIdentity]:
    """Return the runners of a cluster's jobs: at SIGTERM they stop their training with its grace, and finish W&B."""

    def ours(process: psutil.Process) -> bool:
        tagged = process.environ().get(_VAR_ATTEMPT, "").startswith(f"{cluster_id}/")
        return tagged and any(word.endswith("/runner.pyz") for word in process.cmdline())

    return matching(ours, uid=os.getuid())


def node_agents(head: ProcessIdentity | None) -> list[ProcessIdentity]:
    """Return the node agents of a Ray on this machine; Ray restarts one that exits."""
    tree = _descendants(head)
    return matching(lambda one: one.pid in tree and one.cmdline()[0].startswith(_AGENT_TITLES), uid=os.getuid())


def _descendants(head: ProcessIdentity | None) -> set[int]:
    if head is None or not is_alive(head):
        return set()
    try:
        return {head.pid, *(child.pid for child in psutil.Process(head.pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()


def _has_id(process: psutil.Process, cluster_id: str) -> bool:
    environ = process.environ()
    return environ.get(VAR_CLUSTER_ID) == cluster_id or environ.get(_VAR_ATTEMPT, "").startswith(f"{cluster_id}/")


def _looks_like_ray(process: psutil.Process, temp: Path) -> bool:
    """Check session and title: Ray's workers overwrite their environment with their title."""
    line = " ".join(process.cmdline())
    return str(temp) in line or line.startswith(_OWN) or "/ray/" in line


async def sweep_ray(cluster_id: str, head: ProcessIdentity | None, temp: Path) -> dict[ProcessIdentity, str]:
    """End all of Ray's processes that are left of a cluster; return how each ended.

    It repeats until none is found, because an ended process may just have started another.
    """
    ended: dict[ProcessIdentity, str] = {}
    for _ in range(5):
        left = of_ray(cluster_id, head, temp)
        if not left:
            break
        how = await end(left, grace_s=3)
        ended |= {one: how[one.pid] for one in left}
    return ended


def last_lines(log: Path, *, start: int = 0, count: int = 12) -> str:
    """Return the last `count` lines that were written to `log` after byte `start`; empty if there are none."""
    try:
        with log.open("rb") as file:
            end_of_file = file.seek(0, os.SEEK_END)
            file.seek(max(start, end_of_file - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join([line.rstrip() for line in text.splitlines() if line.strip()][-count:])
