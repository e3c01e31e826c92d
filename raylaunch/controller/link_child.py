"""The link's child as a process: the log of what it says, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from raylaunch.log_rotation import rotate

_CLOSE_S = 5.0


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[int]:
    """Open the log that the child's stderr goes to."""
    rotate(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


async def end(child: asyncio.subprocess.Process) -> None:
    """End the child: closing its stdin asks it, SIGKILL after a while makes it."""
    if child.stdin is not None:
        child.stdin.close()
    try:
        await asyncio.wait_for(child.wait(), _CLOSE_S)
    except asyncio.TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def child_command(module: str) -> list[str]:
    """Return the command line of a program of this package, by which no user's folder gets onto its ``sys.path``."""
    root = str(Path(__file__).resolve().parents[2])
    start = f"import sys, runpy; sys.path.append({root!r}); runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-I", "-c", start]


def child_environment(base: Mapping[str, str], ray_token_path: Path, ray_env: Mapping[str, str]) -> dict[str, str]:
    """Return the child's environment: `base` with this Ray's token file and certificate, and no other Ray's.

    A file with nothing in it belongs to a Ray that asks for no token.
    """
    kept = {name: value for name, value in base.items() if name not in {"RAY_ADDRESS", "RAY_AUTH_TOKEN"}}
    asks = not ray_token_path.is_file() or ray_token_path.stat().st_size > 0
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(ray_token_path)}
    return {
        **kept,
        **(token if asks else {"RAY_AUTH_MODE": "disabled"}),
        **ray_env,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }
