"""Specs from files, environment variables and flags; errors have file, line, and the nearest known key."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from raylaunch.config.ray_yaml import is_ray_yaml, read_ray_yaml
from raylaunch.config.validation import spec_error
from raylaunch.config.yaml_file import KeyPath, YamlFile, read_yaml
from raylaunch.entrypoint import read as read_entrypoint
from raylaunch.errors import SpecError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.fields import KEYS, Spec
from raylaunch.models.job_spec import JobSpec
from raylaunch.paths import raylaunch_home

CLUSTER_FILE = "cluster.yaml"
CLUSTER_FILE_VARIABLE = "RAYLAUNCH_CLUSTER_FILE"

_AnySpec = TypeVar("_AnySpec", bound=Spec)


class Flag(NamedTuple):
    """One value from the command line: its option, the field that it sets, and the value."""

    option: str
    field: tuple[str, ...]
    value: object


def find_cluster_file() -> Path | None:
    """Return the cluster file that applies here.

    That is ``$RAYLAUNCH_CLUSTER_FILE``, else ``./cluster.yaml``, else that of the cluster chosen with ``raylaunch
    switch``, else None.
    """
    if named := os.environ.get(CLUSTER_FILE_VARIABLE, ""):
        return Path(named).expanduser()
    if Path(CLUSTER_FILE).is_file():
        return Path(CLUSTER_FILE)
    chosen = chosen_file(os.environ)
    try:
        return chosen if chosen.is_file() else None
    except OSError as error:
        msg = f"{chosen}: the file of the chosen cluster cannot be read: {error.strerror}"
        raise SpecError(msg, hint="check its permissions, or name the cluster's file: raylaunch -c FILE") from None


def chosen_file(environ: Mapping[str, str]) -> Path:
    """Return the path of the link that ``raylaunch switch`` sets."""
    return raylaunch_home(environ) / "chosen.yaml"


def kept_file(name: str, environ: Mapping[str, str]) -> Path:
    """Return the path of the file that the last `up` stored for cluster `name`."""
    return raylaunch_home(environ) / "clusters" / name / CLUSTER_FILE


def kept_clusters(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the clusters over SSH that were brought up, or joined, from here."""
    return tuple(sorted(file.parent.name for file in (raylaunch_home(environ) / "clusters").glob(f"*/{CLUSTER_FILE}")))


class ClusterFile(NamedTuple):
    """A cluster, its file (None for the embedded one), and notes about keys that are ignored."""

    spec: ClusterSpec
    path: Path | None = None
    notes: tuple[str, ...] = ()
    of_ray: bool = False
    """Whether it is one of Ray's own cluster files."""


def load_cluster_file(path: Path | None = None, *, quoted: bool = True) -> ClusterFile:
    """Return the cluster that `path` describes, else the one that applies here, else the embedded cluster ``local``.

    The file may be one of Ray's own.

    Raises:
        SpecError: the file cannot be read or is invalid; without `quoted` the message repeats nothing of it.
    """
    chosen = path or find_cluster_file()
    if chosen is None:
        return ClusterFile(ClusterSpec())
    file = read_yaml(chosen, quoted=quoted)
    if is_ray_yaml(file.data):
        return _of_ray(chosen, file)
    return ClusterFile(_validated(ClusterSpec, file.data, file, ()), chosen)


def _of_ray(path: Path, file: YamlFile) -> ClusterFile:
    ray = read_ray_yaml(file)
    lines = {place: file.lines[origin] for place, origin in ray.origins.items() if origin in file.lines}
    ours = YamlFile(path, ray.data, lines, quoted=file.quoted)
    return ClusterFile(
        _validated(ClusterSpec, ray.data, ours, ()), path, tuple(str(note) for note in ray.notes), of_ray=True
    )


def job_spec_from_flags(
    flags: Sequence[Flag], *, file: Path | YamlFile | None = None, cwd: Path | None = None
) -> JobSpec:
    """Return the job that a file and flags describe.

    A flag replaces the file's value, or adds to it for `env` and lists (`tags`, `outputs`, `secrets`). The working
    directory becomes absolute: the file's is relative to the file, the flag's to the current directory.

    Raises:
        SpecError: file or flags are invalid.
    """
    read = read_yaml(file) if isinstance(file, Path) else file
    data: dict[str, object] = copy.deepcopy(read.data) if read else {}
    stated = data.get("working_dir", ".")
    here = cwd or Path.cwd()
    if isinstance(stated, str) and stated:
        data["working_dir"] = _absolute(read.path.absolute().parent if read else here, stated, read)
    for flag in flags:
        value = flag.value
        if flag.field == ("working_dir",) and isinstance(value, str) and value:
            value = _absolute(here, value, None)
        data.pop(KEYS.get(flag.field[0], ""), None)
        _lay(data, flag.field, value)
    if not read and "entrypoint" not in data:
        msg = "there is nothing to run: no entrypoint was given"
        raise SpecError(
            msg,
            field="entrypoint",
            hint="write the command after --: raylaunch run -- python train.py; or name a file: -f job.yaml",
        )
    return _started_by_python(_validated(JobSpec, data, read, flags))


def _started_by_python(spec: JobSpec) -> JobSpec:
    """Return the job with ``python`` before a script that is not executable, for example ``train.py``.

    Raises:
        SpecError: the command is a job file.
    """
    commands = read_entrypoint(spec.entrypoint).commands
    first = commands[0][0].text if commands else ""
    if first.endswith((".yaml", ".yml")) and len(commands[0]) == 1:
        hint = f"raylaunch run -f {first}; in Python: Path({first!r}); as a tool's argument: job_file"
        msg = f"{first} is a job file, not a command"
        raise SpecError(msg, field="entrypoint", hint=hint)
    script = Path(spec.working_dir, first)
    if not (first.endswith(".py") and script.is_file()) or ("/" in first and os.access(script, os.X_OK)):
        return spec
    entrypoint = spec.entrypoint
    started = f"python {entrypoint.lstrip()}" if isinstance(entrypoint, str) else ("python", *entrypoint)
    return spec.model_copy(update={"entrypoint": started})


def _absolute(base: Path, text: str, file: YamlFile | None) -> str:
    try:
        return str((base / Path(text).expanduser()).resolve())
    except (OSError, RuntimeError, ValueError) as error:
        shown = f"{text[:80]!r} " if file is None or file.quoted else ""
        msg = f"working_dir: {shown}cannot be a path here: {getattr(error, 'strerror', None) or type(error).__name__}"
        where = file.where(("working_dir",)) if file else ""
        raise SpecError(msg, where=where, field="working_dir", hint="name a folder of this machine") from None


def _lay(data: dict[str, object], field: tuple[str, ...], value: object) -> None:
    *parents, last = field
    holder = data
    for parent in parents:
        inner = holder.setdefault(parent, {})
        if not isinstance(inner, dict):
            return  # an invalid value in the file; validation reports it
        holder = inner
    present = holder.get(last)
    if isinstance(present, dict) and isinstance(value, dict):
        present.update(value)
    elif isinstance(value, tuple) and last != "entrypoint" and isinstance(present, list | str):
        holder[last] = [*([present] if isinstance(present, str) else present), *value]
    else:
        holder[last] = value


def _validated(
    model: type[_AnySpec], data: dict[str, object], file: YamlFile | None, flags: Sequence[Flag]
) -> _AnySpec:
    def locate(path: KeyPath) -> str:
        if file and path in file.lines:
            return file.where(path)
        for flag in flags:
            if path[: len(flag.field)] == flag.field:
                return flag.option
        return file.where(path) if file else ""

    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise spec_error(error, model, data, locate, quoted=file is None or file.quoted) from None
