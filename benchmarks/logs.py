"""Logs: the end of a large one, and how soon a follower shows a line."""

from __future__ import annotations

import json
import secrets
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import psutil

from benchmarks.measure import Result, Skipped, compared, seconds
from benchmarks.workshop import PROGRAMS, RAY, RAYLAUNCH, Workshop, run_program

_LINE = 100
_LARGE, _SMALL = 1_000_000_000, 10_000_000
_MEMORY_FOR_LARGE = 14 * 2**30
_LESS = 250_000_000
"""Ray holds a log several times over in memory to show it: twelve times its size were seen over all processes."""
_TAIL = 1000
_ROUNDS = 5
_LINES, _FEW_LINES = 80, 40
_WRITE_S = 900.0
_FOLLOW_S = 120.0


def tail(shop: Workshop) -> Iterator[Result]:
    """Measure the end of a log of 1 GB, and Ray's only way to it: all of the log.

    Raises:
        Skipped: a job failed, or what was shown is not the end of its log.
    """
    cluster, size = shop.cluster, _SMALL if shop.quick else _LARGE
    peer_size = size if psutil.virtual_memory().available > _MEMORY_FOR_LARGE else min(size, _LESS)
    job, raw = _write_log(shop, size), _write_raw_log(shop, peer_size)
    last = f"{size // _LINE - 1:09} "
    shown = run_program((*RAYLAUNCH, "logs", "--tail", str(_TAIL), job), cluster.environ)
    if shown.count("\n") != _TAIL or not shown.splitlines()[-1].startswith(last):
        msg = f"raylaunch logs --tail {_TAIL} did not show the last {_TAIL} lines"
        raise Skipped(msg)
    ours = [
        seconds(partial(run_program, (*RAYLAUNCH, "logs", "--tail", str(_TAIL), job), cluster.environ))
        for _ in range(shop.rounds(_ROUNDS))
    ]
    theirs = seconds(partial(_read_all, (*RAY, "job", "logs", raw), cluster.ray_environ))
    ours += [
        seconds(partial(run_program, (*RAYLAUNCH, "logs", "--tail", str(_TAIL), job), cluster.environ))
        for _ in range(shop.rounds(_ROUNDS))
    ]
    run_program((*RAYLAUNCH, "rm", job), cluster.environ)
    of_peer = "" if peer_size == size else f", here of {peer_size / 1e6:.0f} MB, for lack of memory"
    how = (
        f"`raylaunch logs --tail {_TAIL}` of a log of {size / 1e9:g} GB, a process from its start to its end;"
        f" the peer's once{of_peer}."
    )
    pairs = [(one, theirs) for one in ours]
    yield compared("log_tail", pairs, unit="s", peer="`ray job logs`, which has no tail", how=how)


def followed_line(shop: Workshop) -> Iterator[Result]:
    """Measure how long after its writing a line comes out of a follower, both followers at once.

    Raises:
        Skipped: a follower showed no line.
    """
    cluster, lines = shop.cluster, _FEW_LINES if shop.quick else _LINES
    job = _submit(shop, "chatter.py", str(lines))
    raw = _submit_raw(shop, "chatter.py", str(lines))
    followers = (
        _Follower((*RAYLAUNCH, "logs", "--follow", job), cluster.environ),
        _Follower((*RAY, "job", "logs", "--follow", raw), cluster.ray_environ),
    )
    ours, theirs = (follower.ages() for follower in followers)
    how = (
        f"Median over {len(ours)} lines, each 0.1 to 0.4 s after the one before: from its writing until"
        " `raylaunch logs --follow`, a process, prints it."
    )
    figure, peer_figure = statistics.median(ours), statistics.median(theirs)
    yield Result("followed_line", figure, "s", how, peer="`ray job logs --follow`", peer_figure=peer_figure)


class _Follower:
    """A process that shows a log as it is written."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            env={**environ, "PYTHONUNBUFFERED": "1"},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._shown: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ages(self) -> list[float]:
        """Wait for its end; return how old each line was when it was shown, of those written since the first was.

        Raises:
            Skipped: there were none.
        """
        try:
            self._process.wait(_FOLLOW_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reader.join(_FOLLOW_S)
        shown = [(at, float(line.partition("written:")[2])) for at, line in self._shown if "written:" in line]
        ages = [at - written for at, written in shown if written > shown[0][0]]
        if not ages:
            msg = "a follower started after the last line"
            raise Skipped(msg)
        return ages

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._shown.append((time.time(), line))


def _write_log(shop: Workshop, size: int) -> str:
    """Run a job that writes a log of this size; return its id once all of the log is in the store."""
    job = _submit(shop, "large_log.py", str(size // _LINE))
    run_program((*RAYLAUNCH, "wait", job), shop.cluster.environ, limit_s=_WRITE_S)
    return job


def _write_raw_log(shop: Workshop, size: int) -> str:
    """Run a raw Ray job that writes a log of this size."""
    raw = _submit_raw(shop, "large_log.py", str(size // _LINE))
    deadline = time.monotonic() + _WRITE_S
    while time.monotonic() < deadline:
        if "SUCCEEDED" in run_program((*RAY, "job", "status", raw), shop.cluster.ray_environ).upper():
            return raw
    msg = f"the raw job {raw} did not write its log"
    raise Skipped(msg)


def _submit(shop: Workshop, program: str, *arguments: str) -> str:
    command = ("python", str(PROGRAMS / program), *arguments)
    answer = run_program((*RAYLAUNCH, "submit", "--json", "--working-dir", "", "--", *command), shop.cluster.environ)
    return str(json.loads(answer)["job"]["id"])


def _submit_raw(shop: Workshop, program: str, *arguments: str) -> str:
    command = (sys.executable, str(PROGRAMS / program), *arguments)
    name = f"raw-{secrets.token_hex(4)}"
    run_program((*RAY, "job", "submit", "--no-wait", "--submission-id", name, "--", *command), shop.cluster.ray_environ)
    return name


def _read_all(command: Sequence[str], environ: Mapping[str, str]) -> None:
    """Run a program that prints very much, and throw that away."""
    subprocess.run(command, env=dict(environ), cwd="/", stdout=subprocess.DEVNULL, timeout=_WRITE_S, check=True)
