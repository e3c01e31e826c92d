"""``python -m raylaunch.cluster.ray_start start …``: Ray's own ``ray start``, with longer timeouts for busy machines.

A raylet starts two Python programs, its agents, and waits 15 s until each has written its port into a file. Then it
exits, and with it everything that ``ray start`` has started, because no node is listed within 30 s. The agents load
together with a dozen other programs. On cores that are busy with training, or on two slow cores, that takes longer, and
each restart of Ray would fail in the same way. The ports are fixed here, so they are in the files before the raylet
reads them; and the query for the node waits as long as the raylet lives. The caller has its own limit.

Source, Ray 2.60: ``WaitForPersistedPort`` of its raylet, ``ray._private.node`` and ``ray._private.services``.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import psutil

AGENT_PORTS = {
    "metrics_agent_port": "METRICS_AGENT_PORT_NAME",
    "metrics_export_port": "METRICS_EXPORT_PORT_NAME",
    "dashboard_agent_listen_port": "DASHBOARD_AGENT_LISTEN_PORT_NAME",
    "runtime_env_agent_port": "RUNTIME_ENV_AGENT_PORT_NAME",
}
"""Arguments of ``ray._private.services.start_raylet``, and what ``ray._raylet`` calls the files."""
METRICS = "RAY_enable_metrics_collection"
"""Ray's variable that is ``0`` if no metrics are collected."""
_NOT_IN_USE = -1
_PATIENCE_S = 600.0
_POLL_S = 0.5
_Result = TypeVar("_Result")


def ports_first(
    start_raylet: Callable[..., _Result],
    persist_port: Callable[[str, str, str, int], object],
    names: Mapping[str, str],
    *,
    metrics: bool,
) -> Callable[..., _Result]:
    """Return a `start_raylet` that first writes the ports of the raylet's agents to their files.

    Args:
        start_raylet: Ray's.
        persist_port: Ray's; takes the session's folder, the node's id, a name of `names`, and the port.
        names: by argument of `start_raylet`, the name of the file.
        metrics: whether metrics are exported; if not, the file says so.
    """
    signature = inspect.signature(start_raylet)

    def start(*args: object, **named: object) -> _Result:
        given = signature.bind(*args, **named).arguments
        for argument, name in names.items():
            if port := given.get(argument):
                used = metrics or argument != "metrics_export_port"
                persist_port(given["session_dir"], given["node_id"], name, port if used else _NOT_IN_USE)
        return start_raylet(*args, **named)

    return start


def patient(
    get_node: Callable[[str, str], _Result],
    *,
    starting: Callable[[], bool],
    patience_s: float = _PATIENCE_S,
    poll_s: float = _POLL_S,
) -> Callable[[str, str], _Result]:
    """Return `get_node` (``ray._private.services``) that waits for a node while it is `starting`.

    It raises the same RuntimeError once the node is no longer starting, or `patience_s` seconds have passed.
    """

    def poll(gcs_address: str, node_id: str) -> _Result:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return get_node(gcs_address, node_id)
            except RuntimeError:
                if time.monotonic() > deadline or not starting():
                    raise
            time.sleep(poll_s)

    return poll


def raylet_lives() -> bool:
    """Return whether a raylet that this process started is running."""
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == "raylet" and child.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def main() -> None:
    """Run Ray's command line."""
    from ray import _raylet  # noqa: PLC0415 -- Ray takes seconds to load, and nothing else here needs it
    from ray._private import services  # noqa: PLC0415 -- as above
    from ray.scripts.scripts import main as run  # noqa: PLC0415 -- as above

    names = {argument: getattr(_raylet, name) for argument, name in AGENT_PORTS.items()}
    metrics = os.environ.get(METRICS) != "0"
    persist_port = getattr(_raylet, "persist_port")  # noqa: B009 -- the stubs leave it out
    services.start_raylet = ports_first(services.start_raylet, persist_port, names, metrics=metrics)
    services.get_node = patient(services.get_node, starting=raylet_lives)
    run()
