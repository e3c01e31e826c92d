"""`raylaunch up`: on fresh hosts, compared with `ray up` on the same; and on a healthy cluster.

The hosts have this machine's Python with Ray in it, as a shared environment that both use: what is compared
is the start of a cluster, not the installation.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.hosts import Host, Laptop, World, lab, this_python
from benchmarks.measure import Result, Skipped, compared, seconds
from benchmarks.workshop import Workshop

_UP_S, _DOWN_S = 300.0, 120.0
_PATIENCE_S = 90.0
"""How long we wait until the peer's second node is listed: twice what it takes for its first."""
_LOOK_S = 1.0
_ROUNDS, _HEALTHY_ROUNDS = 2, 7
_OURS = "name: lab\ngpus: 0\ncpus: 2\nhosts:\n"
_HOST = "  - {{host: {host}, environment: 'venv:{prefix}'}}\n"
_THEIRS = """\
cluster_name: lab
provider: {{type: local, head_ip: {head}, worker_ips: [{worker}]}}
auth: {{ssh_user: root, ssh_private_key: {key}}}
max_workers: 1
min_workers: 1
head_start_ray_commands:
  - {ray} start --head --port=6379 --num-cpus=2 --autoscaling-config=~/ray_bootstrap_config.yaml
worker_start_ray_commands:
  - {ray} start --address=$RAY_HEAD_IP:6379 --num-cpus=2
"""
_NODES = "http://127.0.0.1:8265/nodes?view=summary"


def fresh(shop: Workshop) -> Iterator[Result]:
    """Measure both on two hosts on which nothing runs, until both nodes are listed."""
    if shutil.which("rsync") is None:
        msg = "`ray up` needs rsync (Debian: apt-get install rsync)"
        raise Skipped(msg)
    with lab(2, share=this_python()) as made, tempfile.TemporaryDirectory(dir=shop.folder) as name:
        laptop = _laptop(made, Path(name) / "laptop", 2)
        pairs, listed = [], []
        for _ in range(shop.rounds(_ROUNDS)):
            ours = _ours(made, laptop)
            theirs = _theirs(made, Path(name))
            listed.append(theirs is not None)
            pairs.append((ours, _PATIENCE_S if theirs is None else theirs))
    how = (
        "From nothing that runs until both of two hosts are listed; ours also has run a job on each by then. Ray is "
        "installed on both before."
    )
    peer = "`ray up`"
    if not all(listed):
        peer += f", whose second node was not there after {_PATIENCE_S:.0f} s, when we stopped waiting"
    yield compared("up_fresh", pairs, unit="s", peer=peer, how=how)


def healthy(shop: Workshop) -> Iterator[Result]:
    """Measure `raylaunch up` where there is nothing to do."""
    with lab(3, share=this_python()) as made, tempfile.TemporaryDirectory(dir=shop.folder) as name:
        laptop = _laptop(made, Path(name) / "laptop", 3)
        laptop.call("up", limit_s=_UP_S)
        try:
            took = [seconds(partial(laptop.call, "up")) for _ in range(shop.rounds(_HEALTHY_ROUNDS))]
        finally:
            laptop.call("down", "--force", limit_s=_DOWN_S)
    how = "`raylaunch up` on a healthy cluster of three hosts: each is checked over SSH, and nothing is started."
    yield Result("up_healthy", statistics.median(took), "s", how)


def _laptop(made: World, folder: Path, hosts: int) -> Laptop:
    lines = [_HOST.format(host=host.name, prefix=sys.prefix) for host in made.hosts[:hosts]]
    return Laptop(made, folder, _OURS + "".join(lines))


def _ours(made: World, laptop: Laptop) -> float:
    took = seconds(partial(laptop.call, "up", limit_s=_UP_S))
    laptop.call("down", limit_s=_DOWN_S)
    for host in made.hosts:
        host.run("rm -rf ~/.raylaunch")
        host.reboot()
    shutil.rmtree(laptop.home)
    return took


def _theirs(made: World, folder: Path) -> float | None:
    """Return how long it took until both were listed; None when they were not in time."""
    head, worker = made.hosts
    file = folder / "ray.yaml"
    ray = Path(sys.executable).parent / "ray"
    file.write_text(_THEIRS.format(head=head.address, worker=worker.address, key=made.key, ray=ray), encoding="utf-8")
    environ = {"HOME": str(made.home), "PATH": os.environ["PATH"], "RAY_USAGE_STATS_ENABLED": "0", "TERM": "dumb"}
    began = time.perf_counter()
    done = subprocess.run(
        [ray, "up", "--yes", str(file)], env=environ, capture_output=True, text=True, timeout=_UP_S, check=False
    )
    if done.returncode:
        msg = f"ray up exited with {done.returncode}: {done.stdout[-500:]} {done.stderr[-500:]}"
        raise Skipped(msg)
    took: float | None = None
    while took is None and time.perf_counter() - began < _PATIENCE_S:
        if _nodes(head) == len(made.hosts):
            took = time.perf_counter() - began
        time.sleep(_LOOK_S)
    for host in made.hosts:
        host.reboot()
    return took


def _nodes(head: Host) -> int:
    """Ask Ray's dashboard how many nodes are alive."""
    ask = f"{sys.executable} -c \"import urllib.request as r; print(r.urlopen('{_NODES}', timeout=5).read().decode())\""
    asked = head.run(ask, check=False)
    if asked.status:
        return 0
    return sum(one["raylet"].get("state") == "ALIVE" for one in json.loads(asked.out)["data"]["summary"])
