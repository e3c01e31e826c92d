"""Starting a lane (`raylaunch.cluster.reach.lane`), and talking to it: orders and answers, a line each."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from raylaunch.cluster.client_record import load_client, load_tunnel, tunnel_log
from raylaunch.cluster.home import cluster_paths
from raylaunch.cluster.ports import LOOPBACK
from raylaunch.cluster.ray_head import clean_environment
from raylaunch.cluster.ssh.words import to_port

_END_S = 3.0


class Lane:
    """A lane that was started."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def answers(self) -> AsyncIterator[tuple[str, int, str]]:
        """Yield what it says: a word, a number (0 where there is none) and the rest. It ends with the lane."""
        assert self._process.stdout is not None  # noqa: S101 -- it is a pipe
        async for line in self._process.stdout:
            word, _, rest = line.decode().strip().partition(" ")
            number, _, text = rest.partition(" ")
            yield word, int(number or 0), text

    def order(self, offset: int, length: int) -> None:
        """Ask for a range."""
        self.say(f"{offset} {length}")

    def finish(self) -> None:
        """Say that nothing more is wanted."""
        assert self._process.stdin is not None  # noqa: S101 -- it is a pipe
        self._process.stdin.close()

    def say(self, line: str) -> None:
        """Write a line to it; one that has gone away says so by its answers' end."""
        assert self._process.stdin is not None  # noqa: S101 -- it is a pipe
        self._process.stdin.write(f"{line}\n".encode())


def installed_ssh(cluster: str) -> tuple[str, ...]:
    """Return the command of the `ssh` that is installed, to the cluster's head, as the tunnel has found it."""
    tunnel = load_tunnel(cluster_paths(cluster))
    return tunnel.openssh if tunnel and tunnel.up else ()


@asynccontextmanager
async def started_lane(cluster: str, url: str, part: Path, size: int) -> AsyncIterator[Lane]:
    """Start a lane for one file, whose part is an absolute path, and yield it; at the end it is ended.

    Raises:
        OSError: there is no process to be had.
    """
    paths = cluster_paths(cluster)
    client, tunnel, words = load_client(paths), load_tunnel(paths), installed_ssh(cluster)
    if client is None:
        msg = f"cluster {cluster} is not known on this machine any more"
        raise ProcessLookupError(msg)
    pipe = to_port(words, LOOPBACK, tunnel.head_ports["controller"]) if tunnel and words else ()
    env = clean_environment(os.environ, paths)
    env |= {key: os.environ[key] for key in ("SSH_AUTH_SOCK",) if key in os.environ}
    argv = (sys.executable, "-m", "raylaunch.cluster.reach.lane", cluster)
    with tunnel_log(paths).open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=PIPE, stdout=PIPE, stderr=log, env=env, cwd="/", start_new_session=True
        )
    try:
        lane = Lane(process)
        lane.say(json.dumps({"url": url, "part": str(part), "size": size, "token": client.token, "openssh": pipe}))
        yield lane
    finally:
        await asyncio.shield(end_program(process))


async def end_program(process: Process) -> None:
    """End a program and wait until it has: asked to first, and killed some seconds later."""
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _END_S)
    except asyncio.TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
