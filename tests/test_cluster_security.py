"""What others can reach, read or find: no port, no file, no secret."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from support.cluster import Cluster
from support.waiting import wait_until

from raylaunch.models.states import JobState

pytestmark = pytest.mark.ray

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
NOBODY = 65534
TELLS = (
    "import hashlib, json, os, sys, time\n"
    "names = ['CLUSTERS_SECRET', 'WANDB_API_KEY']\n"
    "print(json.dumps({name: hashlib.sha256(os.environ[name].encode()).hexdigest() for name in names}), flush=True)\n"
    "while not os.path.exists(sys.argv[1]):\n"
    "    time.sleep(0.05)\n"
)


# Ports


def _sockets(process: psutil.Process) -> list[Any]:  # psutil names the type only privately
    try:
        return list(process.net_connections(kind="inet"))
    except psutil.NoSuchProcess:  # one of Ray's that came and went
        return []


def test_the_cluster_listens_on_loopback_only(cluster: Cluster) -> None:
    processes = cluster.processes()
    assert {cluster.controller_pid(), cluster.ray_pid()} <= {process.pid for process in processes}
    sockets = [one for process in processes for one in _sockets(process)]
    listening = [one for one in sockets if one.status == psutil.CONN_LISTEN or not one.raddr]
    assert len(listening) > 8
    assert {one.laddr.ip for one in listening if one.laddr} <= LOOPBACK


@pytest.mark.parametrize(
    ("port", "method", "path"),
    [
        ("controller", "GET", "/v1/status"),
        ("controller", "GET", "/v1/openapi.json"),
        ("controller", "GET", "/"),
        ("dashboard", "GET", "/api/jobs/"),
        ("dashboard", "POST", "/api/jobs/"),
        ("dashboard_agent", "POST", "/api/job_agent/jobs/"),
        ("runtime_env_agent", "POST", "/get_or_create_runtime_env"),
    ],
)
def test_a_request_without_the_token_gets_401(cluster: Cluster, port: str, method: str, path: str) -> None:
    url = f"http://127.0.0.1:{cluster.record().ports[port]}{path}"
    body = {"entrypoint": "true"}
    assert httpx2.request(method, url, json=body, trust_env=False).status_code == 401
    wrong = httpx2.request(method, url, json=body, headers={"Authorization": "Bearer wrong"}, trust_env=False)
    assert wrong.status_code in {401, 403}


# Files


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_another_user_cannot_read_the_home_or_rays_temp_folder(cluster: Cluster) -> None:
    job = cluster.python("print('mine alone')")
    cluster.ended(job)
    cluster.home.chmod(0o755)  # as a person's home may be
    roots = (cluster.paths.home, cluster.paths.temp.parent)
    walked = [found for root in roots for found in os.walk(root)]  # which passes over folders that vanish meanwhile
    paths = [*roots, *(Path(folder, name) for folder, folders, files in walked for name in (*folders, *files))]
    theirs = [path for path in paths if cluster.work not in (path, *path.parents)]
    assert any(path.name == "rank-0.log" for path in theirs)
    assert any(path.name == "raylet.out" for path in theirs)
    script = 'while IFS= read -r -d "" path; do if [ -r "$path" ] || [ -w "$path" ]; then echo "$path"; fi; done'
    done = subprocess.run(
        ["bash", "-c", script],
        input=b"".join(os.fsencode(path) + b"\0" for path in theirs),
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.decode().splitlines() == [str(cluster.home)]  # which was opened above


# Secrets


@dataclass(frozen=True)
class Planted:
    """A job that runs with secrets in its environment."""

    job: str
    clusters: str
    wandb: str

    @property
    def values(self) -> tuple[bytes, ...]:
        return self.clusters.encode(), self.wandb.encode()


@pytest.fixture(scope="module")
def planted(cluster: Cluster) -> Iterator[Planted]:
    """Set a secret, and run a job with it and with the client's W&B key; the job waits until the tests are done."""
    values = {"clusters": f"planted-{secrets.token_hex(16)}", "wandb": secrets.token_hex(20)}
    subprocess.run(
        [sys.executable, "-m", "raylaunch", "secret", "set", "CLUSTERS_SECRET"],
        input=values["clusters"].encode(),
        env=cluster.env,
        cwd=cluster.work,
        timeout=60,
        check=True,
    )
    sign = cluster.work / "secrets.go"
    keys = {"WANDB_API_KEY": values["wandb"], "WANDB_BASE_URL": "http://127.0.0.1:9"}
    words = ("--working-dir", "", "--secret", "CLUSTERS_SECRET", "--", "python", "-c", TELLS, str(sign))
    job = cluster.submit(*words, env=keys)
    cluster.runs(job)
    wait_until(lambda: cluster.log(job).endswith(b"\n"), 30, "the job tells what it sees")
    yield Planted(job, **values)
    sign.touch()
    assert cluster.ended(job).state is JobState.SUCCEEDED


def test_the_training_sees_its_secrets(cluster: Cluster, planted: Planted) -> None:
    assert json.loads(cluster.log(planted.job)) == {
        "CLUSTERS_SECRET": hashlib.sha256(planted.clusters.encode()).hexdigest(),
        "WANDB_API_KEY": hashlib.sha256(planted.wandb.encode()).hexdigest(),
    }


def test_no_token_of_the_cluster_is_in_the_trainings_environment(cluster: Cluster, planted: Planted) -> None:
    training = cluster.job(planted.job).attempts[0].pid
    environ = Path(f"/proc/{training}/environ").read_bytes()
    assert planted.clusters.encode() in environ
    for token in (cluster.paths.ray_token, cluster.paths.token):
        assert token.read_bytes().strip() not in environ
    assert not [line for line in environ.split(b"\0") if line.startswith(b"RAY_AUTH")]


def test_secrets_are_in_no_process_arguments(cluster: Cluster, planted: Planted) -> None:
    assert cluster.of_attempt(f"{planted.job}-1")
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = line.read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        assert not any(value in words for value in planted.values), words


def test_secrets_are_in_no_environment_but_the_trainings(cluster: Cluster, planted: Planted) -> None:
    of_training = {process.pid for process in cluster.of_attempt(f"{planted.job}-1")}
    for process in cluster.processes():
        if process.pid not in of_training:
            environ = Path(f"/proc/{process.pid}/environ").read_bytes()
            assert not any(value in environ for value in planted.values), process


def test_rays_tools_show_no_secret(cluster: Cluster, planted: Planted) -> None:
    shown = cluster.ray("job", "list")
    assert f"{planted.job}-1" in shown.out
    access = cluster.ask(lambda client: client.ray_access())
    headers = {"Authorization": f"Bearer {access.token}"}
    answers = [
        httpx2.get(f"{access.dashboard_url}{path}", headers=headers, trust_env=False).text
        for path in ("/api/jobs/", f"/api/jobs/{planted.job}-1", f"/api/jobs/{planted.job}-1/logs", "/api/v0/actors")
    ]
    assert f"{planted.job}-1" in answers[0]
    text = "".join([shown.out, shown.err, *answers])
    assert not any(value.decode() in text for value in planted.values)


def test_the_apis_answers_show_no_secret(cluster: Cluster, planted: Planted) -> None:
    reach = cluster.reach()
    job = f"/v1/jobs/{planted.job}"
    paths = ["/v1/status", "/v1/openapi.json", "/v1/jobs", "/v1/secrets", "/v1/usage", job]
    paths += [f"{job}/{part}" for part in ("events", "files", "metrics", "metrics.csv", "logs")]
    found = {file["path"] for file in _get(reach.url, reach.token, f"{job}/files").json()}
    assert "attempt-1/attempt.json" in found
    for path in [*paths, *(f"{job}/files/{file}" for file in found)]:
        answer = _get(reach.url, reach.token, path)
        assert answer.status_code == 200, path
        assert not any(value in answer.content for value in planted.values), path
    assert _get(reach.url, reach.token, "/v1/secrets").json() == ["CLUSTERS_SECRET"]


def test_files_hold_secrets_in_two_places_that_only_we_can_read(cluster: Cluster, planted: Planted) -> None:
    store = Path(cluster.record().store)
    holders = _files_with(planted.values, cluster.home, cluster.paths.temp)
    assert set(holders) == {store / "secrets.json", store / "job_secrets" / f"{planted.job}.json"}
    assert {oct(path.stat().st_mode & 0o777) for path in holders} == {"0o600"}


def test_after_the_job_its_own_secret_is_nowhere(cluster: Cluster) -> None:
    value = secrets.token_hex(20)
    keys = {"WANDB_API_KEY": value, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    code = "import wandb\nrun = wandb.init()\nrun.log({'loss': 1.0})\nrun.finish()"
    job = cluster.python(code, env=keys)
    done = cluster.ended(job)
    assert done.state is JobState.SUCCEEDED, done.message
    assert done.last_metrics["loss"] == 1.0
    wait_until(lambda: not _files_with([value.encode()], cluster.home, cluster.paths.temp), 60, "it is gone")


def _get(url: str, token: str, path: str) -> httpx2.Response:
    return httpx2.get(f"{url}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=30, trust_env=False)


def _files_with(values: Iterable[bytes], *roots: Path) -> list[Path]:
    """Return the regular files below some folders that hold one of the values: databases, journals, logs, all."""
    found = []
    names = (Path(folder, name) for root in roots for folder, _, files in os.walk(root) for name in files)
    for path in names:
        try:
            data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        except FileNotFoundError:
            continue
        if any(value in data for value in values):
            found.append(path)
    return found
