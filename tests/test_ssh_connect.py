"""The way to a host: keys, host keys, configuration, jump hosts; and the words for each that fails."""

from __future__ import annotations

import os
import re
import shlex
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.sshd import LOOPBACK, Sshd, fingerprint, free_port, make_key, sshd
from support.waiting import wait_until

from raylaunch.cluster.ssh import Prompt, Target, machine
from raylaunch.errors import HostAuthError, HostKeyError, HostUnreachableError, RaylaunchError, SpecError

pytestmark = pytest.mark.anyio

PASSPHRASE = "sesame"  # noqa: S105 -- of a key that lives for one test


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd"), kinds=("ed25519", "ecdsa", "rsa")) as served:
        yield served


@pytest.fixture(autouse=True)
def laptop(host: Sshd, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the client's own: without keys, agent or configuration of this machine's user."""
    host.authorize(host.key)
    host.config()
    monkeypatch.setenv("HOME", str(host.folder / "empty"))
    monkeypatch.setenv("RAYLAUNCH_HOME", str(host.folder / "raylaunch"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (host.folder / "empty").mkdir(exist_ok=True)
    return host.folder / "empty"


async def hello(target: Target, **how: object) -> str:
    """Connect, and let the host say something."""
    async with machine(target, **how) as there:  # type: ignore[arg-type]  # the keywords of `machine`, as they are
        return (await there.run(["echo", "hello"], limit_s=20)).text


async def refusal(target: Target, **how: object) -> RaylaunchError:
    """Connect, which must fail with an error of ours."""
    with pytest.raises(RaylaunchError) as caught:
        await hello(target, **how)
    return caught.value


class Person:
    """Somebody who is asked, and answers what she was told to."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.asked: list[Prompt] = []

    async def __call__(self, prompt: Prompt) -> str | None:
        self.asked.append(prompt)
        return self.answers.pop(0)


@contextmanager
def agent(folder: Path, *keys: Path) -> Iterator[str]:
    """Run an ssh-agent that holds these keys; yields its socket."""
    path = folder / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(path.exists, 20, "the agent listens")
            env = {**os.environ, "SSH_AUTH_SOCK": str(path)}
            for key in keys:
                subprocess.run(["ssh-add", "-q", str(key)], env=env, check=True, timeout=20, capture_output=True)
            yield str(path)
        finally:
            process.terminate()


def program(*words: str) -> None:
    """Run a program to its good end."""
    subprocess.run(words, check=True, capture_output=True, timeout=20)


# Keys


async def test_a_key_that_the_host_does_not_know_is_named_with_the_command_that_puts_it_there(
    host: Sshd, tmp_path: Path
) -> None:
    other = make_key(tmp_path / "other")
    error = await refusal(replace(host.target, key=str(other)))
    assert isinstance(error, HostAuthError)
    assert error.tried == (str(other),)
    assert error.host == "here"
    assert f"here refuses {host.user}: offered {other}" in error.message
    assert f"ssh-copy-id -i {other}.pub {host.user}@{LOOPBACK}" in error.hint


async def test_without_any_key_the_error_says_how_to_make_one(host: Sshd) -> None:
    error = await refusal(replace(host.target, key=""))
    assert isinstance(error, HostAuthError)
    assert "no key" in error.message
    assert "ssh-keygen -t ed25519" in error.hint


async def test_a_key_file_that_does_not_exist_is_named(host: Sshd) -> None:
    error = await refusal(replace(host.target, key="~/nope"))
    assert isinstance(error, HostAuthError)
    assert "nope" in error.message


async def test_an_encrypted_key_without_a_person_says_what_to_type(host: Sshd, tmp_path: Path) -> None:
    locked = make_key(tmp_path / "locked", passphrase=PASSPHRASE)
    host.authorize(locked)
    error = await refusal(replace(host.target, key=str(locked)))
    assert isinstance(error, HostAuthError)
    assert f"{locked} needs a passphrase" in error.message
    assert error.hint.endswith(f"ssh-add {locked}")


async def test_a_person_opens_an_encrypted_key_at_the_second_try(host: Sshd, tmp_path: Path) -> None:
    locked = make_key(tmp_path / "locked", passphrase=PASSPHRASE)
    host.authorize(locked)
    person = Person("wrong", PASSPHRASE)
    assert await hello(replace(host.target, key=str(locked)), on_prompt=person) == "hello"
    assert [prompt.kind for prompt in person.asked] == ["passphrase", "passphrase"]
    assert person.asked[0].path == str(locked)
    assert "That was not it" in person.asked[1].text


async def test_nobody_is_asked_for_a_passphrase_while_another_key_opens_the_door(host: Sshd, tmp_path: Path) -> None:
    locked = make_key(tmp_path / "locked", passphrase=PASSPHRASE)
    config = host.config(f"IdentityFile {locked}\nIdentityFile {host.key}\n")
    person = Person()
    assert await hello(replace(host.target, key="", ssh_config=config), on_prompt=person) == "hello"
    assert person.asked == []


async def test_a_key_in_the_agent_opens_the_door(host: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with agent(tmp_path, host.key) as path:
        monkeypatch.setenv("SSH_AUTH_SOCK", path)
        assert await hello(replace(host.target, key="")) == "hello"


async def test_an_encrypted_key_that_the_agent_holds_needs_no_passphrase(
    host: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = make_key(tmp_path / "locked")
    host.authorize(key)
    with agent(tmp_path, key) as path:
        program("ssh-keygen", "-q", "-p", "-N", PASSPHRASE, "-f", str(key))
        monkeypatch.setenv("SSH_AUTH_SOCK", path)
        assert await hello(replace(host.target, key=str(key))) == "hello"


async def test_of_an_agents_keys_only_the_named_one_is_offered(
    host: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [make_key(tmp_path / f"other{number}") for number in range(8)]  # more than sshd lets anybody try
    with agent(tmp_path, *others, host.key) as path:
        monkeypatch.setenv("SSH_AUTH_SOCK", path)
        assert await hello(replace(host.target, key=f"{host.key}.pub")) == "hello"
        error = await refusal(replace(host.target, key=""))
    assert isinstance(error, HostAuthError)
    assert "test other0 (agent)" in error.message
    assert "fewer keys than were offered" in error.message


async def test_an_agent_that_is_gone_does_no_harm(host: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", "/nonexistent/agent")
    assert await hello(host.target) == "hello"


# Host keys


async def test_an_unknown_host_is_shown_with_the_fingerprint_that_it_has(host: Sshd) -> None:
    error = await refusal(host.stranger)
    assert isinstance(error, HostKeyError)
    assert error.fingerprint == fingerprint(host.host_keys[0])
    assert f"{LOOPBACK}:{host.port}" in error.message
    assert f"fingerprint: {error.fingerprint}" in error.hint
    assert error.known == ()


async def test_a_host_that_a_person_accepted_is_known_from_then_on_to_raylaunch_alone(
    host: Sshd, laptop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYLAUNCH_HOME", str(tmp_path / "raylaunch"))
    target = replace(host.target, known_hosts=None)
    person = Person("yes")
    assert await hello(target, on_prompt=person) == "hello"
    assert fingerprint(host.host_keys[0]) in person.asked[0].text
    assert await hello(target) == "hello"
    own = tmp_path / "raylaunch/known_hosts"
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    assert not (laptop / ".ssh/known_hosts").exists()


async def test_a_host_that_a_person_did_not_accept_gets_no_key_of_hers(host: Sshd) -> None:
    before = host.log().count("Accepted publickey")
    error = await refusal(host.stranger, on_prompt=Person("no"))
    assert isinstance(error, HostKeyError)
    assert host.log().count("Accepted publickey") == before


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_pinned_fingerprint_of_any_of_its_keys_makes_a_host_known(host: Sshd, number: int) -> None:
    assert await hello(replace(host.stranger, fingerprint=fingerprint(host.host_keys[number]))) == "hello"


async def test_a_pinned_fingerprint_counts_more_than_known_hosts(host: Sshd) -> None:
    pinned = "SHA256:" + "A" * 43
    error = await refusal(replace(host.target, fingerprint=pinned), on_prompt=Person())
    assert isinstance(error, HostKeyError)
    assert error.known == (pinned,)
    assert fingerprint(host.host_keys[0]) in error.message


async def test_a_changed_host_key_shows_both_and_the_command_that_forgets_the_old(host: Sshd, tmp_path: Path) -> None:
    target = host.target
    old = make_key(tmp_path / "old")
    host.trust(keys=[old])
    error = await refusal(target, on_prompt=Person())
    assert isinstance(error, HostKeyError)
    assert error.fingerprint == fingerprint(host.host_keys[0])
    assert error.known == (fingerprint(old),)
    assert error.fingerprint in error.message
    assert error.known[0] in error.message
    command = re.search(r"ssh-keygen .*", error.hint)
    assert command is not None
    program(*shlex.split(command[0]))
    after = await refusal(target)
    assert isinstance(after, HostKeyError)
    assert after.known == ()


async def test_a_host_known_by_another_kind_of_key_is_no_stranger(host: Sshd) -> None:
    target = host.target
    host.trust(keys=[host.host_keys[2]])
    assert await hello(target) == "hello"


async def test_a_host_that_lost_the_kind_of_key_it_is_known_by_has_changed(tmp_path: Path) -> None:
    with sshd(tmp_path / "one") as one:
        target = one.target
        one.trust(keys=[make_key(tmp_path / "old", kind="rsa")])
        error = await refusal(target, on_prompt=Person())
    assert isinstance(error, HostKeyError)
    assert error.known == (fingerprint(tmp_path / "old"),)


async def test_hashed_names_in_known_hosts_are_found(host: Sshd) -> None:
    target = host.target
    program("ssh-keygen", "-H", "-f", str(host.known_hosts))
    assert LOOPBACK not in host.known_hosts.read_text()
    assert await hello(target) == "hello"


async def test_an_authority_in_known_hosts_vouches_for_a_host(tmp_path: Path) -> None:
    authority = make_key(tmp_path / "ca")
    certificate = tmp_path / "sshd/host_ed25519-cert.pub"
    with sshd(tmp_path / "sshd", extra=[f"HostCertificate {certificate}"]) as one:
        public = f"{one.host_keys[0]}.pub"
        program("ssh-keygen", "-q", "-s", str(authority), "-I", "host", "-h", "-n", LOOPBACK, public)
        one.stop()
        one.start()
        target = one.target
        mark = f"@cert-authority [{LOOPBACK}]:{one.port} "
        one.known_hosts.write_text(mark + authority.with_suffix(".pub").read_text())
        assert await hello(target) == "hello"
        stranger = await refusal(one.stranger)
    assert isinstance(stranger, HostKeyError)
    assert stranger.fingerprint == fingerprint(one.host_keys[0])


async def test_a_revoked_host_key_is_refused(host: Sshd) -> None:
    target = host.target
    lines = host.known_hosts.read_text()
    host.known_hosts.write_text(lines + "".join(f"@revoked {line}\n" for line in lines.splitlines()))
    error = await refusal(target, on_prompt=Person())
    assert isinstance(error, HostKeyError)
    assert "revoked" in error.message


async def test_a_broken_line_in_known_hosts_vouches_for_nobody_and_stops_nothing(host: Sshd) -> None:
    target = host.target
    host.known_hosts.write_text("nonsense\n" + host.known_hosts.read_text())
    assert await hello(target) == "hello"
    host.known_hosts.write_text("@revoked nonsense\n" + host.known_hosts.read_text())
    error = await refusal(target)
    assert isinstance(error, SpecError)
    assert error.where == f"{host.known_hosts}:1"


# No connection


async def test_a_closed_port_is_told_from_a_host_that_is_down(host: Sshd) -> None:
    port = free_port()
    error = await refusal(replace(host.target, port=port))
    assert isinstance(error, HostUnreachableError)
    assert f"here ({LOOPBACK}:{port}) refuses connections" in error.message
    assert f"is sshd running there, and on port {port}?" in error.hint


async def test_a_name_without_an_address_is_said_to_be_one(host: Sshd) -> None:
    error = await refusal(replace(host.target, host="no-such-host.invalid"))
    assert isinstance(error, HostUnreachableError)
    assert "there is no address for the name no-such-host.invalid" in error.message


async def test_a_port_that_takes_connections_and_says_nothing_is_given_up_after_the_limit(host: Sshd) -> None:
    with socket.create_server((LOOPBACK, 0)) as silent:
        error = await refusal(replace(host.target, port=silent.getsockname()[1]), limit_s=0.5)
    assert isinstance(error, HostUnreachableError)
    assert "did not answer within 0.5 s" in error.message


async def test_a_port_of_something_else_than_ssh_is_told_from_a_door_that_is_closed(host: Sshd) -> None:
    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        connection.recv(100)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.close()

    with socket.create_server((LOOPBACK, 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        error = await refusal(replace(host.stranger, port=server.getsockname()[1]))
        thread.join(20)
    assert isinstance(error, HostUnreachableError)
    assert "closed the connection before the log-in" in error.message


async def test_a_frozen_sshd_is_given_up_after_the_limit(tmp_path: Path) -> None:
    with sshd(tmp_path) as one:
        target = one.target
        one.freeze()
        error = await refusal(target, limit_s=1)
    assert isinstance(error, HostUnreachableError)
    assert "did not answer within 1 s" in error.message


# Configuration


async def test_host_port_user_and_key_come_from_the_configuration(host: Sshd, tmp_path: Path) -> None:
    (tmp_path / "included").write_text(
        f"Host dgx\n  HostName {LOOPBACK}\n  Port {host.port}\n  User {host.user}\n  IdentityFile {host.key}\n"
        f"  UserKnownHostsFile {host.known_hosts}\n"
    )
    host.trust()
    config = host.config(f"Include {tmp_path}/incl*\nHost other\n  Port 1\n")
    assert await hello(Target(name="dgx", ssh_config=config)) == "hello"


async def test_the_persons_own_configuration_is_the_default(host: Sshd, laptop: Path) -> None:
    (laptop / ".ssh").mkdir(exist_ok=True)
    (laptop / ".ssh/config").write_text(f"Host dgx\n  HostName {LOOPBACK}\n  Port {host.port}\n  User {host.user}\n")
    try:
        assert await hello(replace(host.target, host="dgx", port=None, user="", ssh_config=None)) == "hello"
    finally:
        (laptop / ".ssh/config").unlink()


async def test_a_key_that_the_configuration_names_and_that_is_missing_is_passed_over(host: Sshd) -> None:
    config = host.config(f"IdentityFile /nonexistent/key\nIdentityFile {host.key}\n")
    assert await hello(replace(host.target, key="", ssh_config=config)) == "hello"


async def test_a_line_of_the_configuration_that_cannot_be_read_is_shown(host: Sshd) -> None:
    config = host.config("Host *\n  Port many\n")
    error = await refusal(replace(host.target, port=None, ssh_config=config))
    assert isinstance(error, SpecError)
    assert "line 2" in error.message
    assert error.where == str(config)


async def test_bulk_data_is_sent_with_a_fast_cipher_unless_the_configuration_says_otherwise(host: Sshd) -> None:
    async with machine(host.target) as there:
        assert there.connection.get_extra_info("send_cipher") == "aes128-gcm@openssh.com"
    config = host.config("Ciphers aes256-ctr\n")
    async with machine(replace(host.target, ssh_config=config)) as there:
        assert there.connection.get_extra_info("send_cipher") == "aes256-ctr"


async def test_a_host_is_reached_by_its_ipv6_address(tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    with sshd(tmp_path, extra=["ListenAddress ::1"]) as one:
        target = replace(one.target, host="::1")
        one.trust(host="::1")
        assert await hello(target) == "hello"


# Jump hosts


def known_hosts_of(*hosts: Sshd, file: Path) -> Path:
    """Write a known_hosts with all of them."""
    lines = []
    for one in hosts:
        one.trust(file=file)
        lines.append(file.read_text())
    file.write_text("".join(lines))
    return file


async def test_a_chain_of_jump_hosts_leads_to_the_host(host: Sshd, tmp_path: Path) -> None:
    with sshd(tmp_path / "gate") as gate, sshd(tmp_path / "inner") as inner:
        known = known_hosts_of(host, gate, inner, file=tmp_path / "known")
        for one in (gate, inner):
            one.authorize(host.key)
        chain = (f"{host.user}@{LOOPBACK}:{gate.port}", f"{host.user}@{LOOPBACK}:{inner.port}")
        assert await hello(replace(host.target, jump=chain, known_hosts=known)) == "hello"
        assert "Accepted publickey" in gate.log()
        assert "Accepted publickey" in inner.log()


async def test_proxyjump_of_the_configuration_is_followed_also_from_one_to_the_next(host: Sshd, tmp_path: Path) -> None:
    with sshd(tmp_path / "gate") as gate, sshd(tmp_path / "inner") as inner:
        known = known_hosts_of(host, gate, inner, file=tmp_path / "known")
        entries = []
        for name, one in (("gate", gate), ("inner", inner), ("dgx", host)):
            one.authorize(host.key)
            jump = {"gate": "", "inner": "  ProxyJump gate\n", "dgx": "  ProxyJump inner\n"}[name]
            entries.append(f"Host {name}\n  HostName {LOOPBACK}\n  Port {one.port}\n  User {host.user}\n{jump}")
        config = host.config("".join(entries) + f"Host *\n  IdentityFile {host.key}\n  UserKnownHostsFile {known}\n")
        assert await hello(Target(name="dgx", ssh_config=config)) == "hello"
        assert "Accepted publickey" in gate.log()
        around = Target(name="dgx", ssh_config=config, jump=("none",))
        before = gate.log().count("Accepted publickey")
        assert await hello(around) == "hello"
        assert gate.log().count("Accepted publickey") == before


async def test_a_jump_host_that_fails_is_named_and_so_is_the_host_behind_it(host: Sshd) -> None:
    error = await refusal(replace(host.target, jump=(f"{LOOPBACK}:{free_port()}",)))
    assert isinstance(error, HostUnreachableError)
    assert error.host == "here"
    assert f"{LOOPBACK}, the jump host of here" in error.message


async def test_a_host_that_its_jump_host_cannot_reach_is_told_from_the_jump_host(host: Sshd) -> None:
    gate = (f"{host.user}@{LOOPBACK}:{host.port}",)
    error = await refusal(replace(host.target, port=free_port(), jump=gate))
    assert isinstance(error, HostUnreachableError)
    assert error.message.startswith("here (")
    assert "cannot be reached from its jump host" in error.message


async def test_jump_hosts_that_lead_in_a_circle_are_an_error(host: Sshd) -> None:
    config = host.config(f"Host a\n  ProxyJump b\nHost b\n  ProxyJump a\nHost *\n  HostName {LOOPBACK}\n")
    error = await refusal(Target(name="a", ssh_config=config))
    assert isinstance(error, SpecError)
    assert "jump hosts" in error.message


async def test_a_jump_host_must_be_one(host: Sshd) -> None:
    error = await refusal(replace(host.target, jump=("user@:22",)))
    assert isinstance(error, SpecError)
    assert "'user@:22' is not a jump host" in error.message
