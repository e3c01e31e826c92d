"""What the store keeps how long."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.api import settings_of
from support.store import opened, submit

from raylaunch.controller.store.artifacts import Artifacts
from raylaunch.controller.store.database import RetentionRow
from raylaunch.controller.store.jobs import Records
from raylaunch.controller.store.packages import ClusterWheels, PackageStore
from raylaunch.controller.store.retention import PACKAGE_S, JobRemoval, RetentionLoop, plan_sweep
from raylaunch.controller.store.secrets import SecretStore
from raylaunch.errors import NotFoundError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.fields import Retention
from raylaunch.models.states import Change

DAY = 86400.0
NOW = 1000 * DAY


def job(name: str, days: float | None, package: str = "") -> RetentionRow:
    return RetentionRow(name, None if days is None else NOW - days * DAY, package)


def test_without_a_setting_nothing_of_a_job_goes() -> None:
    found = plan_sweep([job("old", 900), job("runs", None)], Retention(), {}, now=NOW)
    assert (found.jobs, found.checkpoints) == ((), ())


def test_what_has_outlived_its_time_goes_and_what_has_not_ended_never_does() -> None:
    retention = Retention.model_validate({"jobs": "180d", "checkpoints": "14d"})
    found = plan_sweep([job("old", 181), job("spent", 15), job("new", 1), job("runs", None)], retention, {}, now=NOW)
    assert (found.jobs, found.checkpoints) == (("old",), ("spent",))


def test_code_goes_that_no_job_came_with_unless_it_may_just_have_arrived() -> None:
    jobs = [job("kept", 1, "a"), job("gone", 200, "b")]
    packages = {"a": 0.0, "b": 0.0, "late": NOW - PACKAGE_S / 2}
    found = plan_sweep(jobs, Retention.model_validate({"jobs": "180d"}), packages, now=NOW)
    assert found.packages == ("b",)


def test_a_cluster_says_it_in_words_of_time() -> None:
    spec = ClusterSpec.model_validate({"name": "lab", "hosts": ["a"], "retention": {"jobs": "180d"}})
    assert spec.part_of(spec.hosts[0]).retention.jobs_s == 180 * DAY


@pytest.fixture
def records(tmp_path: Path) -> Iterator[Records]:
    with opened(tmp_path) as made:
        yield made


def sweep(records: Records, retention: Retention) -> None:
    store = records.store
    artifacts = Artifacts(store)
    wheels = ClusterWheels(settings_of(store, 9))
    parts = RetentionLoop(
        retention,
        records=records,
        artifacts=artifacts,
        packages=PackageStore(store / "packages"),
        removal=JobRemoval(records=records, artifacts=artifacts, secrets=SecretStore(store)),
        cluster_wheels=wheels,
    )
    asyncio.run(parts.sweep())


def ended(records: Records, name: str, days: float) -> str:
    made = submit(records, name)
    ago = time.time() - days * DAY
    records.update(made.id, kind="ended", message="it ended", change=Change.FAIL, ended_at=ago)
    attempt = records.folder(made.id) / "attempt-1"
    for file in ("checkpoints/step-1/model.pt", "outputs/model.pt"):
        (attempt / file).parent.mkdir(parents=True)
        (attempt / file).write_bytes(b"x" * 100)
    return made.id


def test_a_job_that_is_over_leaves_record_and_folder_and_is_in_the_audit_log(records: Records) -> None:
    old, new = ended(records, "old", 200), ended(records, "new", 1)
    sweep(records, Retention.model_validate({"jobs": "180d"}))
    with pytest.raises(NotFoundError):
        records.get(old)
    assert not records.folder(old).exists()
    assert records.get(new).name == "new"
    lines = [json.loads(line) for line in (records.store / "audit.jsonl").read_text().splitlines()]
    assert [(line["person"], line["verb"], line["job"]) for line in lines] == [("retention", "remove", old)]


def test_a_job_that_is_over_is_removed_as_by_a_person_with_its_event_and_without_its_secrets(records: Records) -> None:
    old = ended(records, "old", 200)
    secrets = SecretStore(records.store)
    secrets.put_job(old, {"KEY": "value"})
    sweep(records, Retention.model_validate({"jobs": "180d"}))
    assert [event.kind for event in records.events(after=0, job=old).events][-1] == "removed"
    assert secrets.for_job(old, ["KEY"], "tom") == {}
    assert not any((records.store / "trash").iterdir())


def test_checkpoints_go_and_outputs_stay(records: Records) -> None:
    spent = ended(records, "spent", 15)
    sweep(records, Retention.model_validate({"checkpoints": "14d"}))
    folder = records.folder(spent)
    assert not (folder / "attempt-1/checkpoints").exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [path for path in manifest["files"] if "model.pt" in path] == ["attempt-1/outputs/model.pt"]


def test_code_of_no_job_is_removed_after_a_day(records: Records) -> None:
    packages = PackageStore(records.store / "packages")
    path = records.store / "packages" / f"{'a' * 64}.tar.gz"
    path.write_bytes(b"code")
    sweep(records, Retention())
    assert packages.names() == ("a" * 64,)
    os.utime(path, (0, 0))
    sweep(records, Retention())
    assert packages.names() == ()
