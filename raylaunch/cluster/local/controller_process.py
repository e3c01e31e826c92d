"""The controller as a program next to Ray: its configuration, its start, and when it is ready."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import anyio
from pydantic import ValidationError

from raylaunch.cluster.local.health import http_request, start_s_left
from raylaunch.cluster.local.ray_head import clean_environment
from raylaunch.cluster.local.steps import DiedError, StepLog
from raylaunch.cluster.ports import LOOPBACK, controller_port, is_free
from raylaunch.cluster.processes import CONTROLLER, VAR_CONTROLLER_OF, end, is_alive, of_controller
from raylaunch.cluster.record import ClusterRecord, save_record
from raylaunch.cluster.tls import ray_variables, variables_of
from raylaunch.errors import StorageError
from raylaunch.models.cluster import ControllerStatus
from raylaunch.paths import ClusterPaths, storage_errors, write_private
from raylaunch.version import __version__


def controller_argv(paths: ClusterPaths) -> list[str]:
    """Return the program and its arguments; they contain no secret."""
    return [sys.executable, "-m", CONTROLLER, "--config", str(paths.controller_config)]


def controller_environment(
    paths: ClusterPaths, record: ClusterRecord, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the whole environment of the controller.

    It keeps ``CUDA_VISIBLE_DEVICES``, so that a Ray that the controller restarts sees the same GPUs.
    """
    limit = {key: environ[key] for key in ("CUDA_VISIBLE_DEVICES",) if key in environ}
    return clean_environment(environ, paths) | limit | {VAR_CONTROLLER_OF: record.cluster_id}


def _ray_tls(paths: ClusterPaths, record: ClusterRecord) -> dict[str, str]:
    if files := record.spec.ray_tls:
        return ray_variables(*(Path(one).expanduser().absolute() for one in (files.ca, files.certificate, files.key)))
    return variables_of(paths) if record.tls else {}


def write_config(paths: ClusterPaths, record: ClusterRecord) -> None:
    """Write ``controller.json``, the controller's configuration. Secrets stay in their own files."""
    spec, external = record.spec, record.spec.kind == "existing"
    config = {
        "cluster": record.name,
        "cluster_id": record.cluster_id,
        "store": record.store,
        "port": record.ports["controller"],
        "gcs_address": spec.gcs_address if external else f"{record.place.ray_address}:{record.ports['gcs']}",
        "dashboard_url": spec.address if external else f"http://{LOOPBACK}:{record.ports['dashboard']}",
        "ray_token_path": str(paths.ray_token),
        "ray_env": _ray_tls(paths, record),
        "log_path": str(paths.controller_log),
        "default_environment": record.spec.environment.model_dump(mode="json"),
        "env": record.spec.env,
        "secrets": record.spec.secrets,
        "retention": record.spec.retention.model_dump(mode="json"),
        "carries_stewards": external,
        "revive": [] if external else [sys.executable, "-m", "raylaunch.cluster.revive", record.name],
        "runner_python": sys.executable,
    }
    write_private(paths.controller_config, json.dumps(config, indent=2))


def admit(store: Path, token: str) -> None:
    """Make the holder of `token` an administrator, in the store's ``tokens.json``; other tokens stay.

    Raises:
        StorageError: the file exists and is not a list of tokens.
    """
    path = store / "tokens.json"
    digest = hashlib.sha256(token.encode()).hexdigest()
    tokens: list[object] = []
    if path.exists():
        with storage_errors(path):
            text = path.read_text(encoding="utf-8")
        try:
            tokens = list(json.loads(text)["tokens"])
        except (ValueError, KeyError, TypeError):
            msg = f"{path} is not a list of tokens"
            raise StorageError(msg, hint="repair or remove it; raylaunch up adds your own token again") from None
    if any(isinstance(one, dict) and one.get("sha256") == digest for one in tokens):
        return
    tokens.append({"sha256": digest, "person": getpass.getuser(), "role": "admin"})
    write_private(path, json.dumps({"tokens": tokens}, indent=2))


async def controller_status(port: int, token: str) -> ControllerStatus | str:
    """Query the controller's status; return the reason as text if there is no valid response."""
    answer = await http_request(port, "/v1/status", token=token)
    if not answer.ok:
        return answer.why or f"it answered HTTP {answer.status}"
    try:
        return ControllerStatus.model_validate_json(answer.body)
    except ValidationError:
        return f"the program on port {port} is not raylaunch's controller"


def not_ready(status: ControllerStatus | str) -> str:
    """Return why a cluster with this controller cannot take jobs yet; empty when it can."""
    if isinstance(status, str):
        return f"the controller is not responding: {status}"
    if status.ray != "up":
        return "the controller does not reach Ray"
    if not any(node.ready for node in status.nodes):
        return "no node agent answers"
    return ""


CONTROLLER_S = 60.0
_HUNG_S = 5.0
_POLL_S = 0.1


class ControllerStart:
    """One start of a cluster's controller. `record` is kept up to date, here and on the disk.

    Args:
        paths: of the cluster.
        steps: where progress is reported.
        record: of the cluster, with the ports of its Ray.
        token: the client's.
    """

    def __init__(self, paths: ClusterPaths, steps: StepLog, record: ClusterRecord, *, token: str) -> None:
        self.record = record
        self._paths = paths
        self._steps = steps
        self._token = token

    async def run(self, *, wait: bool, upgrade: bool) -> ClusterRecord:
        """Start a controller and wait for it; one that already runs and answers stays, unless `upgrade`.

        Raises:
            ClusterStartError: it exited, or does not answer in time.
        """
        if is_alive(self.record.controller) and not upgrade and await self._answers_soon():
            return self.record
        for last_try in (False, True):
            await self._start()
            if not wait:
                break
            try:
                await self._steps.step(
                    "controller", "waiting for the controller", "controller ready", self._check, CONTROLLER_S
                )
            except DiedError:
                if last_try or self.record.spec.port or is_free(self.record.ports["controller"]):
                    raise
                self._steps.note("controller", "another process has just taken its port; using another port")
            else:
                self._save(self.record.with_(controller_answered=True))
                break
        return self.record

    async def _answers_soon(self) -> bool:
        with anyio.move_on_after(max(_HUNG_S, start_s_left(self.record))):
            while is_alive(self.record.controller):
                if not await self._why_silent():
                    return True
                await anyio.sleep(_POLL_S)
        return False

    async def _start(self) -> None:
        """Start the controller after ending one that hangs or that is in no record. Jobs continue meanwhile."""
        left = of_controller(self.record.cluster_id)
        if left:
            self._steps.note("controller", f"ending the previous controller (pid {left[0].pid}); jobs continue")
            await end(left, grace_s=5)
        ports = self.record.ports
        taken = tuple(port for key, port in ports.items() if key != "controller")
        if "worker_min" in ports:
            taken += tuple(range(ports["worker_min"], ports["worker_max"] + 1))
        port = controller_port(
            ports,
            fixed=self.record.spec.port,
            on_taken=lambda message: self._steps.note("ports", message),
            avoid=taken,
        )
        versions = self.record.versions.model_copy(update={"raylaunch": __version__})
        ports = ports | {"controller": port}
        self._save(self.record.with_(ports=ports, controller=None, controller_answered=False, versions=versions))
        write_config(self._paths, self.record)
        admit(Path(self.record.store), self._token)
        env = controller_environment(self._paths, self.record)
        controller = await self._steps.start(controller_argv(self._paths), env, self._paths.controller_log)
        self._save(self.record.with_(controller=controller))

    def _save(self, record: ClusterRecord) -> None:
        self.record = save_record(self._paths, record)

    async def _check(self) -> str:
        self._steps.must_live("controller", "the controller", self.record.controller, self._paths.controller_log)
        return await self._why_silent()

    async def _why_silent(self) -> str:
        status = await controller_status(self.record.ports["controller"], self._token)
        return status if isinstance(status, str) else ""
