"""``launcher: ray`` without a Ray: what driver and workers are started with, and what fits the cluster's Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.attempts import attempt_spec
from support.running import Attempt

from raylaunch import contract
from raylaunch.contract import EnvironmentSpec
from raylaunch.runner.archive import runner_zip
from raylaunch.runner.launchers import ray_driver
from raylaunch.runner.launchers.ray_driver import NO_RAY, RayVersions, mismatch

CLUSTER = RayVersions("3.11.7", "2.60.0")
CONFIG = {"runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "40"}}, "metadata": {"job_submission_id": "job-1"}}
OF_RAY = {
    "RAY_ADDRESS": "127.0.0.1:6379",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": "/cluster/token",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(CONFIG),
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
}


def prepared(
    folder: Path, *, secrets: dict[str, str] | None = None, wandb_url: str = "", env: dict[str, str] | None = None
) -> dict[str, str]:
    """Return the variables of a driver whose job sets EPOCHS, and write what its workers start with."""
    spec = attempt_spec("job-aaaaaa-1")
    spec["env"] = {"EPOCHS": "3", **(env or {})}
    spec["wandb"]["run_id"] = "rl1"
    own = {**spec["env"], **(secrets or {})}
    driver = ray_driver.DriverPlan(
        spec,
        {"PATH": "/env/bin:/usr/bin:/bin", "LANG": "C.UTF-8", contract.VAR_ATTEMPT: spec["tag"], **own},
        secrets or {},
        sys.executable,
        imports=False,
        wandb_url=wandb_url,
    )
    (folder / contract.CODE).mkdir(parents=True)
    return ray_driver.prepare(driver, folder, OF_RAY)


def runtime_env(env: dict[str, str]) -> dict[str, Any]:
    """Return the runtime environment that `ray.init` of the driver takes."""
    found: dict[str, Any] = json.loads(env[ray_driver.JOB_CONFIG])["runtime_env"]
    return found


def worker(env: dict[str, str], *, cwd: Path | None = None) -> dict[str, Any]:
    """Start a worker's interpreter as Ray does; return its variables and its folder."""
    tell = "import json, os; print(json.dumps([dict(os.environ), os.getcwd()]))"
    started = {"PATH": os.environ["PATH"], **runtime_env(env)["env_vars"]}
    done = subprocess.run(
        ["bash", "-c", f'exec {runtime_env(env)["py_executable"]} -c "{tell}"'],
        env=started,
        cwd=cwd or Path.cwd(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    variables, where = json.loads(done.stdout)
    return {"env": variables, "cwd": where}


def test_a_driver_joins_ray_as_its_job_and_has_no_gpu_of_its_own(tmp_path: Path) -> None:
    env = prepared(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        assert env[name] == OF_RAY[name]
    assert json.loads(env[ray_driver.JOB_CONFIG])["metadata"] == CONFIG["metadata"]
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES" not in env


def test_workers_get_the_jobs_environment_and_no_setting_of_gpus(tmp_path: Path) -> None:
    seen = worker(prepared(tmp_path))["env"]
    assert seen["EPOCHS"] == "3"
    assert seen["PATH"] == "/env/bin:/usr/bin:/bin"
    assert seen[contract.VAR_ATTEMPT] == "cluster/job-aaaaaa-1"
    assert seen["RAY_ADDRESS"] == "127.0.0.1:6379"
    assert seen["RAY_JOB_STOP_WAIT_TIME_S"] == "40"
    assert "CUDA_VISIBLE_DEVICES" not in seen
    assert "WANDB_RUN_ID" not in seen


def test_a_secret_reaches_workers_and_stands_in_no_runtime_environment(tmp_path: Path) -> None:
    token = 'it\'s $HOME "quoted" `x`\n2'  # noqa: S105 -- all that a shell could take for its own
    env = prepared(tmp_path, secrets={"HF_TOKEN": token})
    assert worker(env)["env"]["HF_TOKEN"] == token
    assert "HF_TOKEN" not in json.dumps(runtime_env(env))
    start = tmp_path / contract.TMP / "ray/worker"
    assert start.stat().st_mode & 0o077 == 0
    ray_driver.delete_secrets(tmp_path)
    assert not start.exists()


def test_on_another_node_a_worker_says_that_its_wandb_runs_are_not_kept(tmp_path: Path) -> None:
    env = prepared(tmp_path / "attempt", env={"WANDB_MODE": "online", "WANDB_PROJECT": "p"})
    ray_driver.delete_secrets(tmp_path / "attempt")  # nothing of the attempt's folder is there
    (tmp_path / "lib/wandb/sdk").mkdir(parents=True)
    for package in ("wandb", "wandb/sdk"):
        (tmp_path / "lib" / package / "__init__.py").touch()
    (tmp_path / "lib/wandb/sdk/wandb_init.py").write_text("print('opened')")
    program = tmp_path / "lib/worker.py"
    program.write_text(
        "import json, os, sys\nimport wandb.sdk.wandb_init\n"
        "if __name__ == '__main__': print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    )
    started = {
        **runtime_env(env)["env_vars"],
        "WANDB_DIR": str(tmp_path / "attempt/wandb"),
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        ["bash", "-c", f"exec {runtime_env(env)['py_executable']} {program} --port=1 'a b'"],
        env=started,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    opened, reported = done.stdout.splitlines()
    arguments, seen = json.loads(reported)
    assert (opened, arguments) == ("opened", ["--port=1", "a b"])
    assert (seen["WANDB_MODE"], seen["WANDB_PROJECT"]) == ("offline", "p")
    assert Path(seen["WANDB_DIR"]).parent == tmp_path, "a folder of its own"
    assert done.stderr.count("raylaunch: this worker is on ") == 1
    assert f"{seen['WANDB_DIR']}; they are offline" in done.stderr


def test_wandbs_key_is_in_a_file_and_in_no_process(tmp_path: Path) -> None:
    theirs = tmp_path / "netrc"
    theirs.write_text("machine example.org login me password mine\n")
    env = prepared(
        tmp_path / "a", secrets={"WANDB_API_KEY": "k" * 40}, wandb_url="http://wandb:8080", env={"NETRC": str(theirs)}
    )
    assert "WANDB_API_KEY" not in env
    assert "WANDB_API_KEY" not in worker(env)["env"]
    netrc = Path(env["NETRC"])
    assert netrc.read_text().split() == [
        *["machine", "example.org", "login", "me", "password", "mine"],
        *["machine", "wandb:8080", "login", "user", "password", "k" * 40],
    ]
    assert netrc.stat().st_mode & 0o077 == 0


def test_what_the_job_sets_for_ray_train_wins_over_raylaunchs_defaults(tmp_path: Path) -> None:
    by_default = prepared(tmp_path / "a")
    assert by_default["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.1"
    assert runtime_env(by_default)["env_vars"]["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.1"
    theirs = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "5", "RAY_TRAIN_CALLBACKS": "mine.Callback", "RAY_DEDUP_LOGS": "1"}
    env = prepared(tmp_path / "b", env=theirs)
    assert env["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "5"
    assert env["RAY_DEDUP_LOGS"] == "1"
    assert env["RAY_TRAIN_CALLBACKS"] == "mine.Callback,raylaunch.tracking.train_callback.TrainReports"


def test_a_worker_begins_in_the_working_directory_unless_ray_gave_it_another(tmp_path: Path) -> None:
    env = prepared(tmp_path)
    assert worker(env)["cwd"] == str(tmp_path / contract.CODE)
    assert worker(env, cwd=tmp_path)["cwd"] == str(tmp_path)


def test_on_a_node_that_lacks_the_attempts_folder_a_worker_starts_without_its_secrets(tmp_path: Path) -> None:
    env = prepared(tmp_path, secrets={"HF_TOKEN": "t"})
    ray_driver.delete_secrets(tmp_path)
    seen = worker(env)
    assert (seen["env"]["EPOCHS"], "HF_TOKEN" in seen["env"]) == ("3", False)


def test_a_python_path_of_the_programs_own_keeps_what_raylaunch_adds(tmp_path: Path) -> None:
    env = prepared(tmp_path)
    archive = str(tmp_path / contract.RUNNER)
    assert env["PYTHONPATH"] == f"{archive}/startup:{archive}"
    config = json.loads(env[ray_driver.JOB_CONFIG])
    config["runtime_env"]["env_vars"]["PYTHONPATH"] = "/mine"
    changed = {**env, ray_driver.JOB_CONFIG: json.dumps(config)}
    assert worker(changed)["env"]["PYTHONPATH"] == f"{archive}/startup:/mine:{archive}"


# -- results of Train and Tune --------------------------------------------------------------------------------------


def test_results_land_in_the_checkpoint_folder_and_another_sitecustomize_is_run_too(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs Ray Train's libraries: pip install 'ray[train]'")
    archive = tmp_path / contract.RUNNER
    archive.write_bytes(runner_zip())
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text("import builtins\nbuiltins.OTHER = True\n")
    code = "from ray.train import RunConfig; print(RunConfig().storage_path, OTHER)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": f"{archive}/startup:{other}",
            contract.VAR_CHECKPOINT_DIR: str(tmp_path / "checkpoints"),
            contract.VAR_TRAIN_REPORTS: str(tmp_path / "reports"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == [str(tmp_path / "checkpoints"), "True"]


# -- does the Ray fit? ----------------------------------------------------------------------------------------------


def environment(kind: str, value: str = "", *requirements: str) -> EnvironmentSpec:
    return {"kind": kind, "value": value, "requirements": list(requirements), "packages": []}


@pytest.mark.parametrize(
    ("found", "of", "python", "words"),
    [
        (RayVersions("3.11.2", "2.60.0"), environment("venv", "/env"), "/env/bin/python", ""),
        (
            RayVersions("3.11.2", NO_RAY),
            environment("venv", "/env"),
            "/env/bin/python",
            (
                "launcher: ray needs Ray 2.60.0, like the cluster, but /env/bin/python has no Ray: "
                "uv pip install --python /env/bin/python 'ray[default]==2.60.0'"
            ),
        ),
        (
            RayVersions("3.11.2", "2.55.0"),
            environment("conda", "train"),
            "/conda/bin/python",
            (
                "launcher: ray needs Ray 2.60.0, like the cluster, but /conda/bin/python has Ray 2.55.0: "
                "uv pip install --python /conda/bin/python 'ray[default]==2.60.0'"
            ),
        ),
        (
            RayVersions("3.12.1", "2.60.0"),
            environment("venv", "/env"),
            "/env/bin/python",
            (
                "launcher: ray needs Python 3.11, like the cluster, but /env/bin/python is Python 3.12.1: "
                "uv venv --python 3.11 /env-py3.11 && uv pip install --python /env-py3.11 'ray[default]==2.60.0'"
            ),
        ),
        (
            RayVersions("3.10.4", "2.60.0"),
            environment("conda", "train"),
            "/conda/bin/python",
            (
                "launcher: ray needs Python 3.11, like the cluster, but /conda/bin/python is Python 3.10.4: "
                "conda create -n train-py3.11 python=3.11, and in it: pip install 'ray[default]==2.60.0'"
            ),
        ),
        (
            RayVersions("3.12", ""),
            environment("uv"),
            "/env/bin/python",
            (
                "launcher: ray needs Python 3.11, like the cluster, but /env/bin/python is Python 3.12: "
                "uv python pin 3.11 && uv lock, then submit again"
            ),
        ),
        (RayVersions("", ""), environment("python", "/nowhere"), "", ""),
    ],
)
def test_what_does_not_fit_is_said_with_the_command_that_mends_it(
    found: RayVersions, of: EnvironmentSpec, python: str, words: str
) -> None:
    assert mismatch(found, CLUSTER, of, python) == words


def test_an_environment_without_the_clusters_ray_fails_before_the_training_starts(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=60)
    attempt = Attempt(tmp_path, "echo started", launcher="ray", environment=environment("venv", str(bare)))
    end = attempt.run()
    assert end["ended"] == "environment"
    assert end["message"].startswith("launcher: ray needs Ray ")
    assert end["message"].endswith(f"has no Ray: uv pip install --python {bare}/bin/python 'ray[default]==2.60.0'")
    assert not attempt.log.exists()
