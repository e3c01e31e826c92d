"""`raylaunch up` on hosts that run nothing but sshd, as a person at a laptop does it: three fresh, air-gapped hosts."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import psutil
import pytest
from support import start_sync
from support.fittings import bare_world
from support.hosts import Host, World
from support.index import index, tiny_wheel
from support.terminal import Laptop
from support.waiting import wait_until

pytestmark = [pytest.mark.machines, pytest.mark.ray, pytest.mark.timeout(900)]

FILE = """\
name: lab
cpus: 4
hosts:
  - {host: h1, gpus: 0}
  - {host: h2, gpus: 8}
  - {host: h3, gpus: 8}
"""
UP_S = 600
MOVES = """
cd "$RAYLAUNCH_CHECKPOINT_DIR"
mkdir "step-$RAYLAUNCH_ATTEMPT" && touch "step-$RAYLAUNCH_ATTEMPT/weights" && ln -sfn "step-$RAYLAUNCH_ATTEMPT" last
echo "$(hostname) $(pwd -P)" >> trail
cd "$OLDPWD" && echo "$RAYLAUNCH_ATTEMPT" > model.txt && echo ready
[ "$RAYLAUNCH_ATTEMPT" = 3 ] || exec sleep 600
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    with bare_world(3) as made:
        yield made


@pytest.fixture(scope="module")
def laptop(lab: World, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    return Laptop(lab, tmp_path_factory.mktemp("laptop"), FILE)


@pytest.fixture(scope="module")
def first_up(laptop: Laptop) -> subprocess.CompletedProcess[str]:
    return laptop.call("up", limit_s=UP_S)


@pytest.fixture(scope="module")
def cluster(laptop: Laptop, first_up: subprocess.CompletedProcess[str]) -> Laptop:
    assert first_up.returncode == 0
    return laptop


def rays(host: Host) -> dict[str, int]:
    """Return the processes of ours on a host, by what they are, with their pids."""
    found = {}
    for process in host.processes():
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        for what in ("raylaunch.cluster.ray_start start", "raylaunch.controller --config", "raylaunch.cluster.keep"):
            if what in line:
                found[what] = process.pid
    return found


def test_a_dry_run_reports_what_would_be_done_on_each_host_and_does_nothing(laptop: Laptop, lab: World) -> None:
    output = laptop.call("up", "--dry-run").stdout
    assert "h1: Ray's head and the controller, with 0 GPUs" in output
    assert "h3: Ray, joining h1, with 8 GPUs" in output
    assert "from pushed wheels" in output
    assert all(not rays(host) for host in lab.hosts)


def test_three_bare_hosts_become_a_cluster_on_which_a_job_has_run_everywhere(
    laptop: Laptop, first_up: subprocess.CompletedProcess[str]
) -> None:
    assert "nodes: 3 alive, each with its GPUs" in first_up.stderr
    assert all(f"{host}: job: test job succeeded" in first_up.stderr for host in ("h1", "h2", "h3"))
    assert re.search(
        r"network: 64 MB over TCP between h2 and h3 on eth0 \(10\.77\.\d+\.12, 10\.77\.\d+\.13\): \d",
        first_up.stderr,
    )
    assert laptop.living() == {"h1", "h2", "h3"}
    assert laptop.status()["state"] == "running"
    assert re.findall(r"(\d+) of (\d+)\D*GPUs free", first_up.stdout) == [("8", "8"), ("8", "8")]
    assert "raylaunch-probe" not in laptop.call("list").stdout


def test_jobs_hold_the_gpus_of_both_workers_at_once_and_their_logs_arrive_here(cluster: Laptop) -> None:
    words = "echo on $(hostname) with $CUDA_VISIBLE_DEVICES over $NCCL_SOCKET_IFNAME and $GLOO_SOCKET_IFNAME"
    ids = [
        cluster.call("submit", "--host", host, "--gpus", "8", "--name", f"on-{host}", "--", words).stdout.strip()
        for host in ("h2", "h3")
    ]
    for job, host in zip(ids, ("h2", "h3"), strict=True):
        assert cluster.call("wait", job).returncode == 0
        assert cluster.call("logs", job).stdout.strip() == f"on {host} with 0,1,2,3,4,5,6,7 over eth0 and eth0"


def is_ready(cluster: Laptop, job: str, attempt: int) -> None:
    """Wait until an attempt has printed that it is."""
    log = ("logs", job, "--attempt", str(attempt))
    wait_until(lambda: "ready" in cluster.call(*log, check=False).stdout, 120, f"attempt {attempt} is ready")


@pytest.mark.long
def test_a_job_that_is_moved_to_another_host_and_back_takes_along_what_it_wrote(cluster: Laptop) -> None:
    cluster.call("drain", "h3")
    job = cluster.call("submit", "--gpus", "1", "--shell", MOVES, "--working-dir", "").stdout.strip()
    for attempt, (host, next_host) in enumerate((("h2", "h3"), ("h3", "h2")), 1):
        is_ready(cluster, job, attempt)
        cluster.call("drain", next_host, "--off")
        cluster.call("drain", host, "--stop", "--wait", limit_s=180)
    cluster.call("drain", "h3", "--off")
    assert cluster.call("wait", job).returncode == 0
    cluster.call("get", job, "model.txt", "attempt-3/checkpoints", "--to", "moved")
    moved = cluster.folder / "moved"
    assert (moved / "model.txt").read_text() == "3\n", "and not that of an earlier attempt"
    checkpoints = moved / "attempt-3/checkpoints"
    trail = [line.split() for line in (checkpoints / "trail").read_text().splitlines()]
    assert [host for host, _ in trail] == ["h2", "h3", "h2"]
    assert len({place for _, place in trail}) == 1, trail
    assert sorted(path.parent.name for path in checkpoints.glob("step-*/weights")) == ["step-1", "step-2", "step-3"]


@pytest.fixture
def packages(tmp_path: Path, laptop: Laptop, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """An index that this machine alone reaches; yields the end of a command line whose program needs two packages."""
    tiny_wheel(tmp_path / "index", "alpha", "1.0", requires=["beta"])
    tiny_wheel(tmp_path / "index", "beta", "2.0")
    tiny_wheel(tmp_path / "index", "gamma", "3.0")
    code = laptop.folder / "needs-pip"
    code.mkdir(exist_ok=True)
    (code / "requirements.txt").write_text("alpha\n")
    with index(tmp_path / "index") as served:
        monkeypatch.setenv("PIP_INDEX_URL", served.url)
        monkeypatch.setenv("UV_DEFAULT_INDEX", served.url)
        program = "import alpha, beta; print('made of', alpha.__version__, beta.__version__)"
        yield ["--working-dir", "needs-pip", "--", "python", "-c", program]


def ends_with_both(laptop: Laptop, job: str) -> None:
    assert laptop.call("wait", job).returncode == 0
    assert laptop.call("logs", job).stdout.strip() == "made of 1.0 2.0"


@pytest.mark.long
def test_what_a_job_needs_from_pip_goes_along_to_hosts_without_a_package_index(
    cluster: Laptop, packages: list[str]
) -> None:
    words = ["--environment", "pip:requirements.txt", *packages]
    assert "wheels would be sent" in cluster.call("submit", "--dry-run", *words).stdout
    for job in [cluster.call("submit", "--host", host, *words).stdout.strip() for host in ("h2", "h3")]:
        ends_with_both(cluster, job)


def test_up_on_a_healthy_cluster_changes_nothing(cluster: Laptop, lab: World) -> None:
    before = [rays(host) for host in lab.hosts]
    again = cluster.call("up", limit_s=UP_S)
    assert [rays(host) for host in lab.hosts] == before
    assert "test job" not in again.stderr
    assert "network:" not in again.stderr


def test_only_sshd_of_a_host_answers_strangers(cluster: Laptop, lab: World) -> None:
    """From the bridge's side, which is a further machine of the same network, and without the token."""
    assert cluster.living()
    answers = {}
    for host in lab.hosts:
        for port in listening(host) - {22}:
            for method, path in (("GET", "/"), ("GET", "/metrics"), ("POST", "/api/job_agent/jobs/")):
                if (status := knock(host.address, port, method, path)) is not None:
                    answers[host.name, port, path] = status
    assert answers, "Ray's agents speak HTTP, and must have been knocked at"
    assert set(answers.values()) <= {401, 403, 404, 405}, answers


GRPC = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "JobInfoGcsService/GetAllJobInfo",
    "InternalKVGcsService/InternalKVKeys",
    "ActorInfoGcsService/GetAllActorInfo",
    "NodeManagerService/GetNodeStats",
    "NodeManagerService/RequestWorkerLease",
    "ObjectManagerService/Pull",
    "CoreWorkerService/PushTask",
)
NO_ANSWER = {"UNAVAILABLE", "DEADLINE_EXCEEDED"}


def test_what_speaks_grpc_answers_nobody_without_a_certificate(cluster: Laptop, lab: World) -> None:
    assert cluster.living()
    authority = (cluster.home / "clusters/lab/tls/client-ca.crt").read_bytes()
    for credentials in (None, grpc.ssl_channel_credentials(authority)):
        answers = {
            (host.name, port): knock_grpc(host.address, port, GRPC[0], credentials)
            for host in lab.hosts
            for port in listening(host) - {22}
        }
        assert set(answers.values()) <= NO_ANSWER, answers


def test_a_certificate_without_the_token_is_refused(cluster: Laptop, lab: World) -> None:
    assert cluster.living()
    files = [cluster.home / "clusters/lab/tls" / name for name in ("client-ca.crt", "client.key", "client.crt")]
    credentials = grpc.ssl_channel_credentials(*(file.read_bytes() for file in files))
    answers = {
        (host.name, port, method): code
        for host in lab.hosts
        for port in listening(host) - {22}
        for method in GRPC
        if (code := knock_grpc(host.address, port, method, credentials)) not in NO_ANSWER
    }
    assert "UNAUTHENTICATED" in answers.values(), "GCS and raylets speak gRPC, and must have been reached"
    assert set(answers.values()) <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}, answers


def test_a_request_that_ends_ray_before_its_token_is_checked_does_not_reach_it(cluster: Laptop, lab: World) -> None:
    """From another machine, and from another account of the head."""
    before = {host.name: daemons(host) for host in lab.hosts}
    assert all(before.values())
    sent = [start_sync.send(host.address, port) for host in lab.hosts for port in sorted(listening(host) - {22})]
    assert any(sent)
    program = shlex.join(["python3", "-c", Path(start_sync.__file__).read_text()])
    head = lab.hosts[0]
    for address in (head.address, "127.0.0.1"):
        ports = " ".join(map(str, sorted(listening(head, loopback=True) - {22})))
        head.out(f"{program} {address} {ports}", user="nobody", timeout_s=300)
    assert cluster.living() == {"h1", "h2", "h3"}
    assert {host.name: daemons(host) for host in lab.hosts} == before
    job = cluster.call("submit", "--host", "h3", "--", "true").stdout.strip()
    assert cluster.call("wait", job).returncode == 0


def daemons(host: Host) -> dict[str, int]:
    """Return the GCS and raylet of a host, with their pids."""
    found = {}
    for process in host.processes():
        with contextlib.suppress(psutil.Error):
            if process.name() in {"gcs_server", "raylet"} and process.status() != psutil.STATUS_ZOMBIE:
                found[process.name()] = process.pid
    return found


def knock_grpc(address: str, port: int, method: str, credentials: object | None) -> str:
    """Return the code with which a port answers an empty call of Ray's without a token."""
    where = f"{address}:{port}"
    channel = grpc.secure_channel(where, credentials) if credentials else grpc.insecure_channel(where)
    with channel:
        try:
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=3)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def test_another_account_of_a_host_can_read_nothing_of_the_cluster(cluster: Laptop, lab: World) -> None:
    """He walks through the whole host: files and sockets since its boot, and what is told of processes."""
    assert cluster.living()
    head = lab.hosts[0]
    kinds = r"\( -type f -o -type s -o -type p \) \( -readable -o -writable \)"
    walk = rf"find / \( -path /proc -o -path /sys \) -prune -o -newer /run/sshd.pid {kinds} -print 2>/dev/null || true"
    found = set(head.out(walk, user="nobody", timeout_s=120).splitlines())
    assert found <= {"/var/log/sshd.log", "/etc/hosts"}
    secrets = [head.out(f"cat /root/.raylaunch/clusters/lab/{name}") for name in ("token", "ray_token")]
    reported = head.out(
        "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' || true", user="nobody"
    )
    assert "raylaunch.controller" in reported, "he does see that it runs"
    assert all(len(secret) > 30 and secret not in reported for secret in secrets)
    assert "RAYLAUNCH_CLUSTER_ID" not in reported, "no environment of it"


def listening(host: Host, *, loopback: bool = False) -> set[int]:
    """Return the ports on which a host listens for others, or also those on its loopback."""
    lines = host.out("ss -Hltn").splitlines()
    places = [line.split()[3].rpartition(":") for line in lines]
    own = [int(port) for address, _, port in places if address.startswith("127.") or address == "[::1]"]
    return {int(port) for _, _, port in places if loopback or int(port) not in own}


def knock(address: str, port: int, method: str, path: str) -> int | None:
    """Return the status with which a port answers a request without a token; None if it does not speak HTTP/1."""
    connection = http.client.HTTPConnection(address, port, timeout=3)
    try:
        connection.request(method, path, body=b'{"entrypoint": "true"}' if method == "POST" else None)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@pytest.mark.long
def test_a_crashed_ray_of_a_worker_is_restarted_by_its_watchdog(cluster: Laptop, lab: World) -> None:
    worker = lab.hosts[2]
    ray = rays(worker)["raylaunch.cluster.ray_start start"]
    psutil.Process(ray).kill()
    wait_until(lambda: rays(worker).get("raylaunch.cluster.ray_start start", ray) != ray, 120, "Ray is started again")
    wait_until(lambda: cluster.living() == {"h1", "h2", "h3"}, 180, "the worker is back")


@pytest.mark.long
def test_a_hanging_controller_is_replaced_by_the_heads_watchdog_and_a_jobs_end_is_kept(
    cluster: Laptop, lab: World
) -> None:
    head, worker, _ = lab.hosts
    waits = "echo ready; while ! test -e /tmp/go; do sleep 0.1; done"
    job = cluster.call("submit", "--host", "h2", "--name", "ends-meanwhile", "--", waits).stdout.strip()
    wait_until(lambda: "ready" in cluster.call("logs", job).stdout, 120, "the job runs")
    hung = rays(head)["raylaunch.controller --config"]
    psutil.Process(hung).suspend()
    worker.run("touch /tmp/go")
    attempt = worker.path(f"/root/.raylaunch/clusters/lab.h2/node/attempts/{job}-1")
    wait_until((attempt / "exit.json").exists, 60, "the job has ended")
    started, ended = (json.loads((attempt / name).read_text())["at"] for name in ("started.json", "exit.json"))
    assert "not responding; it is being restarted" in cluster.call("list").stderr
    wait_until(lambda: rays(head).get("raylaunch.controller --config", hung) != hung, 120, "another controller runs")
    assert cluster.call("wait", job).returncode == 0
    shown = json.loads(cluster.call("show", job, "--json").stdout)
    assert [(one["started_at"], one["ended_at"]) for one in (shown, *shown["attempts"])] == [(started, ended)] * 2


@pytest.mark.long
def test_a_host_joins_the_running_cluster_takes_a_job_and_leaves_again(cluster: Laptop, lab: World) -> None:
    new = lab.host()
    before = [rays(host) for host in lab.hosts[:3]]
    file = (cluster.folder / "cluster.yaml").read_text()
    cluster.call("add", new.name, "--gpus", "2", limit_s=UP_S)
    assert f"- {{gpus: 2, host: {new.name}}}" in (cluster.folder / "cluster.yaml").read_text()
    assert cluster.living() == {"h1", "h2", "h3", new.name}
    assert [rays(host) for host in lab.hosts[:3]] == before
    job = cluster.call("submit", "--host", new.name, "--gpus", "2", "--name", "there", "--", "sleep 600").stdout.strip()
    refused = cluster.call("remove", new.name, check=False)
    assert refused.returncode == 1
    assert f"1 running job: {job} on {new.name}" in refused.stderr
    cluster.call("remove", new.name, "--stop", limit_s=300)
    wait_until(lambda: not rays(new), 30, "nothing of the cluster runs there")
    assert (cluster.folder / "cluster.yaml").read_text() == file
    assert cluster.call("list", "--json").stdout.count('"queued"') == 1
    cluster.call("stop", job)
    assert cluster.living() == {"h1", "h2", "h3"}


def test_down_leaves_no_process_on_any_host(cluster: Laptop, lab: World) -> None:
    cluster.call("down", limit_s=300)
    wait_until(lambda: not any(rays(host) for host in lab.hosts), 30, "nothing of the cluster runs")
    assert cluster.call("list", check=False).returncode == 1


@pytest.mark.long
@pytest.mark.usefixtures("first_up")  # what hosts need themselves is not in the index of packages
def test_what_the_clusters_own_environment_needs_is_sent_by_up_and_serves_everybody(
    laptop: Laptop, packages: list[str]
) -> None:
    laptop.call("down", limit_s=300)
    laptop.write(FILE + "environment: {pip: [alpha]}\n")
    laptop.call("up", limit_s=UP_S)
    laptop.write(FILE)  # as for who has joined: no file here says what the cluster's environment is
    assert "wheels would be sent" not in laptop.call("submit", "--dry-run", *packages).stdout
    ends_with_both(laptop, laptop.call("submit", *packages).stdout.strip())
    with_more = ["--with", "gamma", *packages[:-1], f"import gamma; {packages[-1]}"]
    ends_with_both(laptop, laptop.call("submit", *with_more).stdout.strip())
    laptop.call("down", limit_s=300)
