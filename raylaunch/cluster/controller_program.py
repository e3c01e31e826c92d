"""The controller as a program beside Ray: what it is told, how it is started, and when it is ready."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from raylaunch.cluster.answer import ask
from raylaunch.cluster.home import ClusterPaths, storage_errors, write_private
from raylaunch.cluster.ports import LOOPBACK
from raylaunch.cluster.ray_head import clean_environment
from raylaunch.cluster.record import ClusterRecord
from raylaunch.cluster.tls import ray_variables, variables_of
from raylaunch.cluster_state import ControllerStatus
from raylaunch.errors import StorageError

VAR_CONTROLLER_OF = "RAYLAUNCH_CONTROLLER_OF"
"""In the environment of the controller and its children; not in Ray's, which may be restarted alone."""

MODULE = "raylaunch.controller"


def controller_argv(paths: ClusterPaths) -> list[str]:
    """Return the program and its arguments; nothing in them is secret."""
    return [sys.executable, "-m", MODULE, "--config", str(paths.controller_config)]


def controller_environment(
    paths: ClusterPaths, record: ClusterRecord, environ: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the whole environment of the controller.

    It keeps ``CUDA_VISIBLE_DEVICES``, so that a Ray which it has started again sees the GPUs that the first one saw.
    """
    limit = {key: environ[key] for key in ("CUDA_VISIBLE_DEVICES",) if key in environ}
    return clean_environment(environ, paths) | limit | {VAR_CONTROLLER_OF: record.cluster_id}


def _ray_tls(paths: ClusterPaths, record: ClusterRecord) -> dict[str, str]:
    if files := record.spec.ray_tls:
        return ray_variables(*(Path(one).expanduser().absolute() for one in (files.ca, files.certificate, files.key)))
    return variables_of(paths) if record.tls else {}


def write_config(paths: ClusterPaths, record: ClusterRecord) -> None:
    """Write ``controller.json``: all that the controller is told. Secrets stay in files of their own."""
    spec, foreign = record.spec, record.spec.kind == "existing"
    config = {
        "cluster": record.name,
        "cluster_id": record.cluster_id,
        "store": record.store,
        "port": record.ports["controller"],
        "gcs_address": spec.gcs_address if foreign else f"{record.place.ray_address}:{record.ports['gcs']}",
        "dashboard_url": spec.address if foreign else f"http://{LOOPBACK}:{record.ports['dashboard']}",
        "ray_token_path": str(paths.ray_token),
        "ray_env": _ray_tls(paths, record),
        "log_path": str(paths.controller_log),
        "default_environment": record.spec.environment.model_dump(mode="json"),
        "env": record.spec.env,
        "secrets": record.spec.secrets,
        "retention": record.spec.retention.model_dump(mode="json"),
        "carries_stewards": foreign,
        "revive": [] if foreign else [sys.executable, "-m", "raylaunch.cluster.revive", record.name],
        "runner_python": sys.executable,
    }
    write_private(paths.controller_config, json.dumps(config, indent=2))


def admit(store: Path, token: str) -> None:
    """Make the holder of `token` an administrator, in the store's ``tokens.json``; other tokens stay.

    Raises:
        StorageError: the file is there and is not what it should be.
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
            raise StorageError(
                msg, hint="repair it, or remove it: your own token is put back by raylaunch up"
            ) from None
    if any(isinstance(one, dict) and one.get("sha256") == digest for one in tokens):
        return
    tokens.append({"sha256": digest, "person": getpass.getuser(), "role": "admin"})
    write_private(path, json.dumps({"tokens": tokens}, indent=2))


async def controller_status(port: int, token: str) -> ControllerStatus | str:
    """Ask the controller how it is; return in words why there is no answer."""
    answer = await ask(port, "/v1/status", token=token)
    if not answer.ok:
        return answer.why or f"it answered HTTP {answer.status}"
    try:
        return ControllerStatus.model_validate_json(answer.body)
    except ValidationError:
        return f"what answers on port {port} is not raylaunch's controller"


def not_ready(status: ControllerStatus | str) -> str:
    """Return why a cluster with this controller cannot take jobs yet; empty when it can."""
    if isinstance(status, str):
        return f"the controller is not responding: {status}"
    if status.ray != "up":
        return "the controller does not reach Ray"
    if not any(node.ready for node in status.nodes):
        return "no node's steward answers"
    return ""
