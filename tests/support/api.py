"""The real HTTP API on a real port, over real stores, in a thread, where there is no Ray."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import httpx2
import pytest

from raylaunch.cluster.types import Endpoint
from raylaunch.controller.api.app import ApiServer
from raylaunch.controller.api.dependencies import AppState
from raylaunch.controller.metrics.reader import MetricsStore
from raylaunch.controller.ray.jobs_api import RayJobs
from raylaunch.controller.scheduler.external_jobs import ExternalJobs
from raylaunch.controller.scheduler.external_logs import ExternalLogs
from raylaunch.controller.scheduler.host_service import HostService
from raylaunch.controller.scheduler.job_service import JobService, LeftOutputs
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.scheduler.preflight import WheelPreflight
from raylaunch.controller.settings import Settings
from raylaunch.controller.store.access import Invitations, TokenStore
from raylaunch.controller.store.artifacts import Artifacts
from raylaunch.controller.store.audit import DrainStore
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.packages import ClusterWheels, PackageStore
from raylaunch.controller.store.record import JobRecord
from raylaunch.controller.store.retention import JobRemoval
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.errors import WheelsNeededError
from raylaunch.models.cluster import ControllerStatus, EnvironmentWheels, RayAccess
from raylaunch.models.job import DryRun, JobView, SubmitAnswer, SubmitRequest
from raylaunch.models.states import Change
from raylaunch.version import API, __version__
from support.bridges import UnconnectedBridge
from support.waiting import wait_until

_T = TypeVar("_T")

PEOPLE = {"vera": "viewer", "tom": "trainer", "tina": "trainer", "olga": "operator", "ada": "admin"}


def token_of(person: str) -> str:
    """Return a person's token."""
    return f"token-of-{person}"


def write_tokens(store: Path, people: dict[str, str]) -> None:
    """Write ``tokens.json``."""
    tokens = [
        {"sha256": hashlib.sha256(token_of(person).encode()).hexdigest(), "person": person, "role": role}
        for person, role in people.items()
    ]
    (store / "tokens.json").write_text(json.dumps({"tokens": tokens}))


def settings_of(store: Path, port: int) -> Settings:
    """Return what a controller of that store would have been told."""
    return Settings(
        cluster="test",
        cluster_id="c-test",
        store=store,
        port=port,
        gcs_address="127.0.0.1:1",
        dashboard_url="http://127.0.0.1:2",
        ray_token_path=store / "ray_token",
    )


class Desk(JobService):
    """The operations on jobs where there is no Ray: jobs end when their stop is requested."""

    air_gapped: DryRun | None = None
    """The result of a dry run whose nodes reach no package index."""

    def __init__(self, settings: Settings, records: Records, secrets: SecretStore, observed: ObservedState) -> None:
        store = settings.store
        bridge, artifacts = UnconnectedBridge(store), Artifacts(store)
        ray = RayJobs("http://127.0.0.1:9", "none")
        wheels = WheelPreflight(settings=settings, observed=observed, bridge=bridge, kept=ClusterWheels(settings))
        super().__init__(
            settings=settings,
            records=records,
            packages=PackageStore(store / "packages"),
            secrets=secrets,
            removal=JobRemoval(records=records, artifacts=artifacts, secrets=secrets),
            observed=observed,
            bridge=bridge,
            drains=DrainStore(store),
            foreign=ExternalJobs(records=records, ray=ray, bridge=bridge, observed=observed),
            wheel_needs=wheels,
            left=LeftOutputs(bridge=bridge, observed=observed, artifacts=artifacts),
        )
        self._records = records
        self._observed = observed
        self.kept: list[EnvironmentWheels] = []

    async def submit(self, request: SubmitRequest, person: str) -> SubmitAnswer:
        if self.air_gapped and not request.wheels_sought:
            msg = "nodes reach no index"
            raise WheelsNeededError(msg)
        record, created = self._records.create(request, owner=person, wandb=None)
        return SubmitAnswer(job=record.view(), created=created)

    async def dry_run(self, request: SubmitRequest, person: str) -> DryRun:
        assert person
        return self.air_gapped or DryRun(
            fits=("here",), message=f"{request.spec.display_name} would start on here at once"
        )

    async def keep_wheels(self, given: EnvironmentWheels) -> None:
        self.kept.append(given)

    async def stop(self, record: JobRecord, *, grace_s: float | None, person: str) -> JobView:
        message = f"{person} asked to stop it, grace {grace_s}"
        return self._records.update(record.id, kind="ended", message=message, change=Change.END_STOPPED).view()

    async def status(self, person: str, role: str) -> ControllerStatus:
        return ControllerStatus(
            cluster="test",
            version=__version__,
            api=API,
            pid=os.getpid(),
            person=person,
            role=role,
            started_at=time.time(),
            ray="down",
        )

    def grew(self, attempt_id: str) -> None:
        """Report that a file of the attempt has grown."""
        self._observed.notify_growth(attempt_id)

    def ray_access(self) -> RayAccess:
        return RayAccess(gcs_address="127.0.0.1:1", dashboard_url="http://127.0.0.1:2", token="ray-token")  # noqa: S106


class Api:
    """A running API."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.url = ""
        self._ready = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="api")

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread.start()
        wait_until(lambda: self._ready.is_set() and self.server.started, 30, "the API is up")

    def stop(self) -> None:
        """End it, and wait until it has ended."""
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def do(self, work: Callable[[], _T]) -> _T:
        """Run `work` on the API's event loop, where the records live."""

        async def run() -> _T:
            return work()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(30)

    def client(self, person: str = "tom", **headers: str) -> httpx2.Client:
        """Return a client with the person's token."""
        return httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token_of(person)}", **headers},
            timeout=40,
            trust_env=False,
        )

    def reach(self, person: str = "tom") -> Endpoint:
        """Return how a person reaches it."""
        return Endpoint(url=self.url, token=token_of(person))

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.records = Records(self.store)
        artifacts = Artifacts(self.store)
        self.observed = ObservedState()
        secrets = SecretStore(self.store)
        settings = settings_of(self.store, int(self.url.rpartition(":")[2]))
        self.desk = Desk(settings, self.records, secrets, self.observed)
        tokens = TokenStore(self.store)
        self.state = AppState(
            settings=settings,
            store=self.store,
            records=self.records,
            packages=PackageStore(self.store / "packages"),
            secrets=secrets,
            tokens=tokens,
            invitations=Invitations(self.store, tokens),
            artifacts=artifacts,
            metrics=MetricsStore(self.store),
            jobs=self.desk,
            hosts=HostService(records=self.records, drains=DrainStore(self.store), observed=self.observed),
            external_logs=ExternalLogs(
                bridge=UnconnectedBridge(self.store),
                ray=RayJobs("http://127.0.0.1:9", "none"),
                observed=self.observed,
            ),
        )
        self.server = ApiServer(self.state)
        self._ready.set()
        try:
            await self.server.serve(sockets=[self._listener])
        finally:
            self.records.close()


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    """An API over an empty store."""
    with serving(tmp_path / "store") as running:
        yield running


@contextmanager
def serving(store: Path) -> Iterator[Api]:
    """Serve `store` on a free port of the loopback."""
    store.mkdir(parents=True, exist_ok=True)
    write_tokens(store, PEOPLE)
    api = Api(store)
    api.start()
    try:
        yield api
    finally:
        api.stop()
