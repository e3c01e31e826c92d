"""The way to a host: keys, configuration, jump hosts; and the words for each that fails."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import pytest
from support.laptop import Person, agent, empty_laptop, hello, program, refusal
from support.sshd import LOOPBACK, Sshd, free_port, make_key, sshd

from raylaunch.errors import HostAuthError, HostUnreachableError, SpecError
from raylaunch.ssh.host import machine
from raylaunch.ssh.target import Target

pytestmark = pytest.mark.anyio

PASSPHRASE = "sesame"  # noqa: S105 -- of a key that lives for one test


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd")) as served:
        yield served


@pytest.fixture(autouse=True)
def laptop(host: Sshd, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_laptop(host, monkeypatch)


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
    assert "Wrong" in person.asked[1].text


async def test_a_passphrase_is_asked_for_once_for_all_hosts(host: Sshd, tmp_path: Path) -> None:
    locked = make_key(tmp_path / "locked", passphrase=PASSPHRASE)
    host.authorize(locked)
    person = Person(PASSPHRASE)
    target = replace(host.target, key=str(locked))
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(partial(hello, target, on_prompt=person))
    assert await hello(target) == "hello"
    assert len(person.asked) == 1


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
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

    with socket.create_server((LOOPBACK, 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        error = await refusal(replace(host.stranger, port=server.getsockname()[1]))
        server.shutdown(socket.SHUT_RDWR)
        thread.join(20)
    assert isinstance(error, HostUnreachableError)
    assert "closed the connection before the log-in" in error.message


async def test_a_host_that_is_busy_with_other_log_ins_is_asked_again(tmp_path: Path) -> None:
    answers: list[str] = []
    with sshd(tmp_path, extra=["MaxStartups 2:100:2"]) as busy:
        target = busy.target

        async def one() -> None:
            answers.append(await hello(target))

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(one)
        assert "MaxStartups" in busy.log()  # it did hang up on some
    assert answers == ["hello"] * 5


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
