"""A store of ten thousand jobs: how long a page of their list takes, and how large the controller becomes."""

from __future__ import annotations

import http.client
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from benchmarks.measure import Result, Skipped
from benchmarks.workshop import Workshop
from raylaunch.cluster.types import Endpoint
from raylaunch.controller.store.jobs import Records
from raylaunch.models.job import SubmitRequest
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import Change

_JOBS, _FEW_JOBS = 10_000, 100
_PAGE = 50
_FILTERS = ({"name": "train-7"}, {"owner": "anna"}, {"tag": "sweep"}, {"state": "stopped"}, {"state": "queued,running"})
_TURNS = 20


def run(shop: Workshop) -> Iterator[Result]:
    """Measure a real controller and a real Ray, over HTTP.

    Raises:
        Skipped: the list is not all there.
    """
    jobs = _FEW_JOBS if shop.quick else _JOBS
    fill(shop.home("records"), jobs)
    with shop.other_cluster("records") as cluster:
        times = _ask(cluster.reach, jobs)
        memory = cluster.processes()["controller"].memory_info().rss
    slowest = statistics.quantiles(times, n=100)[94]
    how = (
        f"95th percentile of {len(times)} pages of {_PAGE} jobs among {jobs:,}, over HTTP on the same machine:"
        " all pages in turn, and first pages by name, owner, tag and state."
    )
    yield Result("page_10000", slowest * 1000, "ms", how)
    yield Result("controller_memory", memory / 1e6, "MB", "Resident memory of the controller after all these pages.")


def fill(home: Path, jobs: int) -> None:
    """Make the store of a cluster with ended jobs, through the controller's own records."""
    before = os.umask(0o077)
    try:
        records = Records(home / "clusters" / "local" / "store")
    finally:
        os.umask(before)
    for n in range(jobs):
        tags = ("sweep", f"run-{n % 100}") if n % 10 == 0 else ()
        spec = JobSpec(entrypoint=f"python train.py --seed {n}", name=f"train-{n % 20}", working_dir="", tags=tags)
        owner = "anna" if n % 3 else "ben"
        record, _ = records.create(SubmitRequest(spec=spec, request_id=f"request-{n}"), owner=owner, wandb=None)
        records.update(record.id, kind="ended", message="stopped before it started", change=Change.END_STOPPED)
    records.close()


def _ask(reach: Endpoint, jobs: int) -> list[float]:
    times: list[float] = []
    connection = http.client.HTTPConnection(urlsplit(reach.url).netloc, timeout=30)

    def page(**query: str) -> tuple[int, str]:
        began = time.perf_counter()
        headers = {"Authorization": f"Bearer {reach.token}"}
        connection.request("GET", f"/v1/jobs?{urlencode({'limit': _PAGE, **query})}", headers=headers)
        answer = json.loads(connection.getresponse().read())
        times.append(time.perf_counter() - began)
        return len(answer["jobs"]), answer["next_cursor"]

    seen, cursor = page()
    while cursor:
        more, cursor = page(cursor=cursor)
        seen += more
    if seen != jobs:
        msg = f"{seen} of {jobs} jobs were listed"
        raise Skipped(msg)
    for _ in range(_TURNS):
        for query in _FILTERS:
            page(**query)
    connection.close()
    return times
