"""``launcher: ray`` on a real cluster: drivers, their workers, and the programs of Ray Train and Tune."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cluster import ROOT, Cluster
from support.signals import send
from support.waiting import wait_until
from support.wandb_server import WandbServer

from raylaunch.models.states import JobState, Reason
from raylaunch.tracking.run_file import RunExit, RunFile, RunInfo

pytestmark = [
    pytest.mark.ray,
    pytest.mark.wandb,
    pytest.mark.skipif(
        importlib.util.find_spec("pyarrow") is None, reason="needs Ray Train's libraries: pip install 'ray[train]'"
    ),
]

LOOKS = """
import json, os, sys, time
from pathlib import Path
import ray

def wait_for(name):
    while not Path(os.environ["TEST_DIR"], name).exists():
        time.sleep(0.05)

@ray.remote(num_gpus=1, num_cpus=0)
class Worker:
    def look(self):
        import here, raylaunch
        raylaunch.report({"seen": here.ANSWER}, step=1, total=2)
        names = ("CUDA_VISIBLE_DEVICES", "COLOUR", "HF_TOKEN", "RAYLAUNCH_JOB_ID", "WANDB_RUN_ID", "WANDB_RUN_GROUP")
        return {"cwd": os.getcwd(), "python": sys.prefix, **{name: os.environ.get(name) for name in names}}

print(json.dumps({"driver": os.environ["CUDA_VISIBLE_DEVICES"], "cwd": os.getcwd()}), flush=True)
wait_for("take")
workers = [Worker.remote() for _ in range(2)]
print(json.dumps({"workers": ray.get([worker.look.remote() for worker in workers])}), flush=True)
wait_for("end")
"""
HOLDS = """
import os, subprocess, sys, time
import ray

@ray.remote(num_gpus=1, num_cpus=0)
class Holder:
    def hold(self):
        child = "import time; time.sleep(600)"
        return subprocess.Popen([sys.executable, "-c", child], start_new_session=True).pid

group = ray.util.placement_group([{"GPU": 1}])
ray.get(group.ready())
left = Holder.options(name="left-over", lifetime="detached").remote()
ours = Holder.remote()
print("held", ray.get([left.hold.remote(), ours.hold.remote()]), flush=True)
time.sleep(600)
"""
SAVES = """
import signal, subprocess, time
import ray

@ray.remote(num_gpus=1, num_cpus=0)
class Worker:
    def weights(self):
        return "7"

loader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
worker = Worker.remote()
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("ready", ray.get(worker.weights.remote()), flush=True)
while not asked:
    time.sleep(0.05)
print("saved", *loader.communicate(ray.get(worker.weights.remote())), "asked", len(asked), flush=True)
"""
TRAINS_ON = """
import sys, time
from ray import train
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

def loop(config):
    print("begins in", sys.prefix, flush=True)
    for step in range(100_000):
        train.report({"loss": 1 / (step + 1), "number": step})
        time.sleep(0.2)

scaling = ScalingConfig(num_workers=1)
DataParallelTrainer(loop, train_loop_config={"lr": 0.1}, scaling_config=scaling).fit()
"""
TWO_TRAININGS = """
import os, tempfile
from pathlib import Path
from ray import train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

def loop(config):
    rank, first = train.get_context().get_world_rank(), 0
    checkpoint = train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            first = int(Path(folder, "next").read_text())
    print("begins at", first, "in attempt", os.environ["RAYLAUNCH_ATTEMPT"], flush=True)
    if config["tracks"]:
        import wandb
        run = wandb.init()
    for number in range(first, 6):
        if config["crash"] and rank and number == 4 and not first:
            os._exit(3)  # once: the workers are restarted
        if config["crash"] and number == 5 and os.environ["RAYLAUNCH_ATTEMPT"] == "1":
            raise RuntimeError("beyond what Ray Train tries again")
        if config["tracks"]:
            run.log({"own": number + 100 * rank})
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "next").write_text(str(number + 1))
            kept = Checkpoint.from_directory(folder) if number == 1 and not rank else None
            train.report({"number": number, "rank": rank}, checkpoint=kept)

for name in ("reports", "own-runs"):
    DataParallelTrainer(
        loop,
        train_loop_config={"tracks": name == "own-runs", "crash": name == "reports"},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name=name, failure_config=FailureConfig(max_failures=1)),
    ).fit()
    print("done", name, flush=True)
"""


def project(cluster: Cluster, name: str, **files: str) -> Path:
    folder = cluster.work / name
    folder.mkdir(exist_ok=True)
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)
    return folder


def example(cluster: Cluster, name: str) -> Path:
    folder = cluster.work / "examples" / name
    shutil.copytree(ROOT / "examples" / name, folder, dirs_exist_ok=True)
    return folder


def ask_ray(cluster: Cluster, path: str) -> Any:  # noqa: ANN401 -- whatever Ray's dashboard answers
    env = cluster.ray_env()
    request = urllib.request.Request(  # noqa: S310 -- a loopback address of the cluster
        env["RAY_API_SERVER_ADDRESS"] + path, headers={"Authorization": f"Bearer {env['RAY_AUTH_TOKEN']}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 -- as above
        return json.loads(answer.read())


def living_actors(cluster: Cluster) -> list[str]:
    """Return the classes of the actors that live, without those of raylaunch itself and of Ray's job submission."""
    found = ask_ray(cluster, "/api/v0/actors?detail=1&limit=10000")["data"]["result"]["result"]
    return [
        actor["class_name"]
        for actor in found
        if actor["state"] != "DEAD" and actor["class_name"] not in {"NodeAgent", "JobSupervisor"}
    ]


def free_gpus(cluster: Cluster) -> float:
    return cluster.ask(lambda client: client.status()).nodes[0].gpus_free


def nothing_is_left(cluster: Cluster, job: str) -> None:
    """Check that no process, actor or placement group of a job is left, and that its GPUs are free again."""
    assert not cluster.of_attempt(f"{job}-1")
    wait_until(lambda: free_gpus(cluster) == 4, 30, "all GPUs are free")
    wait_until(lambda: not living_actors(cluster), 30, "no actor is left")
    groups = ask_ray(cluster, "/api/v0/placement_groups?limit=10000")["data"]["result"]["result"]
    assert {group["state"] for group in groups} <= {"REMOVED"}


def metrics_of(cluster: Cluster, job: str) -> dict[str, list[tuple[float, float]]]:
    """Return the points of all metrics, as a client reads them."""
    keys = cluster.ask(lambda client: client.metrics(job)).keys
    page = cluster.ask(lambda client: client.metrics(job, keys=list(keys), max_points=10_000))
    return {series.key: [(point.step, point.value) for point in series.points] for series in page.series}


def run_files(cluster: Cluster, job: str) -> dict[str, Path]:
    """Return the W&B files of a job's first attempt in the store, by their runs' ids."""
    folder = cluster.paths.default_store / "jobs" / job / "attempt-1"
    return {file.stem.removeprefix("run-"): file for file in folder.glob("wandb/wandb/*run-*/run-*.wandb")}


def own_run(cluster: Cluster, job: str) -> str:
    link = cluster.job(job).wandb
    assert link is not None
    return link.run_id


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.mark.long
def test_a_driver_holds_its_workers_gpus_from_its_start_to_its_end(cluster: Cluster, tmp_path: Path) -> None:
    folder = project(cluster, "looks", main__py=LOOKS, here__py="ANSWER = 42\n")
    cluster.ask(lambda client: client.secrets_set("HF_TOKEN", "hf-planted-1"))
    options = ["--launcher", "ray", "--gpus", "2", "--secret", "HF_TOKEN", "--env", "COLOUR=blue"]
    job = cluster.submit(
        *options, "--env", f"TEST_DIR={tmp_path}", "--name", "looker", "--", "python", "main.py", cwd=folder
    )
    cluster.runs(job)
    wait_until(lambda: b"driver" in cluster.log(job), 60, "the driver runs")
    host = cluster.job(job).attempts[0].node
    why = f"needs 3 GPUs on one node; {host} has 2 free of 4: 2 held by looker ({job})"
    for _ in ("before its workers have their GPUs", "while they have them"):
        beside = cluster.python("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])", "--gpus", "2")
        assert cluster.ended(beside).state is JobState.SUCCEEDED
        waiter = cluster.python("print('my turn')", "--gpus", "3")
        cluster.until(waiter, lambda one: one.message == why, 30, "it says what it waits for")
        cluster.good("stop", waiter)
        (tmp_path / "take").touch()
        wait_until(lambda: b"workers" in cluster.log(job), 60, "the workers have looked")
    assert free_gpus(cluster) == 2
    found = ask_ray(cluster, "/api/v0/runtime_envs?detail=1&limit=10000"), ask_ray(cluster, "/api/jobs/")
    assert "COLOUR" in json.dumps(found)
    assert "hf-planted-1" not in json.dumps(found)
    (tmp_path / "end").touch()
    assert cluster.ended(job).state is JobState.SUCCEEDED

    reported = [json.loads(line) for line in cluster.log(job).decode().splitlines() if line.startswith("{")]
    driver, workers = reported[0], reported[1]["workers"]
    assert driver["driver"] == ""
    assert sorted(worker["CUDA_VISIBLE_DEVICES"] for worker in workers) == ["0", "1"]
    for worker in workers:
        assert worker["cwd"] == driver["cwd"]
        assert (worker["COLOUR"], worker["HF_TOKEN"], worker["RAYLAUNCH_JOB_ID"]) == ("blue", "hf-planted-1", job)
        assert (worker["WANDB_RUN_ID"], worker["WANDB_RUN_GROUP"]) == (None, "looker")
        assert worker["python"] == sys.prefix
    shown = json.loads(cluster.good("show", "--json", job))
    assert shown["last_metrics"] == {"seen": 42}
    assert (shown["progress"]["step"], shown["progress"]["total"]) == (1, 2)
    nothing_is_left(cluster, job)


@pytest.mark.long
@pytest.mark.parametrize("by", ["stop", "kill"])
def test_no_process_of_a_driver_remains_after_a(by: str, cluster: Cluster) -> None:
    job = cluster.submit("--launcher", "ray", "--gpus", "3", "--working-dir", "", "--", "python", "-c", HOLDS)
    wait_until(lambda: b"held" in cluster.log(job), 90, "its workers hold their GPUs")
    assert "Holder" in living_actors(cluster)
    before = cluster.of_attempt(f"{job}-1")
    if by == "stop":
        cluster.good("stop", job)
    else:
        send(cluster.job(job).attempts[0].pid or 0)
    ended = cluster.ended(job)
    expected = (JobState.STOPPED, Reason.STOP_REQUESTED) if by == "stop" else (JobState.FAILED, Reason.SIGNAL)
    assert (ended.state, ended.reason) == expected
    assert len(before) >= 5
    nothing_is_left(cluster, job)


def test_a_driver_still_has_its_workers_and_children_when_it_is_stopped(cluster: Cluster) -> None:
    job = cluster.submit("--launcher", "ray", "--gpus", "1", "--working-dir", "", "--", "python", "-c", SAVES)
    cluster.ready(job, b"ready 7")
    cluster.good("stop", job)
    ended = cluster.ended(job)
    assert (ended.state, ended.reason) == (JobState.STOPPED, Reason.STOP_REQUESTED)
    assert b"saved 7 None asked 1\n" in cluster.log(job)
    nothing_is_left(cluster, job)


@pytest.fixture
def without_raylaunch(tmp_path: Path) -> Path:
    """An environment beside the cluster's own, with all that is installed there but raylaunch."""
    prefix = tmp_path / "without"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True, timeout=60)
    packages = prefix / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "raylaunch" not in path.name:
            (packages / path.name).symlink_to(path)
    (Path(next(prefix.glob("lib/python3*/site-packages"))) / "packages.pth").write_text(f"{packages}\n")
    return prefix


@pytest.mark.long
def test_reports_of_ray_train_are_readable_at_once_and_a_stop_finishes_the_run(
    cluster: Cluster, without_raylaunch: Path
) -> None:
    words = ["--launcher", "ray", "--working-dir", "", "--environment", f"venv:{without_raylaunch}"]
    job = cluster.submit(*words, "--", "python", "-c", TRAINS_ON)
    wait_until(lambda: len(metrics_of(cluster, job).get("number", [])) > 5, 120, "reports are readable")
    assert cluster.job(job).state is JobState.RUNNING
    assert f"begins in {without_raylaunch}" in cluster.log(job).decode()
    cluster.good("stop", job)
    assert cluster.ended(job).state is JobState.STOPPED
    points = metrics_of(cluster, job)["number"]
    assert points == [(step, step) for step in range(len(points))]
    assert "left over" not in cluster.job(job).message
    items = list(RunFile(run_files(cluster, job)[own_run(cluster, job)]).stream())
    assert [item.code for item in items if isinstance(item, RunExit)] == [143]
    nothing_is_left(cluster, job)


@pytest.mark.long
def test_each_report_is_tracked_once_in_addition_to_the_workers_own_runs(cluster: Cluster, server: WandbServer) -> None:
    folder = project(cluster, "two", main__py=TWO_TRAININGS)
    words = ["--launcher", "ray", "--cpus", "2", "--retries", "1", "--name", "two", "--", "python", "main.py"]
    job = cluster.submit(*words, cwd=folder, env=server.environment())
    done = cluster.ended(job, 280)
    assert (done.state, len(done.attempts)) == (JobState.SUCCEEDED, 2), done.message
    assert b"begins at 2 in attempt 2" in cluster.log(job)
    assert done.wandb is not None
    run = done.wandb.run_id
    assert done.wandb.mode == "online"
    assert done.wandb.url == f"{server.url}/team/raylaunch/runs/{run}"

    first = server.runs[run]
    assert [(row["_step"], row["number"]) for row in first.history] == [(number, number) for number in range(6)]
    assert (first.complete, first.exit_code) == (True, 0)
    assert first.fields["groupName"] == "two"

    own = {name: [row["own"] for row in found.history] for name, found in server.runs.items() if name != run}
    assert own == {f"{run}-2": list(range(6)), f"{run}-2-rank-1": list(range(100, 106))}
    assert all(found.complete for found in server.runs.values())
    metrics = metrics_of(cluster, job)
    assert [value for _, value in metrics[f"{run}-2-rank-1/own"]] == list(range(100, 106))
    assert server.key not in json.dumps(ask_ray(cluster, "/api/v0/runtime_envs?detail=1&limit=10000"))


def test_the_ray_train_example_trains_on_two_workers(cluster: Cluster) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch, which could not be installed here")
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'raylaunch[demo]'")
    folder = example(cluster, "ray_train")
    result = cluster.cli("run", "-f", "job.yaml", cwd=folder, timeout_s=280)
    assert result.status == 0, result.err
    assert "world_rank=1" in result.out
    assert "accuracy on held-out digits: 0.9" in result.out

    job = json.loads(cluster.good("show", "ray-train", "--json"))
    assert job["progress"]["step"] == 10
    metrics = metrics_of(cluster, job["id"])
    assert sorted(metrics) == ["accuracy", "epoch", "loss"]
    assert metrics["epoch"] == [(step, step + 1) for step in range(10)]
    info = next(item for item in RunFile(run_files(cluster, job["id"])[job["wandb"]["run_id"]]).stream())
    assert isinstance(info, RunInfo)
    assert (info.run_id, info.project, info.name) == (job["wandb"]["run_id"], "digits", job["id"])

    cluster.good("get", "ray-train", "--to", "model", cwd=folder)
    saved = torch.load(folder / "model" / "model.pt", weights_only=True)
    assert saved["epoch"] == 10
    files = json.loads(cluster.good("files", "ray-train", "--json"))
    kept = [file["path"] for file in files if file["kind"] == "checkpoint" and file["path"].endswith("model.pt")]
    assert len(kept) == 10
    assert not list(Path("~/ray_results/digits").expanduser().glob("checkpoint_*"))


@pytest.mark.long
def test_the_tune_example_gives_each_trial_a_run(cluster: Cluster) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'raylaunch[demo]'")
    folder = example(cluster, "tune")
    result = cluster.cli("run", "-f", "job.yaml", cwd=folder, timeout_s=280)
    assert result.status == 0, result.err
    assert "best accuracy on held-out digits: 0.9" in result.out

    job = json.loads(cluster.good("show", "tune", "--json"))
    runs = run_files(cluster, job["id"])
    assert len(runs) == 4
    metrics = metrics_of(cluster, job["id"])
    best = 0.0
    for run_id, file in runs.items():
        info = next(item for item in RunFile(file).stream() if isinstance(item, RunInfo))
        assert (info.run_id, info.project) == (run_id, "digits")
        assert [value for _, value in metrics[f"{run_id}/epoch"]] == [1, 2, 3, 4, 5]
        best = max(best, metrics[f"{run_id}/accuracy"][-1][1])
    cluster.good("get", "tune", "--to", "best", cwd=folder)
    found = json.loads((folder / "best" / "best.json").read_text())
    assert found["accuracy"] == pytest.approx(best)
    statuses = {found["submission_id"]: found["status"] for found in ask_ray(cluster, "/api/jobs/")}
    assert statuses[f"{job['id']}-1"] == "SUCCEEDED"
    files = json.loads(cluster.good("files", "tune", "--json"))
    assert sum(file["path"].endswith("result.json") for file in files) == 4
