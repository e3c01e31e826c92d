"""A Ray that somebody else runs, of which only the dashboard's address is used: jobs run, and their logs come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx2
import psutil
import pytest
from support.beside_ray import BesideRay, beside_ray
from support.cluster import UP_S, Cluster
from support.waiting import wait_until

from raylaunch.reasons import Reason
from raylaunch.state import JobState

pytestmark = [pytest.mark.ray, pytest.mark.timeout(420)]

TRAINS = (
    "import os, pathlib, subprocess\n"
    "print('gpus', os.environ['CUDA_VISIBLE_DEVICES'], 'no line end after this', flush=True)\n"
    "print(subprocess.check_output(['./program'], text=True), end='', flush=True)\n"
    "pathlib.Path(os.environ['RAYLAUNCH_OUTPUT_DIR'], 'model.bin').write_bytes(b'model')\n"
    'print(\'::raylaunch 0000 exit {"ended": "stopped"}\')\n'
)


@pytest.fixture(scope="module")
def far() -> Iterator[BesideRay]:
    with beside_ray("far", dashboard_only=True) as cluster:
        yield cluster


def test_up_and_status_say_what_cannot_be_done_there(far: BesideRay) -> None:
    again = far.cli("up")
    assert again.status == 0
    assert "asks for no token" in again.err
    assert "no metrics, files, checkpoints or secrets travel" in again.err
    found = json.loads(far.good("status", "--json"))
    assert (found["state"], [(node["gpus"], node["steward"]) for node in found["nodes"]]) == ("running", [(2, False)])
    assert any("no metrics, files, checkpoints or secrets travel" in problem for problem in found["problems"])


def test_a_job_gets_its_code_and_gpus_and_its_log_comes_back_as_it_was_written(far: BesideRay) -> None:
    folder = far.work / "project"
    folder.mkdir()
    (folder / "train.py").write_text(TRAINS)
    (folder / "real-program").write_text("#!/bin/sh\nprintf 'it runs'\n")
    (folder / "real-program").chmod(0o755)
    (folder / "program").symlink_to("real-program")
    file = str(far.work / "cluster.yaml")
    done = far.cli("-c", file, "run", "--gpus", "2", "--", "python", "train.py", cwd=folder)
    assert done.status == 0, done.err
    expected = 'gpus 0,1 no line end after this\nit runs::raylaunch 0000 exit {"ended": "stopped"}\n'
    assert done.out == expected
    assert far.log("last").decode() == expected


@pytest.mark.long
def test_what_a_job_left_on_its_node_is_kept_there_and_named(far: BesideRay) -> None:
    code = "import os, pathlib\npathlib.Path(os.environ['RAYLAUNCH_OUTPUT_DIR'], 'model.bin').write_bytes(b'model')"
    ended = far.ended(far.python(code), timeout_s=90)
    assert ended.state is JobState.SUCCEEDED
    warnings = ended.environment.warnings if ended.environment else ()
    left = next(line for line in warnings if line.startswith("it left outputs in "))
    folder = Path(left.removeprefix("it left outputs in ").removesuffix(" on its node"))
    assert (folder / "outputs" / "model.bin").read_bytes() == b"model"
    assert not (folder / "code").exists()
    for verb in ("files", "metrics"):
        refused = far.cli(verb, ended.id)
        assert refused.status == 1
        assert f"{ended.id} has no {verb} here: only Ray's dashboard is reached" in refused.err
        assert "gcs: HOST:6379 in cluster.yaml" in refused.err


def test_a_job_with_a_secret_is_refused_before_the_secret_goes_anywhere(far: BesideRay) -> None:
    refused = far.cli("submit", "--secret", "HF_TOKEN", "--", "true", env={"HF_TOKEN": "hf_very_secret"})
    assert refused.status != 0
    assert "Ray's Jobs API shows what it is given to all who ask it" in refused.err
    with httpx2.Client(base_url=far.ray_head.dashboard_url, trust_env=False) as ray:
        assert "hf_very_secret" not in ray.get("/api/jobs/").text


def test_a_job_is_stopped_with_its_own_grace_and_its_processes_are_gone(far: BesideRay) -> None:
    code = (
        "import signal, sys, time\n"
        "def leave(*_):\n    time.sleep(4)\n    print('saved', flush=True)\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    job = far.python(code)
    far.ready(job)
    far.good("stop", job)
    ended = far.ended(job)
    assert (ended.state, ended.reason) == (JobState.STOPPED, Reason.STOP_REQUESTED)
    assert far.log(job) == b"ready\nsaved\n"
    assert not far.of_attempt(f"{job}-1")


@pytest.mark.long
def test_a_job_that_fails_is_tried_again_and_the_end_of_its_program_is_known(far: BesideRay) -> None:
    job = far.python("import os, sys; sys.exit(6 if os.environ['RAYLAUNCH_ATTEMPT'] < '2' else 7)", "--retries", "1")
    ended = far.ended(job, timeout_s=90)
    assert [(one.reason, one.exit_code) for one in ended.attempts] == [(Reason.EXIT_CODE, 6), (Reason.EXIT_CODE, 7)]


@pytest.mark.long
def test_a_job_goes_on_without_its_controller_and_its_log_is_whole_afterwards(far: BesideRay) -> None:
    flag = far.work / "go-on"
    waits = f"while not pathlib.Path({str(flag)!r}).exists(): time.sleep(0.1)\n"
    job = far.python("import pathlib, time\nprint('one', flush=True)\n" + waits + "print('two')")
    far.ready(job, b"one")
    psutil.Process(far.controller_pid()).kill()
    flag.touch()
    far.good("up", timeout_s=UP_S)
    assert far.ended(job).state is JobState.SUCCEEDED
    assert far.log(job) == b"one\ntwo\n"


def test_down_ends_the_controller_and_nothing_of_ray(far: BesideRay) -> None:
    theirs = f"somebody-elses-{uuid4().hex[:6]}"
    with httpx2.Client(base_url=far.ray_head.dashboard_url, trust_env=False, timeout=30) as ray:
        ray.post("/api/jobs/", json={"entrypoint": "sleep 600", "submission_id": theirs}).raise_for_status()
        wait_until(lambda: ray.get(f"/api/jobs/{theirs}").json()["status"] == "RUNNING", 60, "their job runs")
        controller = far.controller_pid()
        assert "was not started by raylaunch, and runs on" in far.good("down", timeout_s=UP_S)
        wait_until(lambda: not psutil.pid_exists(controller), 10, "the controller is gone")
        assert ray.get(f"/api/jobs/{theirs}").json()["status"] == "RUNNING"
    far.good("up", timeout_s=UP_S)
    wait_until(lambda: theirs in far.good("list", "--json"), 20, "it is listed")


def test_a_head_that_is_not_reached_is_said_with_the_way_round_it(far: BesideRay, tmp_path: Path) -> None:
    text = (far.work / "cluster.yaml").read_text().replace("none", "127.0.0.1:9").replace("far", "shut")
    (tmp_path / "cluster.yaml").write_text(text)
    refused = Cluster(tmp_path, tmp_path).cli("up")
    assert refused.status == 1
    assert "cannot be reached at 127.0.0.1:9: " in refused.err
    assert "use its dashboard alone, by which nothing but logs comes back: gcs: none" in refused.err
    assert not (tmp_path / "clusters").exists()
