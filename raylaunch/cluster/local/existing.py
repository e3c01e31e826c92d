"""A Ray cluster that somebody else runs: the controller runs here and submits to it; Ray itself is not changed.

Ray carries the node agents there. `down` ends the controller and the node agents, and nothing of Ray.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import anyio.to_thread

from raylaunch.cluster.local.backend import end_controller, reach
from raylaunch.cluster.local.controller_process import ControllerStart, controller_status
from raylaunch.cluster.local.health import http_request
from raylaunch.cluster.local.inspect import LocalInspection, check_versions, differences, inspect_cluster, status_of
from raylaunch.cluster.local.ray_head import clean_environment, make_importable
from raylaunch.cluster.local.steps import StepLog
from raylaunch.cluster.ports import is_loopback, wait_free
from raylaunch.cluster.progress import locked
from raylaunch.cluster.record import (
    ClusterRecord,
    cluster_lock,
    current_versions,
    load_record,
    new_record,
    save_record,
    store_of,
)
from raylaunch.cluster.trust import check_accepted
from raylaunch.cluster.types import DownReport, Plan, Step
from raylaunch.errors import ClusterStartError, SpecError, VersionError
from raylaunch.models.cluster import ClusterStatus, ControllerStatus
from raylaunch.models.cluster_spec import TUNNEL_HINT, ClusterSpec
from raylaunch.paths import (
    ClusterPaths,
    cluster_paths,
    make_cluster_dirs,
    make_store,
    raylaunch_home,
    secret_file,
    storage_errors,
    write_private,
)
from raylaunch.ssh.target import OnPrompt

__all__ = ["down", "plan", "reach", "status", "up"]

LOCK_S = 600.0
AGENT_S = 120.0
_RAY_S = 10.0
_RELEASE_S = 60.0
_HTTP_REFUSED = (401, 403)
_RELEASE = "raylaunch.controller.ray.release"
"""Ends the node agents; a program of its own because it connects to Ray."""


async def check_ray(spec: ClusterSpec) -> str:
    """Check that this machine can use that Ray as the spec asks; return its version.

    Raises:
        ClusterStartError: no Ray answers there, it rejects the token, or its head does not listen where it should.
        SpecError: see `token_of` and `check_certificates`.
        VersionError: another Ray is installed here.
    """
    version, installed = await _ray_version(spec), importlib.metadata.version("ray")
    if version != installed:
        msg = f"Ray {version} runs at {spec.address}, and Ray {installed} is installed here"
        install = f"{sys.executable} -m pip install 'ray[default]=={version}'"
        raise VersionError(msg, hint=f"only the same Ray may connect: {install}")
    check_certificates(spec)
    host, _, port = spec.gcs_address.rpartition(":")
    try:
        with anyio.fail_after(_RAY_S):
            await (await anyio.connect_tcp(host.strip("[]"), int(port))).aclose()
    except (OSError, TimeoutError) as error:
        why = getattr(error, "strerror", "") or f"no answer within {_RAY_S:.0f} s"
        msg = f"the head of the Ray at {spec.address} cannot be reached at {spec.gcs_address}: {why}"
        hint = f"gcs: is its address, HOST:6379, which this machine must reach; otherwise {TUNNEL_HINT}"
        raise ClusterStartError(msg, hint=hint, step="ray") from None
    return version


async def _ray_version(spec: ClusterSpec) -> str:
    where, token = urlsplit(spec.address), token_of(spec)
    answer = await http_request(
        where.port or (443 if where.scheme == "https" else 8265),
        "/api/version",
        host=where.hostname or "",
        token=token,
        limit_s=_RAY_S,
        secure=where.scheme == "https",
    )
    if answer.status in _HTTP_REFUSED:
        rejected = f"it rejects the token in {spec.ray_token_file}" if spec.ray_token_file else "it requires a token"
        msg = f"cannot use Ray at {spec.address}: {rejected}"
        raise ClusterStartError(msg, hint="name its token file: ray_token_file: ~/.ray/auth_token", step="ray")
    said = answer.json()
    if answer.ok and isinstance(said, dict) and said.get("ray_version"):
        return str(said["ray_version"])
    msg = f"no Ray answers at {spec.address}: {answer.why or f'it answered HTTP {answer.status}'}"
    hint = "set address to its dashboard, such as http://HOST:8265; check that Ray is up and reachable from here"
    raise ClusterStartError(msg, hint=hint, step="ray")


def token_of(spec: ClusterSpec) -> str:
    """Return Ray's token; empty if the spec names no token file.

    Raises:
        SpecError: the file cannot be read, is not in a folder for such tokens, or the token would be sent unencrypted.
    """
    if not spec.ray_token_file:
        return ""
    path, where = Path(spec.ray_token_file).expanduser(), urlsplit(spec.address)
    own = (raylaunch_home(), Path("~/.ray").expanduser())
    if not any(path.resolve().is_relative_to(folder.resolve()) for folder in own):
        msg = f"{spec.ray_token_file} cannot be a token file: tokens are read only from {own[0]} and {own[1]}"
        raise SpecError(msg, field="ray_token_file", hint=f"if it holds that Ray's token, copy the file into {own[1]}")
    if where.scheme != "https" and not is_loopback(where.hostname or ""):
        msg = f"Ray's token would be sent unencrypted to {spec.address}"
        hint = "use https:// if that Ray is behind a proxy, or a tunnel: ssh -L 8265:localhost:8265 HOST"
        raise SpecError(msg, field="address", hint=f"{hint}, and address: http://localhost:8265")
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        msg = f"Ray's token cannot be read from {path}: {getattr(error, 'strerror', '') or error}"
        raise SpecError(msg, field="ray_token_file", hint="it contains only the token, as auth_token does") from None


def check_certificates(spec: ClusterSpec) -> None:
    """Check that the files of ``ray_tls`` exist: without them Ray's own process would exit without a reason.

    Raises:
        SpecError: one cannot be read.
    """
    files = spec.ray_tls.model_dump() if spec.ray_tls else {}
    for name, text in files.items():
        if not os.access(Path(text).expanduser(), os.R_OK):
            msg = f"the certificate file {text} does not exist, or cannot be read"
            hint = "ray_tls names PEM files on this machine: those of RAY_TLS_CA_CERT, RAY_TLS_SERVER_CERT and _KEY"
            raise SpecError(msg, field=f"ray_tls.{name}", hint=hint)


async def plan(spec: ClusterSpec, /, *, on_prompt: OnPrompt | None = None) -> Plan:
    """Return what `up` would do, without changing anything. Raises like `up`, as far as that is known before."""
    await check_accepted(spec, on_prompt=on_prompt)
    runs = await check_ray(spec)
    paths = cluster_paths(spec.name)
    seen = await inspect_cluster(paths)
    kept: tuple[str, ...] = (f"Ray {runs} at {spec.address}, which raylaunch did not start",)
    if seen.record and seen.record.controller and seen.controller_alive:
        kept += (f"the controller (pid {seen.record.controller.pid})",)
        return Plan(cluster=spec.name, actions=(), keeps=kept, notes=differences(spec, seen.record))
    actions = (
        f"the controller here, {f'port {spec.port}' if spec.port else 'on a free port'}, log {paths.controller_log}",
        "a node agent on each node, carried there by Ray",
    )
    return Plan(cluster=spec.name, actions=actions, keeps=kept, notes=warnings(spec))


def warnings(spec: ClusterSpec) -> tuple[str, ...]:
    """Return what a person should know about that Ray. Pure."""
    open_to_all = "it requires no token: anyone who reaches its ports can run programs as its account"
    return () if spec.ray_token_file else (f"Ray at {spec.address}: {open_to_all}",)


async def up(
    spec: ClusterSpec,
    /,
    *,
    on_step: Callable[[Step], None],
    on_prompt: OnPrompt | None = None,
) -> ClusterStatus:
    """Start the controller here, and a node agent on each node. Ray is not changed.

    Raises:
        ClusterStartError: Ray does not answer, or a step failed; everything that this call started has been ended.
        VersionError: another Ray is installed here than runs there, or the controller is of a newer raylaunch.
        SpecError: Ray's token file cannot be read.
        UntrustedError: nobody has accepted its address.
    """
    await check_accepted(spec, on_prompt=on_prompt)
    runs = await check_ray(spec)
    paths = cluster_paths(spec.name)
    make_cluster_dirs(paths)
    async with locked(paths, on_step, limit_s=LOCK_S) as report:
        await _start(paths, spec, runs, report)
        seen = await inspect_cluster(paths)
    return _status(seen, paths)


async def _start(paths: ClusterPaths, spec: ClusterSpec, ray: str, on_step: Callable[[Step], None]) -> None:
    seen, steps = await inspect_cluster(paths), StepLog(paths, on_step)
    upgrade = check_versions(seen)
    on_step(Step("ray", "kept", f"Ray {ray} at {spec.address}, which raylaunch did not start"))
    for line in warnings(spec):
        steps.note("ray", line)
    if not seen.problems and not upgrade and seen.record and seen.record.controller:
        on_step(Step("controller", "kept", f"the controller is running (pid {seen.record.controller.pid})"))
        for difference in differences(spec, seen.record):
            steps.note("spec", difference)
        return
    record, token = _prepare_record(paths, spec, seen, ray), secret_file(paths.token)
    start = ControllerStart(paths, steps, record, token=token)

    async def agents() -> str:
        steps.must_live("controller", "the controller", start.record.controller, paths.controller_log)
        return _agents_missing(await controller_status(start.record.ports["controller"], token))

    try:
        await start.run(wait=True, upgrade=upgrade)
        await steps.step("agent", "waiting for the node agents", "node agents ready", agents, AGENT_S)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await steps.undo(start.record)
        raise


def _prepare_record(paths: ClusterPaths, spec: ClusterSpec, seen: LocalInspection, ray: str) -> ClusterRecord:
    had = seen.record or new_record(spec, paths)
    record = had.with_(spec=spec, store=store_of(spec, paths), wanted="running", versions=current_versions(ray))
    make_store(Path(record.store))
    make_importable(paths)
    write_private(paths.ray_token, token_of(spec))
    return save_record(paths, record)


def _agents_missing(status: ControllerStatus | str) -> str:
    """Return why not every node has a node agent that answers; empty if all have."""
    if isinstance(status, str):
        return status
    if status.ray != "up" or not status.nodes:
        return "; ".join(status.problems) or "the controller does not reach Ray"
    missing = [node.hostname for node in status.nodes if node.alive and not node.ready]
    return f"no node agent answers on {', '.join(missing)}" if missing else ""


async def down(spec: ClusterSpec, /, *, on_prompt: OnPrompt | None = None) -> DownReport:  # noqa: ARG001 -- nothing here asks
    """End the controller and the node agents, and nothing of Ray; the store stays.

    Raises:
        ClusterError: something here could not be ended.
    """
    paths, began = cluster_paths(spec.name), time.monotonic()
    record = load_record(paths)
    if record is None:
        return DownReport(cluster=paths.name, ended=(), store="")
    async with cluster_lock(paths, limit_s=LOCK_S):
        save_record(paths, record.with_(wanted="stopped"))
        ended = await end_controller(record)
        notes = await anyio.to_thread.run_sync(_release_agents, paths)
        taken = await wait_free({"controller": record.ports["controller"]} if record.ports else {}, limit_s=5)
        save_record(paths, record.with_(wanted="stopped", controller=None))
    note = f"Ray at {record.spec.address} was not started by raylaunch and keeps running"
    took = time.monotonic() - began
    return DownReport(cluster=paths.name, ended=ended, store=record.store, notes=(note, *notes, *taken), seconds=took)


def _release_agents(paths: ClusterPaths) -> tuple[str, ...]:
    """End the node agents; if Ray does not answer, there are none."""
    argv = [sys.executable, "-m", _RELEASE, "--config", str(paths.controller_config)]
    try:
        done = subprocess.run(  # noqa: S603 -- our own program
            argv,
            env=clean_environment(os.environ, paths),
            capture_output=True,
            text=True,
            timeout=_RELEASE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return (f"Ray did not answer within {_RELEASE_S:.0f} s: node agents may still run there, idle",)
    with storage_errors(paths.controller_log), paths.controller_log.open("a", encoding="utf-8") as log:
        log.write(done.stderr)
    return (
        () if done.returncode == 0 else (f"node agents may still run there: {done.stdout.strip() or done.returncode}",)
    )


async def status(spec: ClusterSpec, /) -> ClusterStatus:
    """Return the state of the controller."""
    paths = cluster_paths(spec.name)
    return _status(await inspect_cluster(paths), paths)


def _status(seen: LocalInspection, paths: ClusterPaths) -> ClusterStatus:
    found = status_of(seen, paths)
    return found.model_copy(update={"kind": "existing", "ray": None, "ray_ports": {}})
