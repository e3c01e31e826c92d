"""Jobs on a real cluster: the main path, as a person walks it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest
from support.cluster import Cluster
from support.waiting import wait_until

from raylaunch.models.states import JobState, Reason

pytestmark = pytest.mark.ray

WAITS = "import time\nprint('ready', flush=True)\ntime.sleep(600)"
STUBBORN = (
    "import os, signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = 'import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'\n"
    "subprocess.Popen([sys.executable, '-c', child], start_new_session=True)\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)"
)


def project(cluster: Cluster, name: str, **files: str) -> Path:
    folder = cluster.work / name
    folder.mkdir()
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)
    return folder


def test_a_job_runs_with_its_gpus_and_its_code_and_leaves_its_model(cluster: Cluster) -> None:
    train = (
        "import os, pathlib\n"
        "print('gpus', os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "print(pathlib.Path('data.txt').read_text())\n"
        "pathlib.Path(os.environ['RAYLAUNCH_OUTPUT_DIR'], 'model.bin').write_bytes(bytes(range(256)) * 1000)\n"
    )
    folder = project(cluster, "main_path", train__py=train, data__txt="from the working directory")
    result = cluster.cli("run", "--name", "main-path", "--gpus", "2", "--", "python", "train.py", cwd=folder)
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert lines[1] == "from the working directory"
    assert len(lines[0].removeprefix("gpus ").split(",")) == 2
    cluster.good("get", "main-path", "--to", "model", cwd=folder)
    assert (folder / "model" / "model.bin").read_bytes() == bytes(range(256)) * 1000


def test_a_job_that_can_never_run_is_refused_with_the_available_resources(cluster: Cluster) -> None:
    result = cluster.cli("submit", "--working-dir", "", "--gpus", "16", "--", "python", "-m", "x")
    assert result.status == 2
    host = cluster.ask(lambda client: client.status()).nodes[0].hostname
    expected = f"x can never run on cluster local: needs 16 GPUs on one node; the largest has 4 ({host})"
    assert expected in result.err
    assert "raylaunch status" in result.err


def test_a_waiting_job_shows_its_reason(cluster: Cluster) -> None:
    first = cluster.python(WAITS, "--gpus", "3", "--name", "holder")
    cluster.runs(first)
    second = cluster.python("print('my turn')", "--gpus", "2", "--name", "waiter")
    waiting = cluster.until(second, lambda job: job.reason is Reason.WAITING_FOR_GPUS, 60, "it says that it waits")
    host = waiting.message.split("; ")[1].split(" has ")[0]
    assert waiting.message == (f"needs 2 GPUs on one node; {host} has 1 free of 4: 3 held by holder ({first})")
    cluster.good("stop", first)
    assert cluster.ended(second).state is JobState.SUCCEEDED


def test_a_waiting_job_is_stopped_at_once(cluster: Cluster) -> None:
    first = cluster.python(WAITS, "--gpus", "4")
    cluster.runs(first)
    second = cluster.python("print(1)", "--gpus", "4")
    cluster.good("stop", second)
    assert cluster.job(second).state is JobState.STOPPED
    assert not cluster.job(second).attempts
    cluster.good("stop", first)
    cluster.ended(first)


def test_stop_ends_all_processes_also_those_that_called_setsid(cluster: Cluster) -> None:
    job = cluster.python(STUBBORN, "--grace", "1s")
    cluster.ready(job)
    before = cluster.of_attempt(f"{job}-1")
    cluster.good("stop", job)
    stopped = cluster.ended(job)
    assert stopped.state is JobState.STOPPED
    assert len(before) >= 2
    assert not cluster.of_attempt(f"{job}-1")


def test_a_killed_training_fails_with_the_signal_named_and_its_last_lines(cluster: Cluster) -> None:
    job = cluster.python("import os, signal\nprint('last words', flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
    failed = cluster.ended(job)
    assert (failed.state, failed.reason) == (JobState.FAILED, Reason.SIGNAL)
    assert failed.message == "the training was ended by SIGKILL"
    assert failed.log_tail == ("last words",)
    shown = cluster.good("show", job)
    assert "the training was ended by SIGKILL" in shown
    assert "last words" in shown


def test_a_failed_program_gives_its_own_exit_status_to_run(cluster: Cluster) -> None:
    result = cluster.cli("run", "--working-dir", "", "--", "python", "-c", "raise SystemExit(7)")
    assert result.status == 7
    assert "the training exited with status 7" in result.err


def test_a_missing_program_is_reported(cluster: Cluster) -> None:
    job = cluster.submit("--working-dir", "", "--", "no-such-program", "--fast")
    failed = cluster.ended(job)
    assert (failed.state, failed.reason) == (JobState.FAILED, Reason.ENTRYPOINT_NOT_FOUND)
    assert "no-such-program" in failed.message


def test_a_missing_environment_is_reported(cluster: Cluster) -> None:
    job = cluster.python("print(1)", "--environment", "venv:/no/such/venv")
    failed = cluster.ended(job)
    assert (failed.state, failed.reason) == (JobState.FAILED, Reason.ENVIRONMENT)
    assert "/no/such/venv" in failed.message


def test_a_job_that_runs_too_long_is_timed_out(cluster: Cluster) -> None:
    job = cluster.python(WAITS, "--timeout", "1s", "--grace", "1s")
    assert cluster.ended(job).state is JobState.TIMED_OUT
    assert cluster.cli("wait", job).status == 124


RESUMES = """
import os, sys
folder = os.environ["RAYLAUNCH_CHECKPOINT_DIR"]
path = folder + "/step-1/path"
if os.environ["RAYLAUNCH_ATTEMPT"] == "1":
    os.mkdir(folder + "/step-1")
    open(path, "w").write(os.path.realpath(path))
    os.symlink(folder + "/step-1", folder + "/last")
    sys.exit(1)
assert open(folder + "/last/path").read() == path
"""


def test_a_failed_program_is_retried_as_often_as_requested(cluster: Cluster) -> None:
    job = cluster.python(RESUMES, "--retries", "1")
    done = cluster.ended(job)
    assert (done.state, len(done.attempts)) == (JobState.SUCCEEDED, 2)
    jobs = Path(cluster.record().store) / "jobs"
    first, second = (jobs / job / f"attempt-{n}" / "checkpoints" for n in (1, 2))
    assert (first / "step-1/path").samefile(second / "step-1/path")
    assert (second / "last").readlink() == Path("step-1")


def test_outputs_are_kept_and_large_ones_are_fetched_from_their_node(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os; os.mkdir('out'); open('out/m.pt', 'w').write('m'); open('big', 'w').write('b' * 5000);"
        "open('.env', 'w').write('TOKEN=1')"
    )
    (tmp_path / "job.yaml").write_text("entrypoint: python train.py\noutputs_size: 1000\n")
    job = cluster.submit("-f", "job.yaml", cwd=tmp_path)
    done = cluster.ended(job)
    assert (done.state, done.outputs) == (JobState.SUCCEEDED, 1)
    cluster.good("get", job, "--to", "got", cwd=tmp_path)
    assert (tmp_path / "got/out/m.pt").read_text() == "m"
    assert not (tmp_path / "got/big").exists()
    cluster.good("get", job, "big", "--to", "got", cwd=tmp_path)
    assert (tmp_path / "got/big").read_text() == "b" * 5000
    listed = json.loads(cluster.good("files", job, "--json"))
    assert [file["path"] for file in listed if file["withheld"]] == ["attempt-1/outputs/.env"]
    cluster.good("get", job, ".env", "--to", "got", cwd=tmp_path)
    assert (tmp_path / "got/.env").read_text() == "TOKEN=1"
    jobs = Path(cluster.record().store) / "jobs"
    assert [str(path.relative_to(jobs / job)) for path in (jobs / job).rglob(".env")] == ["attempt-1/withheld/.env"]


def test_killing_the_runner_ends_its_training_before_its_gpus_are_given_away(cluster: Cluster) -> None:
    job = cluster.python(WAITS, "--gpus", "4")
    running = cluster.runs(job)
    training = psutil.Process(running.attempts[0].pid or 0)
    claim = cluster.paths.node / "attempts" / f"{job}-1" / "claim.json"
    psutil.Process(json.loads(claim.read_text())["pid"]).send_signal(signal.SIGKILL)
    wait_until(lambda: not training.is_running() or training.status() == psutil.STATUS_ZOMBIE, 20, "training has ended")
    failed = cluster.ended(job)
    assert (failed.state, failed.reason) == (JobState.FAILED, Reason.RUNNER_DIED)


def test_every_way_of_naming_a_job_names_it(cluster: Cluster) -> None:
    job = cluster.python("print(1)", "--name", "by-name")
    cluster.ended(job)
    shown = [json.loads(cluster.good("show", "--json", ref))["id"] for ref in (job, "by-name", "last")]
    assert shown == [job, job, job]


def test_a_job_that_there_is_not_is_an_error_that_names_the_nearest(cluster: Cluster) -> None:
    job = cluster.python("print(1)", "--name", "misspelt")
    result = cluster.cli("show", "mispelt")
    assert result.status == 1
    assert "no such job: 'mispelt'" in result.err
    assert "misspelt" in result.err.split("→")[1]
    cluster.ended(job)
