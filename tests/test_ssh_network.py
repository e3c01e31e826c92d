"""One machine over SSH, on a network that fails: cut links, hosts without power, full disks, jump hosts that matter."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from support import fittings
from support.host import Host
from support.hosts import World, world
from support.waiting import wait_until

from raylaunch.errors import HostLostError, HostStorageError, HostUnreachableError
from raylaunch.ssh.host import SSHHost, machine
from raylaunch.ssh.process import RemoteLines
from raylaunch.ssh.push import PushFile, push
from raylaunch.ssh.scripts import Script
from raylaunch.ssh.target import Target

pytestmark = [pytest.mark.machines, pytest.mark.anyio]

MB = 1_000_000


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def lab() -> Iterator[World]:
    """A gate, a host behind it, and one with a small disk."""
    with world() as made:
        made.host("gate", networks=("front", "back"))
        made.host("inner", networks=("back",), jump="gate")
        made.host("small", disk_mib=48)
        yield made


@pytest.fixture(autouse=True)
def laptop(lab: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(lab.home))
    monkeypatch.setenv("RAYLAUNCH_HOME", str(lab.home / ".raylaunch"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture
async def there(lab: World) -> AsyncIterator[SSHHost]:
    async with machine(lab.hosts[0].target()) as opened:
        yield opened


async def in_thread(act: object) -> None:
    """Do something to a host without holding up the connection to it."""
    assert callable(act)
    await anyio.to_thread.run_sync(act)


async def first(lines: RemoteLines) -> bytes:
    """Return the first line; the rest can still be read."""
    async for line in lines:
        return line
    raise AssertionError


@pytest.mark.slow
@pytest.mark.long
async def test_a_link_that_is_cut_in_the_middle_is_noticed() -> None:
    with world(1) as own:
        host = own.hosts[0]

        async def run() -> None:
            async with machine(host.target()) as there, there.lines(Script("echo on; sleep 600"), limit_s=900) as lines:
                async for _ in lines:
                    await in_thread(host.cut)

        with pytest.raises(HostLostError, match="the connection to h1 was lost during: a script"):
            await run()


@pytest.mark.long
async def test_a_link_that_comes_back_soon_interrupts_nothing(lab: World, there: SSHHost) -> None:
    host = lab.hosts[0]
    script = Script("echo on; for i in 1 2 3 4 5 6; do sleep 1; echo $i; done")
    async with there.lines(script, limit_s=60) as lines:
        assert await first(lines) == b"on"
        await in_thread(host.cut)
        await anyio.sleep(3)
        await in_thread(host.restore)
        assert [line async for line in lines] == [b"1", b"2", b"3", b"4", b"5", b"6"]
        assert lines.status == 0


@pytest.mark.slow
async def test_a_push_over_a_link_that_was_cut_is_completed_over_the_next_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raylaunch.ssh.connection._KEEPALIVE_S", 1)
    wheel = tmp_path / "big.whl"
    wheel.write_bytes(bytes(range(256)) * (70 * MB // 256))
    with world(1) as own:
        host = own.hosts[0]
        far = host.path("/root/wheels")

        async def pushing() -> None:
            async with machine(host.target()) as there:
                await push(there, [PushFile(wheel, "~/wheels/big.whl")], limit_bytes_per_s=40 * MB)

        async def cut() -> None:
            await anyio.to_thread.run_sync(wait_until, lambda: list(far.glob("*.ranges")), 60, "a range has arrived")
            await in_thread(host.cut)

        async with anyio.create_task_group() as group:
            group.start_soon(cut)
            with pytest.raises(HostLostError):
                await pushing()
        assert not (far / "big.whl").exists()
        host.restore()
        reported: list[int] = []
        async with machine(host.target()) as there:
            await push(there, [PushFile(wheel, "~/wheels/big.whl")], on_bytes=reported.append)
        assert reported[0] > 0
        assert (far / "big.whl").read_bytes() == wheel.read_bytes()


@pytest.mark.long
async def test_a_host_that_is_down_is_not_waited_for_beyond_the_limit() -> None:
    with world(1) as own:
        target = own.hosts[0].target()
        own.hosts[0].power_off()
        with pytest.raises(HostUnreachableError) as caught:
            async with machine(target, limit_s=2):
                pass
    assert caught.value.host == "h1"
    assert "h1 (10.77." in caught.value.message
    assert "is it on" in caught.value.hint


@pytest.mark.long
async def test_a_jump_host_is_the_only_way_and_is_named_when_it_is_gone() -> None:
    with world() as own:
        gate = own.host("gate", networks=("front", "back"))
        inner = own.host("inner", networks=("back",), jump="gate")
        async with machine(inner.target()) as there:
            assert (await there.run(["hostname"], limit_s=20)).text == "inner"
        inner.power_off()
        with pytest.raises(HostUnreachableError) as caught:
            async with machine(inner.target(), limit_s=10):
                pass
        assert caught.value.message.startswith("inner (")
        gate.power_off()
        with pytest.raises(HostUnreachableError) as caught:
            async with machine(inner.target(), limit_s=2):
                pass
        assert "gate, the jump host of inner" in caught.value.message
        assert caught.value.host == "inner"


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="needs IPv6")
@pytest.mark.long
async def test_a_host_is_reached_by_its_ipv6_address(lab: World) -> None:
    target = Target("six", lab.hosts[0].address6, user="root", key=str(lab.key), known_hosts=lab.known_hosts)
    async with machine(target) as there:
        assert (await there.run(["hostname"], limit_s=20)).text == "gate"


@pytest.mark.long
async def test_a_full_disk_is_said_to_be_full_with_what_is_free(lab: World) -> None:
    host = lab.hosts[2]
    fittings.fill_disk(host, but_mib=8)
    async with machine(host.target()) as there:
        with pytest.raises(HostStorageError) as caught:
            await push(there, [PushFile(bytes(20 * MB), "~/wheels/big.whl")], step="push wheels")
    assert "small: the disk is full (push wheels)" in caught.value.message
    assert "No space left on device" in caught.value.message
    assert not host.path("/root/wheels/big.whl").exists()


@pytest.fixture
def alice(lab: World) -> Iterator[Host]:
    host = lab.hosts[0]
    if "alice" not in host.users:
        fittings.add_user(host, "alice")
    yield host
    host.run("usermod -s /bin/bash alice")


@pytest.mark.long
async def test_an_ordinary_user_is_told_where_she_may_not_write(alice: Host) -> None:
    async with machine(alice.target("alice")) as there:
        with pytest.raises(HostStorageError, match="Permission denied"):
            await push(there, [PushFile(b"x", "/root/x")])
        await push(there, [PushFile(b"x", "~/x")])
    assert alice.out("stat -c '%U %a' /home/alice/x") == "alice 600"


@pytest.mark.long
async def test_start_up_files_that_print_disturb_nothing(alice: Host) -> None:
    fittings.noisy_shell(alice, "alice")
    async with machine(alice.target("alice")) as there:
        ran = await there.run(Script("cat"), input=b"exactly this", limit_s=20)
        await push(there, [PushFile(b"exactly this", "~/this")])
        arrived = await there.run(["cat", "/home/alice/this"], limit_s=20)
    assert (ran.out, ran.err) == (b"exactly this", b"")
    assert arrived.out == b"exactly this"


SHELLS = ("/bin/sh", "/bin/zsh", "/usr/bin/fish", "/bin/tcsh")


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if Path(shell).exists()])
@pytest.mark.long
async def test_any_login_shell_will_do(alice: Host, shell: str) -> None:
    alice.run(f"usermod -s {shell} alice")
    async with machine(alice.target("alice")) as there:
        ran = await there.run(Script("echo ${BASH_VERSION:+bash} $1", args=("it's",)), limit_s=20)
    assert ran.text == "bash it's"


@pytest.mark.long
async def test_a_shell_that_lets_nobody_in_is_quoted(alice: Host) -> None:
    alice.run("usermod -s /usr/sbin/nologin alice")
    async with machine(replace(alice.target("alice"), name="spark", host=alice.name)) as there:
        with pytest.raises(Exception, match="This account is currently not available") as caught:
            await there.run(["true"], limit_s=20)
    assert str(caught.value).startswith("spark: the login shell did not run what it was sent")


@pytest.mark.long
async def test_a_long_link_costs_time_and_nothing_else(lab: World) -> None:
    host = lab.hosts[0]
    host.slow(rtt_ms=50)
    try:
        async with machine(host.target()) as there:
            await push(there, [PushFile(bytes(4 * MB), "~/zeros")])
            assert (await there.run(["stat", "-c", "%s", "/root/zeros"], limit_s=20)).text == str(4 * MB)
    finally:
        host.fast()
