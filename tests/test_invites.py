"""Who may come in: invitations that work once, tokens that nobody else knows, and joining over a real sshd."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx2
import pytest
from support.api import Api, token_of, write_tokens
from support.api_use import error, submit
from support.cli import run_cli
from support.signals import send
from support.sshd import LOOPBACK, Sshd, fingerprint, sshd
from support.waiting import wait_until

from raylaunch.cluster.client_record import ClientRecord, TunnelRecord, load_client, load_tunnel, save_client
from raylaunch.cluster.hosts.joined import join_line
from raylaunch.cluster.processes import ProcessIdentity
from raylaunch.controller.store.access import Invitations, Role, TokenStore
from raylaunch.models.cluster import Invitation
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.paths import ClusterPaths, cluster_paths, make_private_dir

pytestmark = pytest.mark.slow

SHA = hashlib.sha256(b"made by alice").hexdigest()
OTHER = hashlib.sha256(b"made by mallory").hexdigest()


def invite(api: Api, person: str = "alice", role: str = "trainer", **more: object) -> str:
    with api.client("ada") as ada:
        answer = ada.post("/v1/tokens", json={"person": person, "role": role, **more})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["code"])


def take(api: Api, code: str, sha256: str = SHA) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {code}"}
    return httpx2.post(f"{api.url}/v1/join", json={"sha256": sha256}, headers=headers, trust_env=False)


def as_(api: Api, token: str) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx2.get(f"{api.url}/v1/status", headers=headers, trust_env=False)


# -- inviting --------------------------------------------------------------------------------------------------------


def test_an_invited_person_comes_in_with_a_token_of_her_own_making(api: Api) -> None:
    answer = take(api, invite(api)).json()
    assert (answer["person"], answer["role"], answer["made_by"]) == ("alice", "trainer", "ada")
    status = as_(api, "made by alice").json()
    assert (status["person"], status["role"]) == ("alice", "trainer")


def test_a_code_that_was_taken_opens_nothing_to_whoever_finds_it(api: Api) -> None:
    code = invite(api)
    assert take(api, code).status_code == 200
    assert error(take(api, code, OTHER)) == (
        403,
        "access",
        "the invitation for alice was already used",
        f"if that was not you, ask ada to run: raylaunch token revoke {SHA[:8]}",
    )
    assert as_(api, "made by mallory").status_code == 401


def test_an_answer_that_was_lost_is_had_by_asking_again(api: Api) -> None:
    code = invite(api)
    assert take(api, code).json() == take(api, code).json()
    with api.client("ada") as ada:
        assert [one["person"] for one in ada.get("/v1/tokens").json()].count("alice") == 1


def test_a_code_opens_no_other_path(api: Api) -> None:
    assert as_(api, invite(api)).status_code == 401


def test_a_code_is_no_token_and_a_token_is_no_code(api: Api) -> None:
    assert take(api, token_of("ada")).status_code == 401


@pytest.mark.parametrize("person", ["tom", "olga", "vera"])
def test_only_an_admin_invites_lists_and_revokes(api: Api, person: str) -> None:
    with api.client(person) as client:
        for answer in (
            client.post("/v1/tokens", json={"person": "eve", "role": "admin"}),
            client.get("/v1/tokens"),
            client.delete("/v1/tokens/tom"),
        ):
            assert error(answer)[:2] == (403, "access")


def test_the_list_tells_no_token_and_no_code(api: Api) -> None:
    code = invite(api)
    with api.client("ada") as ada:
        text = ada.get("/v1/tokens").text
    assert code not in text
    assert token_of("ada") not in text
    rows = {one["person"]: one for one in json.loads(text)}
    assert (rows["alice"]["invited"], rows["ada"]["mine"], rows["tom"]["role"]) == (True, True, "trainer")


def test_nothing_that_lets_anybody_in_lies_in_the_store(api: Api) -> None:
    code = invite(api)
    take(api, code)
    files = [path for path in api.store.rglob("*") if path.is_file()]
    assert not [path for path in files if code.encode() in path.read_bytes()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in files if path.name == "invitations.json")


def test_a_revoked_token_is_worth_nothing_at_once_and_its_code_stays_burnt(api: Api) -> None:
    code = invite(api)
    take(api, code)
    with api.client("ada") as ada:
        assert ada.delete("/v1/tokens/alice").json() == {"revoked": 1}
        assert error(ada.delete("/v1/tokens/alice"))[:3] == (404, "not_found", "no token or invitation of 'alice'")
    assert as_(api, "made by alice").status_code == 401
    assert error(take(api, code))[2] == "the token of alice was revoked"


def test_an_invitation_can_be_taken_back(api: Api) -> None:
    code = invite(api)
    with api.client("ada") as ada:
        assert ada.delete("/v1/tokens/alice").json() == {"revoked": 1}
    assert take(api, code).status_code == 401


def test_nobody_locks_herself_out(api: Api) -> None:
    with api.client("ada") as ada:
        problem = error(ada.delete("/v1/tokens/ada"))
    assert problem[:3] == (409, "conflict", "you cannot revoke the token you are using")


def test_invitations_and_tokens_are_over_at_their_time(tmp_path: Path) -> None:
    now = [1000.0]
    book = TokenStore(tmp_path, clock=lambda: now[0])
    made = Invitations(tmp_path, book, clock=lambda: now[0])
    late, _ = made.invite("late", Role.VIEWER, by="ada", valid_s=60, token_expires_at=None)
    code, _ = made.invite("alice", Role.VIEWER, by="ada", valid_s=60, token_expires_at=2000)
    made.accept(code, SHA)
    now[0] = 1061.0
    with pytest.raises(Exception, match="the invitation for late has expired"):
        made.accept(late, OTHER)
    assert book.caller_of("made by alice") is not None
    now[0] = 2000.0
    assert book.caller_of("made by alice") is None


def test_a_damaged_file_of_invitations_lets_nobody_in_and_is_named(api: Api) -> None:
    code = invite(api)
    (api.store / "invitations.json").write_text("{")
    assert take(api, code).status_code == 401
    with api.client("ada") as ada:
        problem = error(ada.post("/v1/tokens", json={"person": "eve", "role": "viewer"}))
    assert problem[1] == "storage"
    assert "invitations.json cannot be read" in problem[2]


@pytest.mark.parametrize("person", ["", "a b", "../x", "-rf", "x" * 65])
def test_what_is_no_name_for_a_person_is_refused(api: Api, person: str) -> None:
    with api.client("ada") as ada:
        assert error(ada.post("/v1/tokens", json={"person": person, "role": "viewer"}))[:2] == (422, "spec")


def test_every_change_is_in_the_audit_log_with_whom_it_was_about(api: Api) -> None:
    take(api, invite(api))
    lines = [json.loads(line) for line in (api.store / "audit.jsonl").read_text().splitlines()]
    assert [(one["person"], one["verb"], one["job"]) for one in lines] == [
        ("ada", "invite", "alice"),
        ("alice", "take", "alice"),
    ]


# -- the line --------------------------------------------------------------------------------------------------------

INVITATION = Invitation(code="c-o-d-e", person="alice", role="trainer", expires_at=0, cluster="lab", port=4)


def line(host: Mapping[str, object], **tunnel: object) -> str:
    spec = ClusterSpec.model_validate({"name": "lab", "hosts": [host]})
    known: dict[str, object] = {"head_ports": {"controller": 41234}, "head_fingerprint": "SHA256:abc", **tunnel}
    process = ProcessIdentity(pid=1, ticks=0, boot_id="", started_at=0, argv=())
    return join_line(
        INVITATION, ClientRecord(spec=spec), TunnelRecord.model_validate({"process": process, "ports": {}, **known})
    )


def test_the_line_names_the_head_as_everybody_can_reach_it() -> None:
    assert line({"host": "dgx-1.example.org", "port": 2222, "jump": ["gate"]}) == (
        "raylaunch join lab --head dgx-1.example.org:2222 --jump gate --port 41234 --fingerprint SHA256:abc "
        "--code c-o-d-e"
    )


def test_a_name_of_our_own_configuration_becomes_the_address_behind_it() -> None:
    assert "--head 10.0.0.5 " in line({"host": "dgx"}, head_address="10.0.0.5")
    assert "--head '[fd00::5]' " in line({"host": "dgx"}, head_address="fd00::5")


# -- joining ---------------------------------------------------------------------------------------------------------


class Desk:
    """Somebody's machine: a home of its own, from which raylaunch is run."""

    def __init__(self, folder: Path, host: Sshd) -> None:
        self.folder = folder
        self.home = folder / "raylaunch"
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("RAYLAUNCH", "SSH_"))}
        self.env |= {"RAYLAUNCH_HOME": str(self.home), "HOME": str(host.home), "NO_COLOR": "1"}
        folder.mkdir()

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run_cli(words, cwd=self.folder, env=self.env, timeout_s=90)

    def paths(self, name: str) -> ClusterPaths:
        return cluster_paths(name, self.env)

    def end(self) -> None:
        for file in self.home.glob("clusters/*/tunnel.json"):
            if record := load_tunnel(self.paths(file.parent.name)):
                send(record.process, signal.SIGTERM)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Sshd]:
    with sshd(tmp_path / "sshd") as served:
        served.config(f"Host {LOOPBACK}\n  IdentityFile {served.key}\n  User {served.user}\n")
        served.trust()
        yield served


@pytest.fixture
def anna(tmp_path: Path, host: Sshd, api: Api) -> Iterator[Desk]:
    """Who runs the cluster: what `up` would have left on her machine, and a tunnel that is up."""
    desk = Desk(tmp_path / "anna", host)
    paths = desk.paths("test")
    for folder in (paths.home, paths.home / "clusters", paths.root):
        make_private_dir(folder)
    spec = ClusterSpec.model_validate({"name": "test", "hosts": [{"host": f"{LOOPBACK}:{host.port}"}]})
    controller = int(api.url.rpartition(":")[2])
    ports = {"controller": controller, "dashboard": controller, "gcs": controller}
    save_client(paths, ClientRecord(spec=spec, token=token_of("ada"), head_ports=ports, head=spec.hosts[0].name))
    (desk.folder / "cluster.yaml").write_text((paths.root / "cluster.yaml").read_text())
    try:
        assert desk.call("list").returncode == 0
        yield desk
    finally:
        desk.end()


@pytest.fixture
def alice(tmp_path: Path, host: Sshd) -> Iterator[Desk]:
    desk = Desk(tmp_path / "alice", host)
    try:
        yield desk
    finally:
        desk.end()


def joined(anna: Desk, alice: Desk, *words: str) -> subprocess.CompletedProcess[str]:
    made = anna.call("token", "create", "--for", "alice", *words)
    assert made.returncode == 0, made.stderr
    return alice.call(*shlex.split(made.stdout)[1:])


def test_the_line_that_is_printed_lets_a_person_in_and_every_verb_works_then(
    anna: Desk, alice: Desk, host: Sshd, api: Api
) -> None:
    done = joined(anna, alice)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Joined cluster test as alice (trainer); ada runs it\n"
    with api.client("tom") as tom:
        job = submit(tom, "toms")
    assert job.id in alice.call("list").stdout
    assert alice.call("stop", job.id).returncode == 1
    record = load_client(alice.paths("test"))
    assert record is not None
    assert record.spec.hosts[0].fingerprint == fingerprint(host.host_keys[0])
    assert record.programs == {}


def test_who_joined_neither_brings_up_nor_takes_down_and_is_told_whom_to_ask(anna: Desk, alice: Desk) -> None:
    joined(anna, alice)
    for words in (("up",), ("down",), ("--cluster", "test", "remove", "h2"), ("token", "create", "--for", "eve")):
        refused = alice.call(*words)
        assert refused.returncode == 1, words
        assert "ada" in refused.stderr or "is the head" in refused.stderr, refused.stderr


def test_leaving_forgets_the_cluster_and_ends_the_tunnel(anna: Desk, alice: Desk) -> None:
    joined(anna, alice)
    tunnel = load_tunnel(alice.paths("test"))
    assert tunnel is not None
    assert alice.call("leave", "test").returncode == 0
    wait_until(lambda: not tunnel.alive, 60, "the tunnel has ended")
    assert not alice.paths("test").root.exists()
    assert anna.call("leave", "test").returncode == 1


def test_a_line_that_is_pasted_twice_by_another_is_refused_and_nothing_is_left_there(
    anna: Desk, alice: Desk, tmp_path: Path, host: Sshd
) -> None:
    made = anna.call("token", "create", "--for", "alice").stdout
    assert alice.call(*shlex.split(made)[1:]).returncode == 0
    mallory = Desk(tmp_path / "mallory", host)
    try:
        refused = mallory.call(*shlex.split(made)[1:])
        assert refused.returncode == 1
        assert "the invitation for alice was already used" in refused.stderr
        assert not mallory.paths("test").root.exists()
    finally:
        mallory.end()


def test_a_head_that_shows_another_host_key_is_not_joined(anna: Desk, alice: Desk) -> None:
    words = shlex.split(anna.call("token", "create", "--for", "alice").stdout)[1:]
    words[words.index("--fingerprint") + 1] = f"SHA256:{'A' * 43}"
    refused = alice.call(*words)
    assert refused.returncode == 1
    assert "is pinned for it" in refused.stderr
    assert not alice.paths("test").root.exists()


def test_an_operator_who_joins_reaches_rays_own_ports_and_a_trainer_does_not(anna: Desk, alice: Desk) -> None:
    joined(anna, alice, "--role", "operator")
    assert "RAY_AUTH_TOKEN" in alice.call("env").stdout


def test_the_list_of_tokens_is_for_people_and_for_programs(anna: Desk) -> None:
    anna.call("token", "create", "--for", "alice", "--expires", "90d")
    assert "alice" in anna.call("token", "list").stdout
    found = {one["person"]: one for one in json.loads(anna.call("token", "list", "--json").stdout)}
    assert found["alice"]["invited"]
    assert anna.call("token", "revoke", "alice").stderr == "Revoked 1 token of alice\n"


def test_the_embedded_cluster_invites_nobody(tmp_path: Path, host: Sshd) -> None:
    refused = Desk(tmp_path / "alone", host).call("token", "create", "--for", "alice")
    assert refused.returncode == 1
    assert "cluster local listens on this machine's loopback, for the account that started it" in refused.stderr


def test_tokens_of_earlier_versions_stay_good(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"ada": "admin"})
    book = TokenStore(tmp_path)
    made = Invitations(tmp_path, book)
    code, _ = made.invite("alice", Role.VIEWER, by="ada", valid_s=60, token_expires_at=None)
    made.accept(code, SHA)
    assert [book.caller_of(token) is not None for token in (token_of("ada"), "made by alice")] == [True, True]
