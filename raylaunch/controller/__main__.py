"""``python -m raylaunch.controller --config FILE``: the program that runs next to the Ray head.

Exit status: 0 after SIGTERM (jobs go on), 1 when its loop failed (the log has the traceback), 2 for a wrong
configuration, 3 when the port is taken, 4 when another controller holds the store, 5 when the store cannot be used.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from raylaunch.controller.api.app import ApiServer
from raylaunch.controller.api.dependencies import AppState
from raylaunch.controller.metrics.reader import NAMES_KEPT, MetricsStore
from raylaunch.controller.ray.bridge import RayBridge
from raylaunch.controller.ray.jobs_api import RayJobs
from raylaunch.controller.scheduler.attempt_context import AttemptContext, AttemptResult
from raylaunch.controller.scheduler.external_jobs import ExternalJobs
from raylaunch.controller.scheduler.external_logs import ExternalLogs
from raylaunch.controller.scheduler.host_service import HostService
from raylaunch.controller.scheduler.job_service import JobService, LeftOutputs
from raylaunch.controller.scheduler.loop import SchedulerLoop
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.scheduler.preflight import WheelPreflight
from raylaunch.controller.settings import Settings
from raylaunch.controller.store.access import Invitations, TokenStore
from raylaunch.controller.store.artifacts import Artifacts
from raylaunch.controller.store.audit import DrainStore
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.logs import log_tail
from raylaunch.controller.store.packages import ClusterWheels, PackageStore
from raylaunch.controller.store.record import JobRecord
from raylaunch.controller.store.retention import JobRemoval, RetentionLoop
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.errors import ConflictError, RaylaunchError
from raylaunch.files import rotate

_log = logging.getLogger(__name__)

_ROTATE_S = 10.0
_FAILED = 1
_CONFIG, _PORT, _LOCKED, _STORE = 2, 3, 4, 5


def main() -> int:
    """Run the controller until SIGTERM or SIGINT; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m raylaunch.controller", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the cluster's controller.json")
    config = parser.parse_args().config
    os.umask(0o077)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        settings = Settings.model_validate_json(config.read_bytes())
    except (OSError, ValidationError) as error:
        return _fail(_CONFIG, f"cannot read {config}: {error}")
    try:
        listener = _listen(settings.port)
    except OSError as error:
        return _fail(_PORT, f"port {settings.port} on 127.0.0.1 cannot be used: {error.strerror}")
    try:
        records = Records(settings.store)
    except ConflictError as error:
        return _fail(_LOCKED, error.message)
    except RaylaunchError as error:
        return _fail(_STORE, error.message)
    gc.collect()
    gc.freeze()  # what exists now stays: later collections skip it
    for sentence in records.repairs:
        _log.warning("%s", sentence)
    try:
        failed = asyncio.run(serve(settings, records, listener))
    finally:
        records.close()
    return _FAILED if failed else 0


async def serve(settings: Settings, records: Records, listener: socket.socket) -> bool:
    """Serve HTTP on `listener` and run the scheduler until a signal; return whether the scheduler failed."""
    observed = ObservedState()
    secrets = SecretStore(settings.store)
    secrets.keep_only(records.unfinished())
    drains = DrainStore(settings.store)
    artifacts = Artifacts(settings.store)
    packages = PackageStore(settings.store / "packages")
    metrics = MetricsStore(settings.store)
    ray = RayJobs(settings.dashboard_url, settings.ray_token)
    bridge = RayBridge(
        gcs_address=settings.gcs_address,
        ray_token_path=settings.ray_token_path,
        ray_env=settings.ray_env,
        store=settings.store,
        on_event=lambda event: scheduler.on_event(event),  # noqa: PLW0108 -- created below; the bridge needs it first
        log_path=settings.store / "link.log",
        namespace=settings.namespace,
        carries=settings.carries_stewards,
    )
    context = AttemptContext(
        settings=settings,
        records=records,
        secrets=secrets,
        bridge=bridge,
        ray=ray,
        observed=observed,
        read_result=lambda record: asyncio.to_thread(read_attempt_result, record, records, artifacts, metrics),
    )
    external = ExternalJobs(records=records, ray=ray, bridge=bridge, observed=observed)
    scheduler = SchedulerLoop(context, artifacts, external, drains)
    removal = JobRemoval(records=records, artifacts=artifacts, secrets=secrets)
    cluster_wheels = ClusterWheels(settings)
    jobs = JobService(
        settings=settings,
        records=records,
        packages=packages,
        secrets=secrets,
        removal=removal,
        observed=observed,
        drains=drains,
        foreign=external,
        wheel_needs=WheelPreflight(settings=settings, observed=observed, bridge=bridge, kept=cluster_wheels),
        bridge=bridge,
        left=LeftOutputs(bridge=bridge, observed=observed, artifacts=artifacts),
    )
    tokens = TokenStore(settings.store)
    state = AppState(
        settings=settings,
        store=settings.store,
        records=records,
        packages=packages,
        secrets=secrets,
        tokens=tokens,
        invitations=Invitations(settings.store, tokens),
        artifacts=artifacts,
        metrics=metrics,
        jobs=jobs,
        hosts=HostService(records=records, drains=drains, observed=observed),
        external_logs=ExternalLogs(bridge=bridge, ray=ray, observed=observed),
    )
    server = ApiServer(state)

    def stop() -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    await bridge.start()
    sweeper = RetentionLoop(
        settings.retention,
        records=records,
        artifacts=artifacts,
        packages=packages,
        removal=removal,
        cluster_wheels=cluster_wheels,
    )
    loop_task = asyncio.create_task(scheduler.run(), name="scheduler")
    sweeping = asyncio.create_task(sweeper.run(), name="retention")
    logs = [one for one in (settings.log_path, settings.store / "link.log") if one is not None]
    rotating = asyncio.create_task(_rotate_logs(*logs), name="log rotation")
    loop_task.add_done_callback(lambda _: stop())
    try:
        await server.serve(sockets=[listener])
    finally:
        loop_task.cancel()
        sweeping.cancel()
        rotating.cancel()
        failure = (await asyncio.gather(loop_task, return_exceptions=True))[0]
        if isinstance(failure, Exception):
            _log.error("the scheduler's loop failed", exc_info=failure)
        await bridge.close()
        await ray.close()
    return isinstance(failure, Exception)


async def _rotate_logs(*logs: Path) -> None:
    """Rotate the logs of the controller and its bridge, until cancelled."""
    while True:
        for path in logs:
            await asyncio.to_thread(rotate, path)
        await asyncio.sleep(_ROTATE_S)


def read_attempt_result(
    record: JobRecord, records: Records, artifacts: Artifacts, metrics: MetricsStore
) -> AttemptResult:
    """Read what a job has in the store so far, and write its manifest. May take long."""
    folder = records.folder(record.id)
    artifacts.finalize(record.id)
    count, size = artifacts.outputs(record.id)
    ran_s = time.time() - record.started_at if record.started_at is not None else 0.0
    measured = metrics.latest(record, ran_s=ran_s)
    more = f"{measured.left_out} metrics beyond {NAMES_KEPT} are not in the record; raylaunch metrics shows more"
    return AttemptResult(
        log_tail=log_tail(folder, attempt=len(record.attempts)),
        outputs=count,
        output_bytes=size,
        last_metrics=measured.last,
        progress=measured.progress,
        warnings=(more,) if measured.left_out else (),
    )


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(256)
    except OSError:
        listener.close()
        raise
    return listener


def _fail(status: int, why: str) -> int:
    sys.stderr.write(f"raylaunch controller: {why}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
