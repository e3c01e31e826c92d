"""What a cluster file names is contacted once a person has accepted it, whichever way the file is used."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.agent import agent_at
from support.laptop import Person

from raylaunch import Cluster
from raylaunch.cli.app import raylaunch
from raylaunch.cluster import trust
from raylaunch.cluster.client_record import ClientRecord, save_client
from raylaunch.cluster.record import new_record, save_record
from raylaunch.config.load import load_cluster_file
from raylaunch.errors import RaylaunchError, SpecError, UntrustedError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.host_spec import HostSpec
from raylaunch.paths import cluster_paths, make_cluster_dirs

ELSEWHERE = {
    "name": "what it is called here",
    "interface": "among the host's own",
    "gpus": "how it is used",
    "cpus": "how it is used",
    "labels": "how it is used",
    "root": "a folder there",
    "environment": "a Python there",
    "env": "variables there",
    "store": "a folder there",
}
"""Fields of a host that decide neither where a connection goes nor with which secret, and what they are."""
OF_NO_RAY = ELSEWHERE | {
    "kind": "decides which fields count",
    "port": "the controller's, here",
    "secrets": "names of secrets that jobs get",
    "retention": "how long the store keeps",
    "bind": "where Ray listens",
    "tls": "among the hosts",
    "defaults": "merged into the hosts",
    "hosts": "each for itself",
}


class Listener:
    """A port that somebody may connect to, and how many have."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self.heard = 0
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.heard += 1
            connection.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


@pytest.fixture
def checkout(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that came from elsewhere; nothing was ever accepted here."""
    assert home
    for name in ("RAYLAUNCH_CLUSTER_FILE", trust.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def over_ssh(port: int) -> str:
    return f"name: lab\nhosts:\n  - {{host: 127.0.0.1, name: h1, port: {port}}}\n"


def of_a_ray(port: int) -> str:
    return f"name: theirs\nkind: existing\naddress: http://127.0.0.1:{port}\ngcs: 127.0.0.1:{port}\n"


def spec_of(**fields: object) -> ClusterSpec:
    return ClusterSpec.model_validate({"name": "lab", "hosts": [{"host": "dgx-1", **fields}]})


# -- every way to use the file ---------------------------------------------------------------------------------------

COMMANDS = (
    "up",
    "up --dry-run",
    "up --upgrade",
    "doctor",
    "status",
    "list",
    "show",
    "run -- true",
    "run --dry-run -- true",
    "submit -- true",
    "add 127.0.0.2",
    "add 127.0.0.2 --dry-run",
    "drain h1",
    "remove h1",
    "env",
    "token list",
    "down",
    "down --force",
)


@pytest.mark.parametrize("text", [over_ssh, of_a_ray])
@pytest.mark.parametrize("words", COMMANDS)
def test_no_command_contacts_what_nobody_has_accepted(
    checkout: Path, listener: Listener, words: str, text: Callable[[int], str]
) -> None:
    (checkout / "cluster.yaml").write_text(text(listener.port))
    done = CliRunner().invoke(raylaunch, words.split())
    assert listener.heard == 0, done.output
    assert not (cluster_paths("lab").home / "trusted").exists()


@pytest.mark.parametrize("text", [over_ssh, of_a_ray])
@pytest.mark.parametrize("words", ["up", "up --dry-run", "doctor", "run -- true"])
def test_the_error_names_the_command_that_accepts_it(
    checkout: Path, listener: Listener, words: str, text: Callable[[int], str]
) -> None:
    (checkout / "cluster.yaml").write_text(text(listener.port))
    error = CliRunner().invoke(raylaunch, words.split()).exception
    assert isinstance(error, UntrustedError)
    assert f"127.0.0.1:{listener.port}" in error.message or f"port {listener.port}" in error.message
    assert "raylaunch trust" in error.hint
    assert f"RAYLAUNCH_TRUST={error.fingerprint}" in error.hint


def test_ssh_is_not_started_either(checkout: Path, listener: Listener) -> None:
    (checkout / "cluster.yaml").write_text(over_ssh(listener.port))
    words = [sys.executable, "-m", "raylaunch", "ssh", "h1", "true"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    assert (done.returncode, listener.heard) == (1, 0)
    assert "raylaunch trust" in done.stderr


@pytest.mark.parametrize("text", [over_ssh, of_a_ray])
def test_no_verb_in_python_contacts_it(checkout: Path, listener: Listener, text: Callable[[int], str]) -> None:
    file = checkout / "cluster.yaml"
    file.write_text(text(listener.port))
    for verb in (Cluster.plan, Cluster.up, lambda which: list(Cluster.up_steps(which))):
        with pytest.raises(UntrustedError):
            verb(file)
    with pytest.raises(UntrustedError):
        Cluster.connect(cluster_file=file)
    Cluster.look(file)
    Cluster.down(file)
    assert listener.heard == 0


def test_a_program_that_spells_out_its_hosts_is_asked_nothing(checkout: Path, listener: Listener) -> None:
    assert checkout
    host = {"host": "127.0.0.1", "name": "h1", "port": listener.port}
    Cluster.plan(ClusterSpec.model_validate({"name": "lab", "hosts": [host]}))
    assert listener.heard > 0


@pytest.mark.slow
@pytest.mark.parametrize("text", [over_ssh, of_a_ray])
def test_no_tool_of_an_agent_contacts_it(
    home: Path, checkout: Path, listener: Listener, text: Callable[[int], str]
) -> None:
    (checkout / "cluster.yaml").write_text(text(listener.port))
    with agent_at(home, checkout) as agent:
        asked = agent.call("cluster_status", doctor=True)
        agent.call("cluster_status")
        agent.call("train_job", entrypoint="true", working_dir="")
        agent.call("list_jobs")
    assert listener.heard == 0
    assert asked.error
    assert "raylaunch trust" in asked.text


# -- accepting -------------------------------------------------------------------------------------------------------


def test_what_was_accepted_is_contacted_from_any_checkout(checkout: Path, listener: Listener, tmp_path: Path) -> None:
    (checkout / "cluster.yaml").write_text(over_ssh(listener.port))
    done = CliRunner().invoke(raylaunch, ["trust", "cluster.yaml"], catch_exceptions=False)
    assert "accepted" in done.output
    assert listener.heard == 0
    other = tmp_path / "other.yaml"
    other.write_text(f"# a comment\n{over_ssh(listener.port)}store: /raid\n")
    CliRunner().invoke(raylaunch, ["-c", str(other), "up", "--dry-run"], catch_exceptions=False)
    assert listener.heard > 0


def test_trust_shows_what_it_would_accept(checkout: Path) -> None:
    host = "{host: dgx-1, user: ml, key: ~/.ssh/id_ml, jump: gate}"
    (checkout / "cluster.yaml").write_text(f"name: lab\nhosts: [{host}]\n")
    shown = json.loads(CliRunner().invoke(raylaunch, ["trust", "--show", "--json"], catch_exceptions=False).output)
    assert shown["connects_to"] == ["ml@dgx-1 (key ~/.ssh/id_ml; through gate)"]
    assert not shown["accepted"]
    assert trust.unaccepted(load_cluster_file().spec)
    accepted = json.loads(CliRunner().invoke(raylaunch, ["trust", "--json"], catch_exceptions=False).output)
    assert accepted == {**shown, "accepted": True}


def test_a_fingerprint_in_the_environment_accepts_one_cluster(checkout: Path) -> None:
    assert checkout
    spec = spec_of()
    accepted = {trust.VARIABLE: trust.fingerprint(spec), "RAYLAUNCH_HOME": str(checkout)}
    assert not trust.unaccepted(spec, accepted)
    assert trust.unaccepted(spec_of(user="eve"), accepted)


def test_init_accepts_the_hosts_that_a_person_types_and_not_those_of_a_file(checkout: Path) -> None:
    CliRunner().invoke(raylaunch, ["init", "lab", "dgx-1", "ml@dgx-2:2222"], catch_exceptions=False)
    assert not trust.unaccepted(load_cluster_file().spec)
    (checkout / "ray.yaml").write_text("cluster_name: ray\nprovider: {type: local, head_ip: evil.example.org}\n")
    CliRunner().invoke(raylaunch, ["init", "--from", "ray.yaml", "--force"], catch_exceptions=False)
    assert trust.unaccepted(load_cluster_file().spec)


def test_a_host_that_is_added_is_the_only_new_one(checkout: Path) -> None:
    (checkout / "cluster.yaml").write_text("name: lab\nhosts: [dgx-1, dgx-2]\n")
    trust.accept(load_cluster_file().spec)
    (checkout / "cluster.yaml").write_text("name: lab\nhosts: [dgx-2, dgx-1, dgx-3]\n")
    (new,) = trust.unaccepted(load_cluster_file().spec)
    assert new.words == "dgx-3"


def test_a_host_that_a_person_adds_is_accepted_where_the_others_are(checkout: Path, listener: Listener) -> None:
    (checkout / "cluster.yaml").write_text(over_ssh(listener.port))
    trust.accept(load_cluster_file().spec)
    CliRunner().invoke(raylaunch, ["add", f"127.0.0.2:{listener.port}", "--dry-run"], catch_exceptions=False)
    assert listener.heard > 0


def test_clusters_that_were_brought_up_before_are_accepted(checkout: Path) -> None:
    assert checkout
    spec = spec_of(user="ml")
    paths = cluster_paths("lab")
    paths.root.mkdir(parents=True, mode=0o700)
    gone = HostSpec(host="dgx-9", name="dgx-9")
    save_client(paths, ClientRecord(spec=spec, hosts={"dgx-9": gone}, wanted="stopped"))
    assert not trust.unaccepted(spec)
    assert not trust.unaccepted(ClusterSpec(name="other", kind="ssh", hosts=(gone,)))
    assert trust.unaccepted(spec_of(user="eve"))
    theirs = ClusterSpec(name="theirs", kind="existing", address="http://ray:8265")
    assert trust.unaccepted(theirs)
    paths = cluster_paths("theirs")
    make_cluster_dirs(paths)
    save_record(paths, new_record(theirs, paths))
    assert not trust.unaccepted(theirs)


def test_a_cluster_on_this_machine_needs_no_acceptance(checkout: Path) -> None:
    assert checkout
    assert not trust.unaccepted(ClusterSpec(name="scratch", store="/raid"))


@pytest.mark.parametrize(("answer", "accepted"), [("yes", True), ("no", False), ("", False)])
def test_a_person_at_a_terminal_is_asked_once(checkout: Path, answer: str, *, accepted: bool) -> None:
    assert checkout
    person, spec = Person(answer), spec_of(key="~/.ssh/id_ml")
    if accepted:
        asyncio.run(trust.check_accepted(spec, on_prompt=person))
        asyncio.run(trust.check_accepted(spec, on_prompt=person))
    else:
        with pytest.raises(UntrustedError):
            asyncio.run(trust.check_accepted(spec, on_prompt=person))
    (prompt,) = person.asked
    assert "dgx-1 (key ~/.ssh/id_ml)" in prompt.text
    assert bool(trust.unaccepted(spec)) is not accepted


# -- what is remembered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"host": "dgx-2"},
        {"user": "ml"},
        {"port": 2222},
        {"key": "~/.ssh/id"},
        {"jump": ["gate"]},
        {"address": "10.0.0.1"},
        {"fingerprint": f"SHA256:{'A' * 43}"},
    ],
)
def test_each_field_that_decides_where_a_connection_goes_counts(more: dict[str, object]) -> None:
    assert trust.fingerprint(spec_of(**more)) != trust.fingerprint(spec_of())


def test_nothing_else_counts() -> None:
    more: dict[str, object] = {"name": "one", "root": "/raid", "gpus": 2, "labels": {"a": "b"}, "env": {"A": "b"}}
    assert trust.fingerprint(spec_of(**more)) == trust.fingerprint(spec_of())
    two = [{"host": "a"}, {"host": "b"}]
    one, other = (ClusterSpec.model_validate({"name": "x", "hosts": hosts}) for hosts in (two, two[::-1]))
    assert trust.fingerprint(one) == trust.fingerprint(other)


def test_of_every_field_it_is_decided_whether_it_counts() -> None:
    assert set(HostSpec.model_fields) == {*trust.OF_A_HOST, *ELSEWHERE}
    assert set(ClusterSpec.model_fields) == {*trust.OF_A_RAY, *OF_NO_RAY} - {"interface", "root"}


# -- the token of somebody else's Ray --------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["~/hf_token", "/etc/hostname", "token", "~/.ray/../hf_token", "~/.ray/link"])
def test_a_token_comes_from_the_folders_of_tokens_alone(
    checkout: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    home = checkout / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "link").symlink_to(home / "hf_token")
    (home / "hf_token").write_text("hf_secret")
    monkeypatch.setenv("HOME", str(home))
    (checkout / "cluster.yaml").write_text(f"{of_a_ray(listener.port)}ray_token_file: {file}\n")
    trust.accept(load_cluster_file().spec)
    error = CliRunner().invoke(raylaunch, ["up", "--dry-run"]).exception
    assert isinstance(error, SpecError)
    assert error.field == "ray_token_file"
    assert listener.heard == 0


def test_a_token_does_not_travel_in_clear(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".ray").mkdir()
    (checkout / ".ray" / "auth_token").write_text("secret")
    monkeypatch.setenv("HOME", str(checkout))
    for address in ("http://10.255.255.1:8265", "http://127.0.0.1.evil.example.org:8265"):
        text = f"name: theirs\naddress: {address}\nray_token_file: ~/.ray/auth_token\n"
        (checkout / "cluster.yaml").write_text(text)
        trust.accept(load_cluster_file().spec)
        error = CliRunner().invoke(raylaunch, ["up"]).exception
        assert isinstance(error, SpecError)
        assert error.field == "address"


def test_an_address_may_be_https(checkout: Path, listener: Listener) -> None:
    (checkout / "cluster.yaml").write_text(of_a_ray(listener.port).replace("http://", "https://"))
    trust.accept(load_cluster_file().spec)
    error = CliRunner().invoke(raylaunch, ["up", "--dry-run"]).exception
    assert isinstance(error, RaylaunchError)
    assert listener.heard == 1
    assert "no Ray answers at https://" in error.message
