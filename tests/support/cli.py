"""``raylaunch`` and ``raylaunch-mcp`` without the start of an interpreter: a process that has imported them forks.

Each call has its own arguments, environment, working folder, streams and exit status, as a fresh process has; it costs
a tenth of the processor time. What the interpreter itself does (``PYTHONPATH``, encodings, signals while it starts) is
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
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

_BLOCK = 1 << 16
_PROGRAMS = {
    "raylaunch": ("raylaunch.cli", "raylaunch.client.client", "asyncssh", "rich.console", "rich.progress"),
    "raylaunch-mcp": ("mcp_server.server", "mcp.server.stdio", "raylaunch.client.client"),
}
"""By name: the module whose ``main`` it is, and what it imports while it runs."""


def run_cli(  # noqa: PLR0913 -- all but the first are named
    words: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    text: str = "",
    timeout_s: float = 60,
    python: str = sys.executable,
) -> subprocess.CompletedProcess[str]:
    """Run ``raylaunch WORDS`` to its end.

    Args:
        words: the command and its options.
        cwd: the working folder.
        env: the whole environment.
        text: what it reads from stdin.
        timeout_s: after which it is killed.
        python: an interpreter with another raylaunch, which is started then, as it is for another ``PYTHONPATH``.

    Raises:
        subprocess.TimeoutExpired: it was killed.
    """
    if python != sys.executable or env.get("PYTHONPATH") != os.environ.get("PYTHONPATH"):
        return subprocess.run(
            [python, "-m", "raylaunch", *words],
            cwd=cwd,
            env=env,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    inputs, outputs, errors = os.pipe(), os.pipe(), os.pipe()
    ours, theirs = (inputs[1], outputs[0], errors[0]), (inputs[0], outputs[1], errors[1])
    try:
        server = _ask(_server("raylaunch"), theirs, words, str(cwd), env)
    finally:
        for descriptor in theirs:
            os.close(descriptor)
    with server, open(ours[0], "wb") as stdin, open(ours[1], "rb") as out, open(ours[2], "rb") as err:  # noqa: PTH123
        stdin.write(text.encode())
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        read = _read_all((out.fileno(), err.fileno(), server.fileno()), timeout_s)
    if read is None:
        raise subprocess.TimeoutExpired(["raylaunch", *words], timeout_s)
    printed, complaints, status = (data.decode(errors="replace") for data in read)
    return subprocess.CompletedProcess(["raylaunch", *words], int(status), printed, complaints)


def forked(program: str) -> list[str]:
    """Return a command line that is the program: a small process lends its streams to a fork, and ends with it."""
    return [sys.executable, "-I", "-S", __file__, "lend", _server(program)]


def _ask(address: str, streams: Sequence[int], words: Sequence[str], cwd: str, env: Mapping[str, str]) -> socket.socket:
    """Ask for a fork with these streams; return a socket that brings its exit status. It is killed when that closes."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    socket.send_fds(server, [b"."], streams)
    server.sendall(json.dumps({"words": list(words), "cwd": cwd, "env": dict(env)}).encode() + b"\n")
    return server


def _read_all(descriptors: Sequence[int], timeout_s: float) -> list[bytes] | None:
    """Read each to its end; None when that takes longer."""
    read = {descriptor: bytearray() for descriptor in descriptors}
    limit = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for descriptor in descriptors:
            selector.register(descriptor, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, limit - time.monotonic()))
            if not ready:
                return None
            for key, _ in ready:
                block = os.read(key.fd, _BLOCK)
                read[key.fd] += block
                if not block:
                    selector.unregister(key.fd)
    return [bytes(data) for data in read.values()]


@functools.cache
def _server(program: str) -> str:
    """Start what forks; return its socket's path. It ends when this process does."""
    folder = tempfile.mkdtemp(prefix="rl-fork-", dir="/tmp")
    address = f"{folder}/socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", program, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            env={name: value for name, value in os.environ.items() if not name.startswith(("RAYLAUNCH_", "RAY_"))},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def end() -> None:
        assert server.stdin is not None
        server.stdin.close()
        server.wait(10)

    atexit.register(end)
    return address


# -- in the process that forks ----------------------------------------------------------------------------------------


def _serve(program: str, listener: socket.socket) -> None:
    """Fork for each connection, until stdin closes."""
    main, *others = _PROGRAMS[program]
    package = importlib.import_module(main)
    commands = (f"{main}.{module.name}" for module in pkgutil.iter_modules(getattr(package, "__path__", ())))
    for name in (*commands, *others):
        importlib.import_module(name)
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps what has reported
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _watch(program, client)
        client.close()
    shutil.rmtree(Path(listener.getsockname()).parent)


def _watch(program: str, client: socket.socket) -> NoReturn:
    """Run the program in a child, kill it when the client closes, and report its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile("rb") as lines:
        request = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        client.close()
        _become(program, streams, request["words"], request["cwd"], request["env"])
    for descriptor in streams:
        os.close(descriptor)

    def kill_if_closed() -> None:
        if client.recv(1) == b"":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill_if_closed, daemon=True).start()
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(program: str, streams: Sequence[int], words: Sequence[str], cwd: str, env: Mapping[str, str]) -> NoReturn:
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    sys.argv[:] = [program, *words]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 -- it stays open to the end
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        importlib.import_module(_PROGRAMS[program][0]).main()
        status: object = 0
    except SystemExit as ended:
        status = ended.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else status is not None)  # to take down all modules costs as much again


def _lend(address: str, *words: str) -> int:
    """Be a program that runs elsewhere: lend it these streams, and return its exit status."""
    with _ask(address, (0, 1, 2), words, str(Path.cwd()), os.environ) as server:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(nowhere, stream)
        status = int(server.recv(16))
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        del sys.path[0]  # the folder of this file, whose modules are no part of the program
        _serve(sys.argv[2], socket.socket(fileno=int(sys.argv[3])))
    else:
        sys.exit(_lend(*sys.argv[2:]))
