"""Which hosts are trusted: known ones, pinned ones, vouched-for ones, accepted ones; never a changed one."""

from __future__ import annotations

import re
import shlex
import stat
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import pytest
from support.laptop import Person, empty_laptop, hello, program, refusal
from support.sshd import LOOPBACK, Sshd, fingerprint, make_key, sshd

from raylaunch.errors import HostKeyError, SpecError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd"), kinds=("ed25519", "ecdsa", "rsa")) as served:
        yield served


@pytest.fixture(autouse=True)
def laptop(host: Sshd, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_laptop(host, monkeypatch)


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


async def test_a_person_is_asked_once_about_a_host_that_is_connected_to_many_times_at_once(
    host: Sshd, tmp_path: Path
) -> None:
    person = Person("yes")
    target = replace(host.target, known_hosts=tmp_path / "known_hosts")
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(partial(hello, target, on_prompt=person))
    assert len(person.asked) == 1


async def test_a_host_that_a_person_did_not_accept_gets_no_key_of_hers(host: Sshd) -> None:
    before = host.log().count("Accepted publickey")
    error = await refusal(host.stranger, on_prompt=Person("no"))
    assert isinstance(error, HostKeyError)
    assert host.log().count("Accepted publickey") == before


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_pinned_fingerprint_of_any_of_its_keys_makes_a_host_known(host: Sshd, number: int) -> None:
    assert await hello(replace(host.stranger, fingerprint=fingerprint(host.host_keys[number]))) == "hello"


async def test_a_host_that_shows_another_key_than_the_pinned_one_is_refused(host: Sshd) -> None:
    pinned = "SHA256:" + "A" * 43
    error = await refusal(replace(host.stranger, fingerprint=pinned), on_prompt=Person())
    assert isinstance(error, HostKeyError)
    assert error.known == (pinned,)
    assert fingerprint(host.host_keys[0]) in error.message


async def test_a_pinned_fingerprint_does_not_replace_a_key_that_is_known(host: Sshd, tmp_path: Path) -> None:
    target, old = host.target, make_key(tmp_path / "old")
    host.trust(keys=[old])
    error = await refusal(replace(target, fingerprint=fingerprint(host.host_keys[0])), on_prompt=Person())
    assert isinstance(error, HostKeyError)
    assert error.known == (fingerprint(old),)
    assert fingerprint(host.host_keys[0]) in error.message
    assert "ssh-keygen -R" in error.hint


@pytest.mark.parametrize("known", [0, 1])
async def test_a_pinned_fingerprint_of_a_host_that_is_known_is_taken_if_it_has_both_keys(
    host: Sshd, known: int
) -> None:
    target = replace(host.target, fingerprint=fingerprint(host.host_keys[0]))
    host.trust(keys=[host.host_keys[known]])
    assert await hello(target) == "hello"


async def test_a_pinned_fingerprint_does_not_replace_a_revocation(host: Sshd) -> None:
    target, lines = host.target, host.known_hosts.read_text()
    host.known_hosts.write_text("".join(f"@revoked {line}\n" for line in lines.splitlines()))
    error = await refusal(replace(target, fingerprint=fingerprint(host.host_keys[0])), on_prompt=Person())
    assert isinstance(error, HostKeyError)
    assert "revoked" in error.message


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


async def test_a_revoked_key_of_an_unknown_host_is_asked_of_nobody(host: Sshd) -> None:
    target, lines = host.target, host.known_hosts.read_text()
    host.known_hosts.write_text("".join(f"@revoked {line}\n" for line in lines.splitlines()))
    person = Person("yes")
    error = await refusal(target, on_prompt=person)
    assert isinstance(error, HostKeyError)
    assert "revoked" in error.message
    assert not person.asked


async def test_a_broken_line_in_known_hosts_vouches_for_nobody_and_stops_nothing(host: Sshd) -> None:
    target = host.target
    host.known_hosts.write_text("nonsense\n" + host.known_hosts.read_text())
    assert await hello(target) == "hello"
    host.known_hosts.write_text("@revoked nonsense\n" + host.known_hosts.read_text())
    error = await refusal(target)
    assert isinstance(error, SpecError)
    assert error.where == f"{host.known_hosts}:1"
