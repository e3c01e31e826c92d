"""Downloading a model from a host, beside scp of the same file.

The host is this machine, by a real sshd of its own on the loopback. What answers behind it is the controller's real
HTTP server with its stores; there is no Ray, which downloads nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.measure import Result, Skipped, compared, in_turns, seconds
from benchmarks.workshop import RAYLAUNCH, Workshop, run_program
from raylaunch.cluster.client_record import ClientRecord, load_tunnel, save_client
from raylaunch.cluster.home import ClusterPaths, cluster_paths, make_private_dir
from raylaunch.spec import ClusterSpec

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.api import Api, serving, token_of
from support.api_use import submit, write
from support.sshd import LOOPBACK, Sshd, sshd

_MB = 1_000_000
_SIZE_MB, _QUICK_MB = 2000, 300
_PIECE_MB = 20
_ROUNDS = 3
_LIMIT_S = 240.0


def run(shop: Workshop) -> Iterator[Result]:
    """Measure `raylaunch get` and scp in turns."""
    size_mb = _QUICK_MB if shop.quick else _SIZE_MB
    folder = shop.home("downloading")
    folder.mkdir()
    try:
        with sshd(folder / "sshd") as host, serving(folder / "store") as api:
            yield _measure(shop, folder, host, api, size_mb)
    except pytest.skip.Exception as reason:
        raise Skipped(str(reason)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(shop: Workshop, folder: Path, host: Sshd, api: Api, size_mb: int) -> Result:
    host.config(
        f"Host {LOOPBACK}\n  IdentityFile {host.key}\n  User {host.user}\n  UserKnownHostsFile {host.known_hosts}\n"
    )
    host.trust()
    environ = {**shop.environ, "RAYLAUNCH_HOME": str(folder / "home"), "HOME": str(host.home)}
    job, model = _model(api, size_mb)
    paths = _known(environ, host, api)
    get = (*RAYLAUNCH, "--cluster", "test", "get", job, "--to", str(folder / "got"))
    scp = ("scp", "-q", "-F", str(host.client / "config"), "-P", str(host.port), f"{LOOPBACK}:{model}")
    run_program((*RAYLAUNCH, "--cluster", "test", "list"), environ)  # the tunnel is up before
    try:
        pairs = in_turns(
            lambda: _timed(folder, get, environ),
            lambda: _timed(folder, (*scp, str(folder / "got/model.safetensors")), environ),
            rounds=shop.rounds(_ROUNDS),
        )
    finally:
        _end_tunnel(paths)
    how = f"Time to download a file of {size_mb / 1000:g} GB over SSH from this machine, its checksum verified."
    return compared("download", pairs, unit="s", peer="scp, which verifies nothing", how=how)


def _timed(folder: Path, command: tuple[str, ...], environ: dict[str, str]) -> float:
    shutil.rmtree(folder / "got", ignore_errors=True)
    (folder / "got").mkdir()
    os.sync()
    took = seconds(lambda: run_program(command, environ, limit_s=_LIMIT_S))
    if not (folder / "got/model.safetensors").exists():
        msg = "nothing was downloaded"
        raise Skipped(msg)
    return took


def _model(api: Api, size_mb: int) -> tuple[str, Path]:
    """Let a job leave a model; return the job, and where the file lies."""
    with api.client("tom") as tom:
        job = submit(tom)
    write(api, job, "attempt-1/outputs/model.safetensors", b"")
    (model,) = (api.store / "jobs" / job.id).rglob("model.safetensors")
    piece = os.urandom(_PIECE_MB * _MB)
    with model.open("wb") as file:
        for number in range(size_mb // _PIECE_MB):
            file.write(number.to_bytes(8, "big") + piece[8:])
    api.do(lambda: api.services.artifacts.seal(job.id))
    return job.id, model


def _known(environ: dict[str, str], host: Sshd, api: Api) -> ClusterPaths:
    """Write down what `up` would have left here."""
    paths = cluster_paths("test", environ)
    for one in (paths.home, paths.home / "clusters", paths.root):
        make_private_dir(one)
    spec = ClusterSpec.model_validate({"name": "test", "hosts": [{"host": f"{LOOPBACK}:{host.port}"}]})
    controller = int(api.url.rpartition(":")[2])
    ports = dict.fromkeys(("controller", "dashboard", "gcs"), controller)
    save_client(paths, ClientRecord(spec=spec, token=token_of("tom"), head_ports=ports, head=spec.hosts[0].name))
    return paths


def _end_tunnel(paths: ClusterPaths) -> None:
    tunnel = load_tunnel(paths)
    if tunnel is not None and tunnel.alive:
        subprocess.run(["kill", str(tunnel.process.pid)], check=False)
