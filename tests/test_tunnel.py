"""The tunnel: what it survives, and what a verb says meanwhile, in time. A real sshd, with a real API behind it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.api import Api, serving, token_of
from support.person import Person
from support.signals import kill, send
from support.sshd import Sshd, sshd
from support.waiting import wait_until

from raylaunch.cluster.client_record import ClientRecord, save_tunnel
from raylaunch.cluster.hosts.backend import adopted
from raylaunch.cluster.hosts.host_program import HostState
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.version import __version__

pytestmark = pytest.mark.slow  # each test has an sshd, and programs that speak through it

SAID_S = 10.0
"""Within which a verb says that its cluster cannot be reached; starting Python on a busy machine comes on top."""
MARGIN_S = 6.0


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("store") / "store") as running:
        yield running


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Sshd]:
    with sshd(tmp_path / "head") as running:
        yield running


@pytest.fixture
def ada(api: Api, host: Sshd, tmp_path: Path) -> Iterator[Person]:
    person = Person(tmp_path / "ada", host)
    for cluster in ("lab", "other"):
        person.runs(cluster, token=token_of("ada"), port=int(api.url.rpartition(":")[2]))
    assert ask(person).returncode == 0
    yield person
    person.leaves()


def ask(person: Person, cluster: str = "lab", *, check: bool = True) -> subprocess.CompletedProcess[str]:
    return person.call("--cluster", cluster, "list", check=check)


def refused(person: Person) -> str:
    """Let a verb fail; return what it said."""
    done = ask(person, check=False)
    assert done.returncode == 1, done.stderr
    assert "healing" not in done.stderr, "bringing the cluster up mends no network"
    return done.stderr


def test_a_tunnel_that_was_killed_is_started_by_the_next_verb_on_the_same_ports(ada: Person) -> None:
    before = ada.tunnel("lab")
    kill(before.process)
    ask(ada)
    assert ada.tunnel("lab").ports == before.ports
    assert ada.tunnel("lab").process != before.process


def test_a_tunnel_of_an_older_raylaunch_is_replaced_by_the_next_verb(ada: Person) -> None:
    before = ada.tunnel("lab")
    save_tunnel(ada.paths("lab"), before.model_copy(update={"version": ""}))
    ask(ada)
    assert not before.alive
    assert ada.tunnel("lab").version == __version__
    assert ada.tunnel("lab").ports == before.ports
    after = ada.tunnel("lab").process
    save_tunnel(ada.paths("lab"), ada.tunnel("lab").model_copy(update={"version": "99.0.0"}))
    ask(ada)
    assert ada.tunnel("lab").process == after


def test_clusters_side_by_side_have_a_tunnel_each(ada: Person) -> None:
    ask(ada, "other")
    one, other = ada.tunnel("lab"), ada.tunnel("other")
    assert one.alive
    assert other.alive
    assert not set(one.ports.values()) & set(other.ports.values())


def test_rays_own_port_is_forwarded_only_on_request(ada: Person) -> None:
    assert "gcs" not in ada.tunnel("lab").head_ports
    assert "RAY_ADDRESS" not in ada.call("--cluster", "lab", "env").stdout
    assert "RAY_ADDRESS" in ada.call("--cluster", "lab", "env", "--gcs").stdout
    assert "gcs" in ada.tunnel("lab").head_ports


@pytest.mark.long
def test_a_tunnel_that_hangs_is_replaced_by_the_next_verb(ada: Person) -> None:
    before = ada.tunnel("lab")
    send(before.process.pid, signal.SIGSTOP)
    wait_until(lambda: silent(ada) > 6, 20, "it has not said anything for some seconds")
    started = time.monotonic()
    ask(ada)
    assert time.monotonic() - started < SAID_S + MARGIN_S
    assert not before.alive
    assert ada.tunnel("lab").ports == before.ports


@pytest.mark.long
def test_a_laptop_that_slept_longer_than_its_connections_live_finds_its_cluster_again(ada: Person, host: Sshd) -> None:
    before = ada.tunnel("lab")
    process = psutil.Process(before.process.pid)
    process.suspend()
    host.drop()  # as the far side gives up a connection that is silent
    time.sleep(9)
    process.resume()
    ask(ada)
    assert ada.tunnel("lab").process == before.process, "it has connected again itself"


def silent(person: Person) -> float:
    return time.time() - (person.paths("lab").root / "tunnel.json").stat().st_mtime


@pytest.mark.long
def test_a_network_that_drops_everything_is_reported_in_time_and_the_cluster_is_found_again(
    ada: Person, host: Sshd
) -> None:
    host.freeze()
    started = time.monotonic()
    first = refused(ada)
    assert time.monotonic() - started < SAID_S + MARGIN_S
    assert "lost the connection to head" in first
    assert "are you on its network or VPN?" in first
    wait_until(lambda: not ada.tunnel("lab").up, 20, "the tunnel has noticed")
    refused(ada)
    host.thaw()
    wait_until(lambda: ada.tunnel("lab").up, 40, "the tunnel is up again")
    ask(ada)


def test_a_head_that_is_down_is_named_and_found_when_it_is_back(ada: Person, host: Sshd) -> None:
    host.stop()
    wait_until(lambda: not ada.tunnel("lab").up, 20, "the tunnel has noticed")
    assert "refuses connections" in refused(ada) + refused(ada)
    host.start()
    wait_until(lambda: ada.tunnel("lab").up, 30, "the tunnel is up again")
    ask(ada)


def connected(pid: int) -> bool:
    return any(one.status == psutil.CONN_ESTABLISHED for one in psutil.Process(pid).net_connections())


def test_a_job_that_is_followed_is_followed_on_after_the_connection_was_away(ada: Person, host: Sshd) -> None:
    job = ada.call("--cluster", "lab", "submit", "--working-dir", "", "--", "true").stdout.strip()
    with ada.start("--cluster", "lab", "wait", job) as waiting:
        wait_until(lambda: connected(waiting.pid), 30, "it waits for the job")
        host.stop()
        assert waiting.stderr is not None
        assert any("retrying" in line for line in waiting.stderr), "it said so and went on"
        wait_until(lambda: not ada.tunnel("lab").up, 20, "the tunnel has noticed")
        host.start()
        wait_until(lambda: ada.tunnel("lab").up, 30, "the tunnel is up again")
        ada.call("--cluster", "lab", "stop", job)
        _, output = waiting.communicate(timeout=60)
    assert "again" in output


def test_an_up_from_another_machine_reports_that_it_found_the_cluster() -> None:
    head = HostState(name="lab", cluster_id="c1", owner="ml")
    known = ClientRecord(spec=ClusterSpec.model_validate({"hosts": ["dgx-1"]}), cluster_id="c1")
    assert "is already running, started by ml" in adopted(None, head, fresh=False)
    assert adopted(known, head, fresh=False) == ""
    assert adopted(None, head, fresh=True) == ""
    for before in ("", "c0"):
        started = known.with_(cluster_id=before, begun=(head.place.host,))
        assert adopted(started, head, fresh=False) == "", "an up from here was killed before it had heard of it"


def test_a_verb_about_jobs_loads_no_ssh_for_a_cluster_over_ssh() -> None:
    code = "import sys, raylaunch.cli.jobs, raylaunch.cluster.hosts.backend; sys.exit('asyncssh' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
