"""How long a command takes from the shell to its answer, compared with Ray's own command line."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.measure import Result, compared, in_turns, seconds
from benchmarks.workshop import RAY, RAYLAUNCH, Workshop, run_program

_JOBS = 5
_ROUNDS = 9


def list_help(shop: Workshop) -> Iterator[Result]:
    """Measure what every command costs before it does anything; needs no cluster."""
    pairs = in_turns(
        lambda: seconds(partial(run_program, (*RAYLAUNCH, "list", "--help"), shop.environ)),
        lambda: seconds(partial(run_program, (*RAY, "job", "list", "--help"), shop.environ)),
        rounds=shop.rounds(_ROUNDS),
    )
    how = "Wall time of `raylaunch list --help`, a process from its start to its end."
    yield compared("list_help", pairs, unit="s", peer="`ray job list --help`", how=how)


def list_jobs(shop: Workshop) -> Iterator[Result]:
    """Measure the list of a cluster's jobs."""
    cluster = shop.cluster
    for _ in range(_JOBS):
        run_program((*RAYLAUNCH, "run", "--working-dir", "", "--", "true"), cluster.environ)
    pairs = in_turns(
        lambda: seconds(partial(run_program, (*RAYLAUNCH, "list"), cluster.environ)),
        lambda: seconds(partial(run_program, (*RAY, "job", "list"), cluster.ray_environ)),
        rounds=shop.rounds(_ROUNDS),
    )
    how = f"Wall time of `raylaunch list`, a process from its start to its end; the same cluster with {_JOBS} jobs."
    yield compared("list", pairs, unit="s", peer="`ray job list`", how=how)
