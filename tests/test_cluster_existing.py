"""A Ray that somebody else runs: all verbs work on it, and it is left as it was."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import httpx2
import psutil
import pytest
from support.beside_ray import BesideRay, beside_ray
from support.cluster import UP_S, Cluster
from support.ray_head import RayHeadRunning
from support.waiting import wait_until

from raylaunch.models.states import JobState

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]

TRAINS = (
    "import os, pathlib\n"
    "print('gpus', os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
    "pathlib.Path(os.environ['RAYLAUNCH_OUTPUT_DIR'], 'model.bin').write_bytes(b'model' * 1000)\n"
)


@pytest.fixture(scope="module")
def theirs(plain_ray: RayHeadRunning) -> Iterator[BesideRay]:
    with beside_ray("theirs", plain_ray) as cluster:
        yield cluster


def test_up_starts_a_controller_next_to_ray_and_a_second_up_changes_nothing(theirs: BesideRay) -> None:
    before = theirs.controller_pid()
    again = theirs.cli("up")
    assert (again.status, theirs.controller_pid()) == (0, before)
    found = json.loads(theirs.good("status", "--json"))
    assert (found["kind"], found["state"], found["ray"]) == ("existing", "running", None)
    assert [(node["gpus"], node["steward"]) for node in found["nodes"]] == [(2, True)]


def test_a_job_runs_there_with_its_code_and_gpus_and_gives_back_log_and_model(theirs: BesideRay) -> None:
    folder = theirs.work / "project"
    folder.mkdir()
    (folder / "train.py").write_text(TRAINS)
    done = theirs.cli(
        "-c", str(theirs.work / "cluster.yaml"), "run", "--gpus", "2", "--", "python", "train.py", cwd=folder
    )
    assert done.status == 0, done.err
    assert done.out.splitlines()[0].removeprefix("gpus ").split(",") == ["0", "1"]
    theirs.good("get", "last", "--to", "model")
    assert (theirs.work / "model" / "model.bin").read_bytes() == b"model" * 1000


def test_a_job_is_stopped_and_its_processes_have_exited(theirs: BesideRay) -> None:
    job = theirs.python("import time; print('ready', flush=True); time.sleep(600)")
    theirs.ready(job)
    theirs.good("stop", job)
    assert theirs.ended(job).state is JobState.STOPPED
    assert not theirs.of_attempt(f"{job}-1")


def test_a_job_that_fails_is_tried_again(theirs: BesideRay) -> None:
    job = theirs.python("import os, sys; sys.exit(int(os.environ['RAYLAUNCH_ATTEMPT']) < 2)", "--retries", "1")
    ended = theirs.ended(job, timeout_s=90)
    assert (ended.state, len(ended.attempts)) == (JobState.SUCCEEDED, 2)


def test_metrics_of_a_run_can_be_read_while_it_is_off_line(theirs: BesideRay) -> None:
    code = "import wandb\nrun = wandb.init()\nrun.log({'loss': 0.5})\nrun.finish()"
    job = theirs.python(code)
    assert theirs.ended(job, timeout_s=120).state is JobState.SUCCEEDED
    assert theirs.job(job).last_metrics["loss"] == 0.5


def test_down_stops_the_controller_and_node_agents_but_not_ray(theirs: BesideRay) -> None:
    kept, theirs_too = theirs.python("print('kept')"), f"somebody-elses-{secrets.token_hex(3)}"
    theirs.ended(kept)
    headers = {"Authorization": f"Bearer {theirs.ray_head.token_path.read_text()}"}
    with httpx2.Client(base_url=theirs.ray_head.dashboard_url, headers=headers, trust_env=False) as ray:
        body = {"entrypoint": "sleep 600", "submission_id": theirs_too}
        ray.post("/api/jobs/", json=body).raise_for_status()
        wait_until(lambda: ray.get(f"/api/jobs/{theirs_too}").json()["status"] == "RUNNING", 60, "their job runs")
        before, controller = theirs.daemons(), theirs.controller_pid()
        output = theirs.good("down", timeout_s=UP_S)
        assert "was not started by raylaunch" in output
        wait_until(lambda: not psutil.pid_exists(controller), 60, "the controller has ended")
        wait_until(lambda: not theirs.agents(), 60, "the node agents have ended")
        assert before <= theirs.daemons()
        assert ray.get(f"/api/jobs/{theirs_too}").json()["status"] == "RUNNING"
    assert theirs.cli("list").status == 1
    theirs.good("up", timeout_s=UP_S)
    assert theirs.job(kept).state is JobState.SUCCEEDED


def test_a_missing_ray_is_reported_with_its_address(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("name: gone\naddress: http://127.0.0.1:9\n")
    cluster = Cluster(tmp_path, tmp_path)
    cluster.good("trust")
    refused = cluster.cli("up")
    assert refused.status == 1
    assert "no Ray answers at http://127.0.0.1:9: " in refused.err
    assert "http://HOST:8265" in refused.err


def test_a_wrong_token_is_reported_with_its_file(theirs: BesideRay, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("wrong" * 10)  # in raylaunch's own folder
    text = f"name: shut\naddress: {theirs.ray_head.dashboard_url}\nray_token_file: {tmp_path / 'token'}\n"
    (tmp_path / "cluster.yaml").write_text(text)
    cluster = Cluster(tmp_path, tmp_path)
    cluster.good("trust")
    refused = cluster.cli("up")
    assert refused.status == 1
    assert f"rejects the token in {tmp_path / 'token'}" in refused.err


def test_a_plan_reports_the_steps_and_changes_nothing(theirs: BesideRay, tmp_path: Path) -> None:
    text = (theirs.work / "cluster.yaml").read_text().replace("theirs", "planned")
    (tmp_path / "cluster.yaml").write_text(text)
    cluster = Cluster(tmp_path, tmp_path)
    cluster.env["HOME"] = theirs.env["HOME"]
    cluster.good("trust")
    planned = cluster.cli("up", "--dry-run")
    assert "which raylaunch did not start" in planned.out
    assert "node agent on each node" in planned.out
    assert not (tmp_path / "clusters").exists()


def test_an_unreachable_head_is_an_error_with_a_hint(theirs: BesideRay, tmp_path: Path) -> None:
    text = (theirs.work / "cluster.yaml").read_text().replace("theirs", "shut")
    (tmp_path / "cluster.yaml").write_text(text.replace(theirs.ray_head.gcs_address, "127.0.0.1:9"))
    cluster = Cluster(tmp_path, tmp_path)
    cluster.env["HOME"] = theirs.env["HOME"]
    cluster.good("trust")
    refused = cluster.cli("up")
    assert refused.status == 1
    assert "cannot be reached at 127.0.0.1:9: " in refused.err
    assert "on a machine that reaches Ray's own ports" in refused.err
    assert not (tmp_path / "clusters").exists()
