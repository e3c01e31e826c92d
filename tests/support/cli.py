"""The command ``raylaunch`` without the start of an interpreter: a process that has imported it forks for each call.

A call has its own arguments, environment, working folder, streams and exit status, as a fresh process has; it costs a
tenth of the processor time. What the interpreter itself does (``PYTHONPATH``, encodings, signals while it starts) is
tested with real ones.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

_BLOCK = 1 << 16
_PRELOADED = ("asyncssh", "raylaunch.client", "rich.console", "rich.progress")
"""What commands import while they run."""


def run_cli(
    words: Sequence[str], *, cwd: Path, env: Mapping[str, str], text: str = "", timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run ``raylaunch WORDS`` to its end.

    Args:
        words: the command and its options.
        cwd: the working folder.
        env: the whole environment.
        text: what it reads from stdin.
        timeout_s: after which it is killed.

    Raises:
        subprocess.TimeoutExpired: it was killed.
    """
    ours, theirs = socket.socketpair()
    inputs, outputs, errors = os.pipe(), os.pipe(), os.pipe()
    try:
        socket.send_fds(_server(), [b"."], [inputs[0], outputs[1], errors[1], theirs.fileno()])
    finally:
        theirs.close()
        for descriptor in (inputs[0], outputs[1], errors[1]):
            os.close(descriptor)
    with ours, open(inputs[1], "wb") as stdin, open(outputs[0], "rb") as out, open(errors[0], "rb") as err:  # noqa: PTH123
        request = {"words": list(words), "cwd": str(cwd), "env": dict(env)}
        ours.sendall(json.dumps(request).encode() + b"\n")
        stdin.write(text.encode())
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        printed, complaints, told = _read_all((out.fileno(), err.fileno(), ours.fileno()), words, timeout_s)
    status = int(told.split()[1])
    return subprocess.CompletedProcess(
        ["raylaunch", *words], status, printed.decode(errors="replace"), complaints.decode(errors="replace")
    )


def _read_all(descriptors: Sequence[int], words: Sequence[str], timeout_s: float) -> list[bytes]:
    """Read each to its end; the last one's first line is the pid of what is killed after the time."""
    read = {descriptor: bytearray() for descriptor in descriptors}
    limit = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, limit - time.monotonic()))
            if not ready:
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(int(read[descriptors[-1]].split()[0]), signal.SIGKILL)
                raise subprocess.TimeoutExpired(["raylaunch", *words], timeout_s)
            for key, _ in ready:
                block = os.read(key.fd, _BLOCK)
                read[key.fd] += block
                if not block:
                    selector.unregister(key.fd)
    return [bytes(block) for block in read.values()]


@functools.cache
def _server() -> socket.socket:
    """Start what forks. It ends when this process does."""
    ours, theirs = socket.socketpair()
    with theirs:
        server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={name: value for name, value in os.environ.items() if not name.startswith(("RAYLAUNCH_", "RAY_"))},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def end() -> None:
        ours.close()
        server.wait(10)

    atexit.register(end)
    return ours


def _serve(channel: socket.socket) -> None:
    """Fork for each message, which brings stdin, stdout, stderr and a socket for the request and the status."""
    _import_commands()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps what has reported
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1, 4)
        if not message:
            return
        if os.fork() == 0:
            channel.close()
            _report(descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _import_commands() -> None:
    import raylaunch.cli  # noqa: PLC0415 -- in the server only

    commands = (f"raylaunch.cli.{module.name}" for module in pkgutil.iter_modules(raylaunch.cli.__path__))
    for name in (*commands, *_PRELOADED):
        importlib.import_module(name)


def _report(descriptors: Sequence[int]) -> NoReturn:
    """Run one command in a child; report its pid, and its exit status once it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, number = descriptors
    with socket.socket(fileno=number) as report:
        with report.makefile("rb") as lines:
            request = json.loads(lines.readline())
        pid = os.fork()
        if pid == 0:
            report.close()
            _become(streams, request)
        for descriptor in streams:
            os.close(descriptor)
        report.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        report.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(streams: Sequence[int], request: Mapping[str, object]) -> NoReturn:
    """Be the command."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    words, cwd, env = request["words"], request["cwd"], request["env"]
    assert isinstance(words, list)
    assert isinstance(cwd, str)
    assert isinstance(env, dict)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    sys.argv[:] = ["raylaunch", *words]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 -- it stays open to the end
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    from raylaunch.cli import main  # noqa: PLC0415 -- in the server only

    try:
        main()
    except SystemExit as ended:  # leave at once: to take down what the server imported costs as much as a command
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file, whose modules are no part of the command
    _serve(socket.socket(fileno=int(sys.argv[1])))
