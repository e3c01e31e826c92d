"""Disasters on a real cluster: what is killed, cut off or full, and that no job is lost, doubled or falsely told."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from support.cluster import Cluster, argv
from support.disasters import KILLS, LEDGER, TALKS, Book, at_random_moments
from support.plain_ray import plain_python, started_plain, submit_plain
from support.signals import kill, send
from support.waiting import wait_until

from raylaunch.client.client import Client
from raylaunch.cluster.local.controller_process import controller_argv, controller_environment
from raylaunch.cluster.processes import ProcessIdentity, identify, is_alive, of_controller, of_ray
from raylaunch.cluster.record import save_record
from raylaunch.cluster.types import Endpoint
from raylaunch.errors import RaylaunchError
from raylaunch.models.job import JobView
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import JobState, Reason

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
FIRST_WAITS = LEDGER + (
    "import time\nprint('ready', flush=True)\nif os.environ['RAYLAUNCH_ATTEMPT'] == '1': time.sleep(600)"
)
TRACKS = (
    "import os, pathlib, time, wandb\n"
    "run = wandb.init()\n"
    "for step in range(5): run.log({'loss': 1 / (step + 1)})\n"
    "print('trained without being seen', flush=True)\n"
    "pathlib.Path(os.environ['RAYLAUNCH_OUTPUT_DIR'], 'model.bin').write_bytes(bytes(range(256)) * 2000)\n"
    "while not pathlib.Path(os.environ['ENOUGH']).exists(): time.sleep(0.05)\n"
    "run.finish()\n"
)


@pytest.fixture(scope="module")
def cluster(broken: Cluster) -> Cluster:
    return broken


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "ledger")


def kill_controller(cluster: Cluster) -> None:
    kill(cluster.record().controller)


def jobs(cluster: Cluster, name: str = "") -> list[JobView]:
    """Return all jobs, newest first."""
    return [job for job in cluster.ask(lambda client: client.jobs(limit=500, name=name)).jobs if not job.foreign]


def ended(cluster: Cluster, ids: set[str], timeout_s: float = 120) -> dict[str, JobView]:
    """Wait until these jobs have ended, and return them."""

    def all_ended() -> dict[str, JobView] | None:
        found = {job.id: job for job in jobs(cluster) if job.id in ids}
        return found if ids == found.keys() and all(job.state.ended for job in found.values()) else None

    return wait_until(all_ended, timeout_s, f"the end of {len(ids)} jobs")


def healthy(cluster: Cluster, timeout_s: float = 120) -> None:
    """Wait until ``raylaunch status`` has nothing to complain about."""

    def is_healthy() -> bool:
        found = json.loads(cluster.good("status", "--json"))
        return found["state"] == "running" and not found["problems"] and found["ray"]["alive"]

    wait_until(is_healthy, timeout_s, "a healthy cluster")


@pytest.mark.parametrize("times", [3, pytest.param(KILLS, marks=pytest.mark.long)])
def test_killing_the_controller_many_times_loses_no_job_and_runs_none_twice(
    times: int, cluster: Cluster, book: Book
) -> None:
    """One submits with the client, one with the command line; both repeat a request that was not answered."""
    made: dict[str, set[str]] = {}
    killed: set[int] = set()
    spec = JobSpec(
        entrypoint=("python", "-c", LEDGER),
        working_dir="",
        env={"LEDGER": str(book.path)},
        tracking={"mode": "disabled"},
    )

    def strike() -> None:
        process = wait_until(lambda: new_controller(cluster, killed), 120, "a controller to kill")
        kill(process)
        killed.add(process.pid)

    async def submit_with_the_client(strikes: list[int]) -> None:
        async def heal() -> Endpoint:
            return cluster.reach()  # the command line beside us brings it up

        async with Client(cluster.reach(), patience_s=120, restart=heal) as client:
            for n in numbers(strikes, seed=1, times=times):
                named = spec.model_copy(update={"name": f"storm-{times}-{n}"})
                answer = await client.submit(named, request_id=f"storm-{times}-{n}")
                made.setdefault(f"storm-{times}-{n}", set()).add(answer.job.id)

    def submit_with_the_command_line(strikes: list[int]) -> None:
        words = ("--working-dir", "", *book.env, "--", "python", "-c", LEDGER)
        for n in numbers(strikes, seed=2, times=times):
            name = f"hail-{times}-{n}"
            named = ("submit", "--json", "--name", name, "--request-id", name, *words)
            out = wait_until(lambda: answered(cluster, *named), 180, f"{name} is taken")  # noqa: B023 -- at once
            made.setdefault(name, set()).add(json.loads(out)["job"]["id"])

    with at_random_moments(strike, seed=0, longest_s=1.5, times=times) as strikes, ThreadPoolExecutor(1) as pool:
        beside = pool.submit(submit_with_the_command_line, strikes)
        asyncio.run(submit_with_the_client(strikes))
        beside.result(300)
    cluster.good("up")
    assert len(killed) == times
    ids = {job for found in made.values() for job in found}
    assert [name for name, found in made.items() if len(found) != 1] == []
    found = ended(cluster, ids)
    assert {job.state for job in found.values()} == {JobState.SUCCEEDED}
    assert book.runs() == Counter(f"{job} 1" for job in ids)
    listed = [*jobs(cluster, f"storm-{times}-*"), *jobs(cluster, f"hail-{times}-*")]
    assert sorted(job.id for job in listed) == sorted(ids)


def new_controller(cluster: Cluster, killed: set[int]) -> ProcessIdentity | None:
    """Return a controller that lives and was not killed yet."""
    found = cluster.record().controller
    return found if found is not None and found.pid not in killed and is_alive(found) else None


def numbers(strikes: list[int], seed: int, times: int) -> Iterator[int]:
    """Yield numbers of jobs until the last strike and a little on: new ones after each strike, and old ones again."""
    chance = random.Random(seed)  # noqa: S311 -- no secret
    yield 0
    while len(strikes) < times:
        yield chance.randrange(len(strikes) + 1)
    yield from range(times)


def answered(cluster: Cluster, *words: str) -> str:
    result = cluster.cli(*words)
    return result.out if result.status == 0 else ""


@pytest.mark.long
def test_killing_the_agent_ten_times_loses_no_job_and_no_byte(cluster: Cluster, book: Book, tmp_path: Path) -> None:
    enough = tmp_path / "enough"
    env = (*book.env, "--env", f"ENOUGH={enough}")
    talking = [cluster.python(TALKS, *env) for _ in range(2)]
    for job in talking:
        cluster.runs(job)
    killed: set[int] = set()
    others: list[str] = []

    def strike() -> None:
        process = wait_until(lambda: new_agent(cluster, killed), 60, "a node agent to kill")
        process.kill()
        killed.add(process.pid)

    with at_random_moments(strike, seed=3, longest_s=1.0) as strikes:
        while len(strikes) < KILLS:
            if len(others) < len(strikes) / 2:
                others.append(cluster.python(LEDGER, *book.env))
            wait_until(lambda: len(strikes) == KILLS or len(others) < len(strikes) / 2, 60, "more strikes")
    enough.touch()
    ids = {*talking, *others}
    found = ended(cluster, ids)
    assert {job.state for job in found.values()} == {JobState.SUCCEEDED}
    assert book.runs() == Counter(f"{job} 1" for job in ids)
    for job in talking:
        lines = cluster.log(job).splitlines()
        assert lines == [b"%d %s" % (n, b"x" * 200) for n in range(len(lines))]
        assert len(lines) > 100


def new_agent(cluster: Cluster, killed: set[int]) -> psutil.Process | None:
    """Return the node agent's process, when it is not one that was killed."""
    found = (process for process in cluster.processes() if process.pid not in killed)
    return next(
        (process for process in found if " ".join(argv(process)).startswith(("ray::NodeAgent", "ray::Steward"))), None
    )


@pytest.mark.long
def test_a_client_killed_ten_times_creates_one_job_per_submission(cluster: Cluster, book: Book) -> None:
    chance, moment = random.Random(4), threading.Event()  # noqa: S311 -- no secret
    folder = cluster.work / "killed_client"
    folder.mkdir()
    (folder / "train.py").write_text(LEDGER)
    ids = []
    for n in range(KILLS):
        words = ["submit", "--json", "--name", f"cut-{n}", "--request-id", f"cut-{n}", *book.env]
        words += ["--", "python", "train.py"]
        first = subprocess.Popen(
            [sys.executable, "-m", "raylaunch", *words],
            cwd=folder,
            env=cluster.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        moment.wait(chance.uniform(0.1, 1.5))
        first.kill()
        first.wait(10)
        ids.append(json.loads(cluster.good(*words, cwd=folder))["job"]["id"])
    found = ended(cluster, set(ids))
    assert {job.state for job in found.values()} == {JobState.SUCCEEDED}
    assert book.runs() == Counter(f"{job} 1" for job in ids)
    assert sorted(job.id for job in jobs(cluster, "cut-*")) == sorted(ids)


@pytest.mark.parametrize(
    "victim", [pytest.param(one, marks=pytest.mark.long) for one in ("ray start --block", "gcs_server")]
)
def test_a_killed_ray_restarts_and_its_job_is_retried(cluster: Cluster, book: Book, victim: str) -> None:
    running = cluster.python(FIRST_WAITS, *book.env, "--gpus", "4")
    cluster.ready(running)
    queued = cluster.python(LEDGER, *book.env, "--gpus", "4")
    plain = plain_python(cluster, "plain", "import time\nprint('ready', flush=True)\ntime.sleep(600)")
    started_plain(cluster, plain)
    waiting = submit_plain(cluster, "plain-waits", ["true"], entrypoint_num_gpus=64)
    before = cluster.record().ray
    assert before is not None
    head = psutil.Process(before.pid)
    doomed = head if victim == "ray start --block" else named(head, victim)
    doomed.kill()
    again = cluster.ended(running, 240)
    assert (again.state, [attempt.reason for attempt in again.attempts]) == (
        JobState.SUCCEEDED,
        [Reason.RAY_LOST, Reason.COMPLETED],
    )
    assert cluster.ended(queued, 60).state is JobState.SUCCEEDED
    assert book.runs() == Counter([f"{running} 1", f"{running} 2", f"{queued} 1"])
    healthy(cluster)
    assert cluster.record().ray != before
    lost = cluster.ended(plain, 120)
    assert (lost.state, lost.reason) in {(JobState.FAILED, Reason.NODE_LOST), (JobState.LOST, Reason.NODE_LOST)}
    assert b"ready" in cluster.log(plain)
    cluster.good("stop", waiting, "--wait")  # Ray has lost the actor that waited, and would let it wait for ever
    assert cluster.job(waiting).state is JobState.STOPPED


def named(parent: psutil.Process, name: str) -> psutil.Process:
    """Return the child of this name."""
    return next(child for child in parent.children(recursive=True) if child.name() == name)


def test_any_command_restarts_a_dead_controller_and_reports_it(cluster: Cluster) -> None:
    before = jobs(cluster)
    kill_controller(cluster)
    result = cluster.cli("list", "--json")
    assert result.status == 0
    assert "cluster 'local' should be running, and its controller is not; restarting it" in result.err
    assert jobs(cluster) == before


def ran_while_it_hung(cluster: Cluster, job: str, exit_file: Path) -> None:
    """Check that a job's times are the attempt's own, whenever a controller came to read them."""
    wrote = json.loads(exit_file.read_bytes())
    done = cluster.ended(job, 60)
    assert done.state is JobState.SUCCEEDED
    assert done.attempts[0].ended_at == done.ended_at == wrote["at"]


@contextmanager
def hung_controller(cluster: Cluster, job: str) -> Iterator[Path]:
    """Stop the controller while a job runs and let the job end; yield a copy of the job's last words."""
    attempt = cluster.ready(job).attempts[0].id
    written, kept = cluster.paths.node / "attempts" / attempt / "exit.json", cluster.work / f"{attempt}.json"
    send(cluster.controller_pid(), signal.SIGSTOP)
    (cluster.work / "go").touch()
    wait_until(written.exists, 60, "the job's end")
    shutil.copy(written, kept)
    yield kept
    (cluster.work / "go").unlink()


def short_job(cluster: Cluster) -> str:
    """Submit a job that ends once it is let, and return its id."""
    go = str(cluster.work / "go")
    return cluster.python(
        f"import pathlib, time\nprint('ready', flush=True)\nwhile not pathlib.Path({go!r}).exists(): time.sleep(0.02)"
    )


def test_a_hanging_controller_is_replaced_and_results_are_kept(
    cluster: Cluster,
) -> None:
    job = short_job(cluster)
    before = cluster.controller_pid()
    with hung_controller(cluster, job) as last_words:
        result = cluster.cli("list", "--json")
        assert result.status == 0, result.err
        assert "the controller of cluster 'local' is not responding; it is being restarted" in result.err
        assert job in result.out
        assert cluster.controller_pid() != before
        ran_while_it_hung(cluster, job, last_words)


@pytest.mark.long
def test_a_controller_that_hangs_is_replaced_by_the_hosts_watchdog(cluster: Cluster) -> None:
    job = short_job(cluster)
    before = cluster.controller_pid()
    watchdog = subprocess.Popen([sys.executable, "-m", "raylaunch.cluster.keep", "local"], env=cluster.env)
    try:
        with hung_controller(cluster, job) as last_words:
            wait_until(lambda: (found := cluster.record().controller) and found.pid != before, 90, "another controller")
            healthy(cluster)
            ran_while_it_hung(cluster, job, last_words)
    finally:
        watchdog.kill()
        watchdog.wait(10)


def test_after_a_reboot_two_ups_at_once_give_one_cluster_with_the_same_jobs(cluster: Cluster, book: Book) -> None:
    running = cluster.python(FIRST_WAITS, *book.env)
    cluster.ready(running)
    before = [job for job in jobs(cluster) if job.id != running]
    record = cluster.record()

    def left() -> list[ProcessIdentity]:
        return [*of_controller(record.cluster_id), *of_ray(record.cluster_id, record.ray, cluster.paths.temp)]

    def strike() -> bool:
        for process in left():
            kill(process)
        return not left()

    wait_until(strike, 60, "all of it is gone")
    assert "is stopped" in cluster.good("status")
    with ThreadPoolExecutor(2) as pool:
        ups = [pool.submit(cluster.good, "up", "--json") for _ in range(2)]
        one, other = (json.loads(up.result(180)) for up in ups)
    pids = [(found["controller"]["pid"], found["ray"]["pid"]) for found in (one, other)]
    assert pids[0] == pids[1]
    assert len(of_controller(record.cluster_id)) <= 2  # itself and its link
    again = cluster.ended(running, 90)
    assert (again.state, again.attempts[0].reason) == (JobState.SUCCEEDED, Reason.RAY_LOST)
    assert book.runs() == Counter([f"{running} 1", f"{running} 2"])
    assert [job for job in jobs(cluster) if job.id != running] == before


def test_a_corrupted_database_is_renamed_reported_and_rebuilt(cluster: Cluster) -> None:
    for number in ("1", "2"):
        cluster.ended(cluster.python(f"print({number})", "--tracking", "disabled"))
    before = jobs(cluster)
    kill_controller(cluster)
    store = Path(cluster.record().store)
    garbage = b"this is no database\n" * 5000
    (store / "raylaunch.db").write_bytes(garbage)
    for beside in ("raylaunch.db-wal", "raylaunch.db-shm"):
        (store / beside).unlink(missing_ok=True)
    cluster.good("up")
    (aside,) = store.glob("raylaunch.db.corrupt-*")
    assert aside.read_bytes() == garbage
    expected = (
        f"The database was damaged (file is not a database; it was renamed to {aside.name}) "
        f"and was rebuilt from the journals of {len(before)} jobs."
    )
    assert expected in cluster.good("status")
    assert jobs(cluster) == before


def test_the_controller_opens_no_file_of_an_attempt_by_path(cluster: Cluster, tmp_path: Path) -> None:
    """It runs where the folder of the node is covered: all that it knows of an attempt came through the node agent."""
    kill_controller(cluster)
    with blind_controller(cluster) as controller:
        enough = tmp_path / "enough"
        job = cluster.python(TRACKS, "--env", f"ENOUGH={enough}")
        wait_until(lambda: b"trained without being seen" in cluster.log(job), 60, "its log")
        node = cluster.paths.node
        assert cluster.controller_pid() == controller.pid
        assert os.listdir(f"/proc/{controller.pid}/root{node}") == []  # noqa: PTH208 -- the controller's view
        assert (node / "attempts" / f"{job}-1").is_dir()
        losses = wait_until(lambda: points(cluster, job), 20, "its metrics while it runs")
        assert losses == [1 / (step + 1) for step in range(5)]
        enough.touch()
        done = cluster.ended(job)
        assert (done.state, done.outputs) == (JobState.SUCCEEDED, 1)
        cluster.good("get", job, "--to", str(tmp_path / "model"))
    assert (tmp_path / "model" / "model.bin").read_bytes() == bytes(range(256)) * 2000
    cluster.good("up")


def points(cluster: Cluster, job: str) -> list[float]:
    """Return the losses, when all five are there."""
    page = cluster.ask(lambda client: client.metrics(job, keys=["loss"]))
    values = [point.value for series in page.series for point in series.points]
    return values if len(values) == 5 else []


@contextmanager
def blind_controller(cluster: Cluster) -> Iterator[subprocess.Popen[bytes]]:
    """Run the controller where an empty file system covers the node's folder."""
    if os.geteuid() != 0:
        pytest.skip("needs root to cover a folder for one process")
    covering = "mount -t tmpfs tmpfs /mnt"
    if subprocess.run(["unshare", "--mount", "--propagation", "private", "sh", "-c", covering], check=False).returncode:
        pytest.skip("cannot cover a folder for one process here")
    covered = f'mount -t tmpfs tmpfs {shlex.quote(str(cluster.paths.node))} && exec "$@"'
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", covered, "sh"]
    env = controller_environment(cluster.paths, cluster.record(), cluster.env)
    with cluster.paths.controller_log.open("ab") as log:
        controller = subprocess.Popen(
            [*argv, *controller_argv(cluster.paths)], env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        save_record(cluster.paths, cluster.record().with_(controller=identify(controller.pid)))  # else it is replaced
        wait_until(lambda: answers(cluster), 60, "the controller answers")
        yield controller
    finally:
        controller.terminate()
        controller.wait(20)


def answers(cluster: Cluster) -> bool:
    """Say whether the controller answers and reaches Ray and the node agent."""
    try:
        status = cluster.ask(lambda client: client.status())
    except RaylaunchError:
        return False
    return status.ray == "up" and any(node.steward for node in status.nodes)
