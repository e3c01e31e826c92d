"""Downloading a model from a host, compared with scp of the same file.

The host is this machine, by a real sshd of its own on the loopback. What answers behind it is the controller's real
HTTP server with its stores; there is no Ray, which downloads nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from benchmarks.hosts import LOOPBACK, Api, Sshd, head_here, known, serving, submit, token_of, write
from benchmarks.measure import Result, Skipped, compared, in_turns, seconds
from benchmarks.workshop import RAYLAUNCH, Workshop, run_program

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
        with head_here(folder / "sshd") as host, serving(folder / "store") as api:
            yield _measure(shop, folder, host, api, size_mb)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(shop: Workshop, folder: Path, host: Sshd, api: Api, size_mb: int) -> Result:
    environ = {**shop.environ, "RAYLAUNCH_HOME": str(folder / "home"), "HOME": str(host.home)}
    job, model = _model(api, size_mb)
    get = (*RAYLAUNCH, "--cluster", "test", "get", job, "--to", str(folder / "got"))
    scp = ("scp", "-q", "-F", str(host.client / "config"), "-P", str(host.port), f"{LOOPBACK}:{model}")
    with known(environ, host, controller=int(api.url.rpartition(":")[2]), token=token_of("tom")):
        run_program((*RAYLAUNCH, "--cluster", "test", "list"), environ)  # the tunnel is up before
        pairs = in_turns(
            lambda: _timed(folder, get, environ),
            lambda: _timed(folder, (*scp, str(folder / "got/model.safetensors")), environ),
            rounds=shop.rounds(_ROUNDS),
        )
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
    api.do(lambda: api.state.artifacts.finalize(job.id))
    return job.id, model
