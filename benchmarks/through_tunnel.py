"""What the tunnel costs: the same verbs from elsewhere, over SSH, and on the head, where the controller is."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator, Mapping
from functools import partial

from benchmarks.hosts import head_here, known
from benchmarks.measure import Result, in_turns, seconds
from benchmarks.workshop import RAYLAUNCH, Workshop, run_program

_ROUNDS = 15


def run(shop: Workshop) -> Iterator[Result]:
    """Measure verbs on a cluster of this machine, once directly and once through an sshd of this machine."""
    cluster = shop.cluster
    job = run_program((*RAYLAUNCH, "submit", "--working-dir", "", "--", "echo here"), cluster.environ).strip()
    run_program((*RAYLAUNCH, "wait", job), cluster.environ)
    verbs = (("list",), ("show", job), ("logs", job), ("status",), ("submit", "--working-dir", "", "--", "true"))
    folder = shop.home("tunnel")
    folder.mkdir()
    try:
        with head_here(folder / "sshd") as host:
            environ = {**shop.environ, "RAYLAUNCH_HOME": str(folder / "home"), "HOME": str(host.home)}
            port = int(cluster.reach.url.rpartition(":")[2])
            with known(environ, host, controller=port, token=cluster.reach.token):
                run_program((*RAYLAUNCH, "--cluster", "test", "list"), environ)  # the tunnel is up before
                found = [_pair(shop, verb, environ, cluster.environ) for verb in verbs]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    words, ours, theirs = max(found, key=lambda one: one[1] - one[2])
    how = (
        f"Wall time of a command, medians of {shop.rounds(_ROUNDS)}; of {', '.join(verb[0] for verb in verbs)} the one "
        f"to which the tunnel adds most, {words}."
    )
    yield Result("tunnel_verb", ours, "ms", how, peer="the same on the head", peer_figure=theirs)


def _pair(
    shop: Workshop, verb: tuple[str, ...], there: Mapping[str, str], here: Mapping[str, str]
) -> tuple[str, float, float]:
    """Return the verb's name, and what it takes through the tunnel and on the head, milliseconds."""
    pairs = in_turns(
        lambda: 1000 * seconds(partial(run_program, (*RAYLAUNCH, "--cluster", "test", *verb), there)),
        lambda: 1000 * seconds(partial(run_program, (*RAYLAUNCH, *verb), here)),
        rounds=shop.rounds(_ROUNDS),
    )
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return verb[0], ours, theirs
