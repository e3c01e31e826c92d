"""One machine over SSH: scripts that are judged by their end, on a real sshd of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import psutil
import pytest
from anyio.abc import SocketAttribute, SocketStream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.sshd import Sshd, free_port, sshd
from support.waiting import wait_until

from raylaunch.errors import (
    HostError,
    HostLostError,
    HostStepError,
    HostTimeoutError,
    RaylaunchError,
    from_wire,
)
from raylaunch.ssh.host import SSHHost, machine
from raylaunch.ssh.scripts import OutputFrame, Script, assign, courier, quote
from raylaunch.ssh.target import PendingStep

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with sshd(tmp_path_factory.mktemp("sshd")) as served:
        yield served


@pytest.fixture(scope="module")
async def there(host: Sshd) -> AsyncIterator[SSHHost]:
    """One connection for the tests that leave it as it was."""
    async with machine(host.target) as opened:
        yield opened


def running(mark: str) -> list[psutil.Process]:
    """Return the processes that bear `mark` among their arguments."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if mark in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def sleeper(mark: str) -> Script:
    """A script that never ends by itself; its child bears `mark`, and says that it has started."""
    child = "import time; print('started', flush=True); time.sleep(600)"
    return Script(f"{quote(sys.executable, '-c', child, mark)}; echo after")


async def gone(mark: str) -> None:
    """Wait until no process bears `mark`."""
    await anyio.to_thread.run_sync(lambda: wait_until(lambda: not running(mark), 60, f"{mark} has ended"))


# What it printed, and how it ended


async def test_a_script_gets_its_input_and_its_output_comes_back_byte_for_byte(there: SSHHost) -> None:
    data = bytes(range(256)) * 2000 + b"no newline at the end"
    ran = await there.run(Script("cat; printf 'err\\n\\n' >&2"), input=data, limit_s=30)
    assert ran.status == 0
    assert ran.out == data
    assert ran.err == b"err\n\n"


async def test_a_failed_script_is_an_error_with_its_status_and_last_words(there: SSHHost) -> None:
    with pytest.raises(HostStepError) as caught:
        await there.run(Script("echo fine; echo 'no such wheel' >&2; exit 3", name="unpack"), limit_s=20)
    error = caught.value
    assert (error.host, error.step, error.exit_status, error.tail) == ("here", "unpack", 3, ("no such wheel",))
    assert str(error).startswith("here: unpack failed with exit status 3: no such wheel")


async def test_a_failed_script_is_just_a_status_to_whom_asks_for_that(there: SSHHost) -> None:
    assert (await there.run(Script("exit 3"), limit_s=20, check=False)).status == 3


@pytest.mark.parametrize("text", ["false; echo on", "false | true; echo on", "echo $nothing; echo on"])
async def test_a_script_stops_at_its_first_failure(there: SSHHost, text: str) -> None:
    ran = await there.run(Script(text), limit_s=20, check=False)
    assert ran.status != 0
    assert b"on" not in ran.out


async def test_words_on_stderr_are_no_failure(there: SSHHost) -> None:
    assert (await there.run(Script("echo warning: old locale >&2"), limit_s=20)).status == 0


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20), max_size=4)
)
async def test_words_arrive_as_they_are_whatever_is_in_them(there: SSHHost, words: list[str]) -> None:
    ran = await there.run(["printf", "%s\\0", *words], limit_s=20)
    assert ran.out == (b"".join(word.encode() + b"\0" for word in words) or b"\0")


async def test_variables_and_arguments_reach_the_script(there: SSHHost) -> None:
    script = Script('printf "%s|%s|%s" "$1" "$2" "$A"', args=("it's", "$HOME"))
    assert (await there.run(script, env={"A": 'x "y" $z'}, limit_s=20)).text == 'it\'s|$HOME|x "y" $z'


async def test_no_secret_of_a_script_is_in_a_list_of_processes(there: SSHHost) -> None:
    script = Script("secret=in-the-script; cat; ps -eo args")
    ran = await there.run(script, env={"TOKEN": "in-the-env"}, input=b"in-the-input\n", limit_s=20)
    listed = ran.text.removeprefix("in-the-input\n")
    assert "bash --noprofile" in listed
    for secret in ("in-the-script", "in-the-env", "in-the-input"):
        assert secret not in listed


async def test_files_that_a_script_makes_are_nobody_elses(there: SSHHost, tmp_path: Path) -> None:
    await there.run(["touch", str(tmp_path / "made")], limit_s=20)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o600


async def test_a_child_that_keeps_the_output_open_holds_nobody_up(there: SSHHost) -> None:
    mark = "mark-daemon"
    child = f"{quote(sys.executable)} -c 'import time; time.sleep(600)' {mark} &"
    try:
        ran = await there.run(Script(f"{child} echo done"), limit_s=300)
        assert ran.text == "done"
    finally:
        for process in running(mark):
            process.kill()


async def test_a_program_that_a_script_starts_can_be_interrupted(there: SSHHost) -> None:
    asked = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert (await there.run([sys.executable, "-c", asked], limit_s=60)).text == "True"


async def test_lines_come_as_they_are_printed_and_the_status_last(there: SSHHost) -> None:
    async with there.lines(Script("echo one; read -r x; echo $x; printf three; exit 4"), limit_s=60) as lines:
        seen = [line async for line in lines]
    assert seen[0] == b"one"
    assert lines.status in {1, 4}  # `read` at the end of an empty input fails
    async with there.lines(Script("echo one; echo; printf three; exit 4"), input=b"x\n", limit_s=60) as lines:
        seen = [line async for line in lines]
    assert seen == [b"one", b"", b"three"]
    assert lines.status == 4


async def test_a_line_is_there_before_the_script_has_ended(there: SSHHost, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    script = Script(f"echo waiting; until [ -e {flag} ]; do sleep 0.05; done; echo done")
    seen = []
    async with there.lines(script, limit_s=60) as lines:
        async for line in lines:
            seen.append(line)
            flag.touch()
    assert seen == [b"waiting", b"done"]


async def test_more_commands_at_once_than_a_connection_takes_wait_for_each_other(there: SSHHost) -> None:
    answers: list[str] = []

    async def one(number: int) -> None:
        answers.append((await there.run(["echo", str(number)], limit_s=60)).text)

    async with anyio.create_task_group() as group:
        for number in range(25):
            group.start_soon(one, number)
    assert sorted(answers, key=int) == [str(number) for number in range(25)]


async def test_a_host_that_allows_few_sessions_serves_them_in_turn(tmp_path: Path) -> None:
    with sshd(tmp_path, extra=["MaxSessions 2"]) as strict:
        async with machine(strict.target) as there:
            answers: list[str] = []

            async def one(number: int) -> None:
                answers.append((await there.run(["echo", str(number)], limit_s=60)).text)

            async with anyio.create_task_group() as group:
                for number in range(6):
                    group.start_soon(one, number)
            assert len(answers) == 6


# Limits


async def test_a_script_that_does_not_end_is_ended_there_and_an_error_here(there: SSHHost) -> None:
    with pytest.raises(HostTimeoutError, match="here: install did not end within 1 s") as caught:
        await there.run(sleeper("mark-limit"), limit_s=1, step="install")
    assert caught.value.step == "install"
    await gone("mark-limit")


async def test_a_script_that_ends_with_timeouts_own_status_before_its_limit_is_no_timeout(there: SSHHost) -> None:
    assert (await there.run(Script("exit 124"), limit_s=30, check=False)).status == 124


async def test_a_script_that_ignores_sigterm_is_killed(there: SSHHost) -> None:
    with pytest.raises(HostTimeoutError):
        await there.run(Script("trap '' TERM; while :; do sleep 1; done", args=("mark-stubborn",)), limit_s=1)
    await gone("mark-stubborn")


async def test_who_no_longer_wants_a_script_ends_it(there: SSHHost) -> None:
    async with there.lines(sleeper("mark-cancel"), limit_s=600) as lines:
        async for line in lines:
            assert line == b"started"
            break
    await gone("mark-cancel")
    with anyio.move_on_after(2):
        await there.run(sleeper("mark-cancel"), limit_s=600)
    await gone("mark-cancel")
    assert (await there.run(["echo", "fine"], limit_s=20)).text == "fine"


async def test_somebody_who_waits_is_told_how_long_already(host: Sshd) -> None:
    heard: list[PendingStep] = []
    async with machine(host.target, on_wait=heard.append) as there:
        with pytest.raises(HostTimeoutError):
            await there.run(Script("sleep 60", name="install"), limit_s=6)
    assert str(heard[0]) == "here: install: 5 s so far, at most 6 s"


# The connection goes away


async def test_a_lost_connection_is_an_error_not_a_success(tmp_path: Path) -> None:
    with sshd(tmp_path) as host:
        async with machine(host.target) as there:
            error = await lost(there, "mark-lost", host.drop)
            assert (error.host, error.step) == ("here", "install")
            assert error.message == "the connection to here was lost during: install"
            with pytest.raises(HostLostError, match="lost before"):
                await there.run(["true"], limit_s=20)
            with pytest.raises(HostLostError):
                await there.forward(0, "127.0.0.1", 1)
        await gone("mark-lost")


async def lost(there: SSHHost, mark: str, loses: Callable[[], None]) -> HostLostError:
    """Run a script, lose the connection when it has started, and return the error."""

    async def run() -> None:
        async with there.lines(sleeper(mark), limit_s=600, step="install") as lines:
            async for _ in lines:
                loses()

    with pytest.raises(HostLostError) as caught:
        await run()
    return caught.value


async def test_a_script_whose_client_was_killed_ends_too(host: Sshd, tmp_path: Path) -> None:
    client = tmp_path / "client.py"
    client.write_text(
        "import anyio, sys\n"
        "from pathlib import Path\n"
        "from raylaunch.ssh.host import Script, Target, machine\n"
        "async def main():\n"
        "    port, user, key, known, config, text = sys.argv[1:]\n"
        "    files = {'known_hosts': Path(known), 'ssh_config': Path(config)}\n"
        "    target = Target('here', '127.0.0.1', int(port), user, key, **files)\n"
        "    async with machine(target) as there, there.lines(Script(text), limit_s=600) as lines:\n"
        "        async for line in lines:\n"
        "            print(line.decode(), flush=True)\n"
        "anyio.run(main)\n"
    )
    target = host.target
    words = [str(target.port), target.user, target.key, str(target.known_hosts), str(target.ssh_config)]
    argv = [sys.executable, str(client), *words, sleeper("mark-killed").text]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)  # noqa: ASYNC220 -- it is to be killed, not awaited
    try:
        assert process.stdout is not None
        assert await anyio.to_thread.run_sync(process.stdout.readline) == b"started\n"
        assert running("mark-killed")
    finally:
        process.kill()
        process.communicate(timeout=20)
    await gone("mark-killed")


@pytest.mark.slow
async def test_an_sshd_that_hangs_in_the_middle_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raylaunch.ssh.connection._KEEPALIVE_S", 1)  # test_ssh_network waits as long as people do
    with sshd(tmp_path) as frozen:
        async with machine(frozen.target) as there:
            await lost(there, "mark-frozen", frozen.freeze)
    for process in running("mark-frozen"):
        process.kill()


# Shells that get in the way


@pytest.fixture
def noisy(tmp_path: Path) -> Iterator[tuple[Sshd, Path]]:
    """An sshd whose users' login shell reads a start-up file first."""
    startup = tmp_path / "startup"
    startup.write_text("")
    with sshd(tmp_path / "sshd", extra=[f"SetEnv BASH_ENV={startup}"]) as served:
        yield served, startup


async def test_a_noisy_login_shell_disturbs_nothing(noisy: tuple[Sshd, Path]) -> None:
    served, startup = noisy
    startup.write_text("echo Welcome; printf 'no newline'; echo warning >&2\n" + "echo 0123456789abcdef\n" * 2000)
    async with machine(served.target) as there:
        ran = await there.run(Script("cat; echo err >&2"), input=b"in", limit_s=30)
    assert (ran.out, ran.err) == (b"in", b"err\n")


async def test_a_login_shell_that_never_runs_the_command_is_quoted(noisy: tuple[Sshd, Path]) -> None:
    served, startup = noisy
    startup.write_text("echo 'This account is currently not available.'; exit 1\n")
    async with machine(served.target) as there:
        with pytest.raises(HostStepError) as caught:
            await there.run(["true"], limit_s=30, step="probe")
    assert "This account is currently not available." in caught.value.message
    assert "~/.bashrc" in caught.value.hint
    assert caught.value.exit_status == 1


# Ports


async def test_a_forwarded_port_carries_bytes_both_ways(there: SSHHost) -> None:
    async def echo(stream: SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send(data.upper())

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, echo)
        port = await there.forward(0, "127.0.0.1", listener.extra(SocketAttribute.local_port))  # noqa: S610 -- not Django's
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(b"hello")
            assert await stream.receive() == b"HELLO"
        group.cancel_scope.cancel()


async def test_a_port_that_is_taken_here_is_an_error(there: SSHHost, host: Sshd) -> None:
    with pytest.raises(HostError, match=f"cannot forward 127.0.0.1:{host.port}"):
        await there.forward(host.port, "127.0.0.1", free_port())


# Pure


@given(st.binary(max_size=200), st.integers(1, 7))
def test_a_frame_is_found_however_the_bytes_arrive(body: bytes, size: int) -> None:
    stream = b"noise\nrl-1 begin 42\n" + body + b"rl-1 end 3 9\nlate"
    frame = OutputFrame("rl-1")
    got = b"".join(frame.feed(stream[at : at + size]) for at in range(0, len(stream), size))
    assert got == body
    assert (frame.pid, frame.status, frame.seconds, frame.ended) == (42, 3, 9, True)
    assert frame.noise == b"noise"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_a_quoted_word_is_read_back_by_bash_as_it_was(word: str) -> None:
    text = f'{assign({"WORD": word})}\nprintf %s "$WORD" {quote(word)}'
    done = subprocess.run(["bash", "-c", text], capture_output=True, check=True, env={"PATH": os.environ["PATH"]})
    assert done.stdout == word.encode() * 2


def test_a_script_longer_than_a_pipe_arrives_whole() -> None:
    script = Script("".join(f": line {number}\n" for number in range(20_000)) + "echo end $1", args=("here",))
    sent = courier(script, nonce="rl-1", limit_s=60, env={})
    done = subprocess.run(["bash", "-s"], input=sent, capture_output=True, check=True, timeout=60)
    assert OutputFrame("rl-1").feed(done.stdout) == b"end here\n"


@pytest.mark.parametrize("kind", [HostError, *HostError.__subclasses__()])
def test_an_error_of_a_host_crosses_the_wire(kind: type[RaylaunchError]) -> None:
    again = from_wire(kind.code, "what", "next")
    assert type(again) is kind
    assert str(again) == "what\n  → next"
