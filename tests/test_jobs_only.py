"""What is made of a Ray of which only the dashboard's address is reached: its log, its nodes, its word. All pure."""

from __future__ import annotations

import json
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from raylaunch.cluster_spec import ClusterSpec
from raylaunch.controller import ray_upload
from raylaunch.controller.attempt_spec import attempt_spec
from raylaunch.controller.jobs_attempts import exit_by_ray
from raylaunch.controller.jobs_only import refuse_what_does_not_travel
from raylaunch.controller.ray_dashboard import node_of
from raylaunch.controller.ray_jobs import RayJob
from raylaunch.controller.ray_upload import pack
from raylaunch.controller.settings import Settings
from raylaunch.controller.told_log import ToldLog
from raylaunch.errors import ConflictError, SpecError
from raylaunch.runner.contract import TOLD, AttemptSpec
from raylaunch.spec import JobSpec

EXIT = {"ended": "completed", "exit_code": 0}
LOG = (
    b"Running entrypoint for job train-1: exec python\n"
    + f'{TOLD}ab12 begin {{"folder": "/home/ml/x", "epoch": "ab12"}}\n'.encode()
    + b"step 1\n"
    + f'{TOLD}ab12 started {{"pid": 7}}\n'.encode()
    + b"step 2\r\xff no text\n"
    + f'{TOLD}ab12 left {{"folder": "/home/ml/x", "what": ["outputs"]}}\n'.encode()
    + f"{TOLD}ab12 exit {json.dumps(EXIT)}\n".encode()
)


def settings(tmp_path: Path, *, jobs_only: bool = True, secrets: tuple[str, ...] = ()) -> Settings:
    return Settings(
        cluster="far",
        cluster_id="c0ffee",
        store=tmp_path,
        port=1,
        gcs_address="",
        dashboard_url="http://127.0.0.1:8265",
        ray_token_path=tmp_path / "token",
        jobs_only=jobs_only,
        secrets=secrets,
    )


def spec_of(tmp_path: Path) -> AttemptSpec:
    wanted = JobSpec(entrypoint=["python", "train.py"])
    return attempt_spec(wanted, job="train", n=1, epoch="ab12", settings=settings(tmp_path))


@pytest.mark.parametrize("piece", [1, 7, 64, 10_000])
def test_however_a_log_is_cut_the_training_s_bytes_and_what_was_told_are_the_same(piece: int) -> None:
    log = ToldLog()
    begins = range(0, len(LOG), piece)
    kept = b"".join(log.feed(LOG[at : at + piece], last=at + piece >= len(LOG)) for at in begins)
    assert kept == b"step 1\nstep 2\r\xff no text\n"
    assert (log.begun, log.read) == (True, len(LOG))
    assert (dict(log.started or {}), dict(log.exit or {})) == ({"pid": 7}, EXIT)
    assert log.left == "outputs in /home/ml/x"


def test_a_training_cannot_tell_how_it_ended_by_a_line_of_its_own() -> None:
    log = ToldLog()
    forged = f'{TOLD}0000 exit {{"ended": "stopped"}}\n'.encode()
    begin = f'{TOLD}ab12 begin {{"epoch": "ab12"}}\n'.encode()
    assert log.feed(begin + forged, last=True) == forged
    assert log.exit is None


def test_where_no_runner_began_what_ray_wrote_is_the_log() -> None:
    log = ToldLog()
    assert log.feed(b"the runtime environment\n") == b""
    assert log.feed(b"could not be set up", last=True) == b"the runtime environment\ncould not be set up"
    assert not log.begun


def test_a_node_has_less_free_by_what_ray_says_is_used() -> None:
    row = {"node_id": "n1", "node_ip": "10.0.0.1", "state": "ALIVE", "resources_total": {"GPU": 8.0, "CPU": 64.0}}
    node = node_of(row, {"GPU": [3.0, 8.0]}, {"n1": "dgx-1"})
    assert (node["hostname"], node["alive"], node["free"]) == ("dgx-1", True, {"GPU": 5.0, "CPU": 64.0})
    assert node_of({**row, "state": "DEAD"}, {}, {})["hostname"] == "10.0.0.1"


@pytest.mark.parametrize(
    ("job", "ours", "expected"),
    [
        (RayJob(status="SUCCEEDED", driver_exit_code=0), False, ("completed", 0, False)),
        (RayJob(status="FAILED", driver_exit_code=3), False, ("exit_code", 3, False)),
        (RayJob(status="STOPPED"), False, ("stopped", None, True)),
        (RayJob(status="STOPPED"), True, ("stopped", None, False)),
    ],
)
def test_where_a_runner_told_nothing_ray_s_word_counts(
    job: RayJob,
    ours: bool,  # noqa: FBT001 -- a parameter of the table
    expected: tuple[str, int | None, bool],
) -> None:
    found = exit_by_ray(job, ours=ours)
    assert found is not None
    assert (found["ended"], found["exit_code"], found["by_ray"]) == expected


def test_a_killed_driver_says_nothing_of_the_training_s_end() -> None:
    assert exit_by_ray(RayJob(status="FAILED", driver_exit_code=-9), ours=False) is None


def test_what_ray_brings_is_the_packed_code_the_runner_and_what_it_is_told(tmp_path: Path) -> None:
    package = tmp_path / "code.tar.gz"
    with tarfile.open(package, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("train.py"))
    upload = pack(spec_of(tmp_path), package)
    with zipfile.ZipFile(BytesIO(upload.data)) as archive:
        assert archive.namelist() == [".raylaunch/attempt.json", ".raylaunch/runner.pyz", ".raylaunch/code.tar.gz"]
        assert archive.read(".raylaunch/code.tar.gz") == package.read_bytes()
    assert upload.uri.startswith("gcs://_ray_pkg_")
    assert pack(spec_of(tmp_path), package).uri == upload.uri


def test_code_that_ray_does_not_take_is_refused_before_it_is_read(tmp_path: Path) -> None:
    package = tmp_path / "code.tar.gz"
    with package.open("wb") as file:
        file.truncate(ray_upload.LIMIT + 1)
    with pytest.raises(ConflictError, match="larger than the 100 MiB that Ray's Jobs address takes"):
        pack(spec_of(tmp_path), package)


def test_secrets_of_a_job_and_of_its_cluster_are_refused_where_they_would_be_shown(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="the secret HF_TOKEN cannot be sent"):
        refuse_what_does_not_travel(settings(tmp_path), JobSpec(entrypoint="true", secrets=("HF_TOKEN",)))
    with pytest.raises(SpecError, match="the secret NGC_KEY cannot be sent"):
        refuse_what_does_not_travel(settings(tmp_path, secrets=("NGC_KEY",)), JobSpec(entrypoint="true"))
    with_stewards = settings(tmp_path, jobs_only=False)
    refuse_what_does_not_travel(with_stewards, JobSpec(entrypoint="true", secrets=("HF_TOKEN",)))


def test_gcs_none_means_that_the_dashboard_alone_is_used() -> None:
    spec = ClusterSpec(name="far", kind="existing", address="http://ray:8265", gcs="none")
    assert (spec.jobs_only, spec.gcs_address) == (True, "")
    full = ClusterSpec(name="far", kind="existing", address="http://ray:8265")
    assert (full.jobs_only, full.gcs_address) == (False, "ray:6379")
