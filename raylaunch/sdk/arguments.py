"""Arguments of the SDK as specs (which cluster, and a job with its keywords), and clusters started and stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from raylaunch.cluster.trust import accept
from raylaunch.config.load import Flag, job_spec_from_flags, kept_file, load_cluster_file
from raylaunch.config.validation import spec_error
from raylaunch.errors import SpecError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.fields import Spec
from raylaunch.models.job_spec import JobSpec
from raylaunch.operations.connect import ClusterConnection
from raylaunch.operations.upgrade import upgraded

Asked = str | Sequence[str] | Path | JobSpec
"""A shell command, a program with its arguments, a job file's path, or a whole spec."""

Which = str | Path | ClusterSpec
"""A cluster: its name, a cluster file's path, or a whole spec. "" is the one that applies here."""

_LISTS = frozenset({"outputs", "packages", "secrets", "tags"})


def cluster_to_reach(which: Which) -> ClusterSpec:
    """Return the cluster that is meant, for verbs that may connect to its hosts.

    A `ClusterSpec` is part of a program that a person runs, and so is trusted; a file is trusted once accepted.

    Raises:
        SpecError: the file cannot be read, or the name is invalid.
    """
    spec = cluster_of(which)
    if spec is which:
        accept(spec)
    return spec


def cluster_of(which: Which) -> ClusterSpec:
    """Return the cluster that is meant.

    Raises:
        SpecError: the file cannot be read, or the name is invalid.
    """
    if isinstance(which, ClusterSpec):
        return which
    return cluster_spec_of("", which) if isinstance(which, Path) else cluster_spec_of(which, None)


def cluster_spec_of(name: str, cluster_file: Path | None) -> ClusterSpec:
    """Return the cluster that is meant.

    That is the file's; where the file's is not `name`, the one of that name that was brought up from here, else the
    embedded one.

    Raises:
        SpecError: the file cannot be read, or the name is invalid.
    """
    spec = load_cluster_file(cluster_file).spec
    if not name or spec.name == name:
        return spec
    try:
        kept = kept_file(ClusterSpec(name=name).name, os.environ)
        if kept.is_file():
            return load_cluster_file(kept).spec
        return ClusterSpec(name=name)
    except ValidationError as error:
        raise spec_error(error, ClusterSpec, {"name": name}, lambda _path: "") from None


def spec_of(job: Asked, given: Mapping[str, object], *, gpus: int | None = None, cwd: Path | None = None) -> JobSpec:
    """Return the job to submit.

    Args:
        job: what to run.
        given: `JobSpec`'s fields; None leaves a field alone. A field replaces that of a file or spec; `env` and
            lists add to it.
        gpus: short for ``resources={"gpus": …}``.
        cwd: what relative paths are relative to; by default the current directory.

    Raises:
        SpecError: a value is invalid.
    """
    flags = [Flag("", (name,), _plain(name, value)) for name, value in given.items() if value is not None]
    if gpus is not None:
        flags.append(Flag("", ("resources", "gpus"), gpus))
    if isinstance(job, str) and job.endswith((".yaml", ".yml")) and ((cwd or Path()) / job).is_file():
        job = Path(job)
    if isinstance(job, Path):
        return job_spec_from_flags(flags, file=job, cwd=cwd)
    if isinstance(job, JobSpec):
        base = job.model_dump(exclude_unset=True)
        values = {name: list(value) if name in _LISTS else value for name, value in base.items()}
        return job_spec_from_flags([*(Flag("", (name,), values[name]) for name in values), *flags], cwd=cwd)
    entrypoint = tuple(job) if isinstance(job, list) else job
    return job_spec_from_flags([Flag("", ("entrypoint",), entrypoint), *flags], cwd=cwd)


def _plain(name: str, value: object) -> object:
    """Return a value as a file would have it; mutable values are copied."""
    if isinstance(value, str):
        return (value,) if name in _LISTS else value
    if isinstance(value, Spec):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if isinstance(value, list) else value


async def bring_up(place: ClusterConnection, *, upgrade: bool, stop: bool) -> None:
    """Start a cluster; with `upgrade` also where another version of Ray runs, once no job does.

    Raises:
        SpecError: `stop` without `upgrade`.
        ClusterStartError: something is still missing.
    """
    if upgrade:
        await upgraded(place, stop=stop)
    elif stop:
        msg = "up(stop=True) needs upgrade=True: it decides whether running jobs are stopped for the upgrade"
        raise SpecError(msg, hint="to stop a job: job.stop()", field="stop")
    else:
        await place.up()
