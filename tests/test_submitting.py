"""Submitting: from the answer on nothing is lost, and of what was rejected nothing exists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from support.api import settings_of
from support.bridges import UnconnectedBridge

from raylaunch.controller.ray.jobs_api import RayJobs
from raylaunch.controller.scheduler.external_jobs import ExternalJobs
from raylaunch.controller.scheduler.job_service import JobService, LeftOutputs
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.scheduler.preflight import WheelPreflight
from raylaunch.controller.store.artifacts import Artifacts
from raylaunch.controller.store.audit import DrainStore
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.packages import ClusterWheels, PackageStore
from raylaunch.controller.store.retention import JobRemoval
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.errors import RaylaunchError, SpecError, StorageError
from raylaunch.models.job import SubmitRequest
from raylaunch.models.job_spec import JobSpec

SPEC = JobSpec(entrypoint="python train.py", secrets=("KEY",))


class Desk:
    """A controller's verbs over a store, where there is no Ray."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.records = Records(store)
        self.secrets = SecretStore(store)
        settings, observed, link = settings_of(store, 9), ObservedState(), UnconnectedBridge(store)
        ray = RayJobs("http://127.0.0.1:9", "none")
        self.verbs = JobService(
            settings=settings,
            records=self.records,
            packages=PackageStore(store / "packages"),
            secrets=self.secrets,
            removal=JobRemoval(records=self.records, artifacts=Artifacts(store), secrets=self.secrets),
            observed=observed,
            bridge=link,
            drains=DrainStore(store),
            foreign=ExternalJobs(records=self.records, ray=ray, bridge=link, observed=observed),
            wheel_needs=WheelPreflight(settings=settings, observed=observed, bridge=link, kept=ClusterWheels(settings)),
            left=LeftOutputs(bridge=link, observed=observed, artifacts=Artifacts(store)),
        )

    def submit(self, **secrets: str) -> str:
        return anyio.run(self.verbs.submit, SubmitRequest(spec=SPEC, secrets=secrets), "ana").job.id

    def rejected(self, **secrets: str) -> RaylaunchError:
        with pytest.raises(RaylaunchError) as raised:
            self.submit(**secrets)
        return raised.value

    def left(self) -> list[str]:
        """Return what there is of jobs, in the database and on the disk."""
        files = [path.name for folder in ("jobs", "job_secrets") for path in (self.store / folder).glob("*")]
        return [*files, *(job.id for job in self.records.page().jobs)]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.records.close()


@pytest.mark.parametrize("value", ["", "half\0"])
def test_a_value_that_cannot_be_a_secret_leaves_no_job(desk: Desk, value: str) -> None:
    assert isinstance(desk.rejected(KEY=value), SpecError)
    assert desk.left() == []


def test_secrets_that_cannot_be_written_leave_no_job(desk: Desk) -> None:
    folder = desk.store / "job_secrets"
    folder.rmdir()
    folder.write_text("in the way of a folder, as a full disk is")
    assert isinstance(desk.rejected(KEY="value"), StorageError)
    assert desk.left() == []
    assert desk.records.unfinished() == []


def test_a_job_has_its_secrets_before_it_has_a_record(desk: Desk) -> None:
    job = desk.submit(KEY="value")
    assert desk.secrets.for_job(job, ("KEY",), "tom") == {"KEY": "value"}


def test_what_a_crash_left_of_other_jobs_secrets_is_deleted_at_the_next_start(desk: Desk) -> None:
    kept = desk.submit(KEY="value")
    desk.secrets.put_job("gone-aaaaaa", {"KEY": "left behind"})
    desk.secrets.keep_only(desk.records.unfinished())
    assert [path.name for path in (desk.store / "job_secrets").iterdir()] == [f"{kept}.json"]


def test_a_secret_for_other_people_is_refused_at_submit_and_nothing_exists(desk: Desk) -> None:
    desk.secrets.put("KEY", "of-alice", people=["alice"])
    refused = desk.rejected()
    assert isinstance(refused, SpecError)
    assert (refused.field, "--for ana" in refused.hint) == ("secrets", True)
    assert "of-alice" not in str(refused)
    assert not [name for name in desk.left() if name.startswith("digits")]
    assert desk.submit(KEY="of-ana")
    desk.secrets.put("KEY", "of-all", people=[])
    assert desk.submit()
