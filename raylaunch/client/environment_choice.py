"""The Python environment of a job, chosen on the client, in the same order for every interface.

The job's own; else that of cluster.yaml; else `uv.lock` in the working directory; else, on a cluster on this machine,
the active environment; else the interpreter that runs Ray. Only files are read: nothing is run or imported.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from raylaunch.models.cluster import ClusterPython
from raylaunch.models.fields import OF_THE_CLUSTER, Environment
from raylaunch.models.job import EnvironmentChoice, JobView
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import JobState
from raylaunch.paths import raylaunch_home

_VERSION = re.compile(r"\d+\.\d+(\.\d+)?")
_RAY_IN_LOCK = re.compile(r'^\[\[package\]\]\nname = "ray"\nversion = "([^"]+)"', re.MULTILINE)
_TOOL_MARKS = ("uv-receipt.toml", "pipx_metadata.json")
"""Files in environments that ``uv tool install`` and pipx make for one program."""
_MISSING = re.compile(
    r"^(?:.*\b)?(?:ModuleNotFoundError: No module named '([\w.]{1,60})|\S*python\S*: No module named ([\w.]{1,60}))",
    re.MULTILINE,
)
_COMES_FROM = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "dotenv": "python-dotenv",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}
"""Packages that are not named like their module."""


class ActivePython(NamedTuple):
    """The active environment: how a job names it, its folder, and the version of its Python."""

    environment: Environment
    prefix: Path
    version: str


def active_python(environ: Mapping[str, str], *, prefix: str = "") -> ActivePython | None:
    """Return the active environment, if any; not one that a tool manager made for raylaunch, nor conda's ``base``.

    Args:
        environ: the environment variables.
        prefix: `sys.prefix` if the interpreter is the person's own, for example in a notebook; it comes first.
    """
    path = [Path(part) for part in environ.get("PATH", "").split(os.pathsep) if part]
    named = [Path(environ[name]) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if environ.get(name)]
    named.sort(key=lambda one: path.index(one / "bin") if one / "bin" in path else len(path))  # in the order of PATH
    candidates = [*([Path(prefix)] if prefix else []), *named]
    return next((found for one in candidates if (found := _environment_at(one, environ))), None)


def _environment_at(prefix: Path, environ: Mapping[str, str]) -> ActivePython | None:
    home = raylaunch_home(environ)
    if home in prefix.parents or any((prefix / name).exists() for name in _TOOL_MARKS):
        return None
    if (prefix / "pyvenv.cfg").is_file():
        settings = _pyvenv(prefix)
        if "extends-environment" in settings:  # a temporary layer of `uv run --with`
            return _environment_at(Path(settings["extends-environment"]), environ)
        version = settings.get("version") or settings.get("version_info") or ""
        return ActivePython(Environment(kind="venv", value=str(prefix)), prefix, _version(version))
    base = (prefix / "condabin").is_dir() or environ.get("CONDA_DEFAULT_ENV") == "base"
    if (prefix / "conda-meta").is_dir() and not base:
        python = next(iter(sorted((prefix / "conda-meta").glob("python-[0-9]*.json"))), None)
        version = python.name.split("-")[1] if python else ""
        return ActivePython(Environment(kind="conda", value=str(prefix)), prefix, _version(version))
    return None


def _pyvenv(prefix: Path) -> dict[str, str]:
    try:
        lines = (prefix / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    pairs = (line.partition("=") for line in lines)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _version(text: str) -> str:
    found = _VERSION.match(text)
    return found.group() if found else ""


def choose(spec: JobSpec, cluster: ClusterPython, active: ActivePython | None, *, here: bool) -> EnvironmentChoice:
    """Return the environment that a job gets.

    With `launcher: ray`, a lock or an active environment whose Ray is not the cluster's is not used. Packages that are
    installed editable are named, because later edits reach the job.

    Args:
        spec: the job.
        cluster: the Pythons of the cluster.
        active: the active environment.
        here: whether the cluster is on this machine.
    """
    found = _choose(spec, cluster, active if here else None, here=here)
    found = found.model_copy(update={"packages": spec.packages})
    if not here or found.source in {"lock", "own"}:
        return found
    used = _named(cluster.environment if found.source == "cluster" else found.environment)
    editable = [f"{name} ({path})" for name, path in editable_in(used.prefix).items()] if used else []
    notes = [found.note, f"installed editable, so later edits reach the job: {', '.join(editable)}"]
    return found.model_copy(
        update={
            "python": found.python or (used.version if used else ""),
            "note": "; ".join(note for note in notes[: 2 if editable else 1] if note),
        }
    )


def _named(environment: Environment) -> ActivePython | None:
    """Return the environment on this machine that a path names."""
    try:
        path = Path(environment.value).expanduser()
    except RuntimeError:  # the home of an unknown account
        return None
    if environment.kind not in {"venv", "conda", "python"} or not path.is_absolute():
        return None
    prefix = path.parent.parent if environment.kind == "python" else path
    version = _pyvenv(prefix).get("version_info") or _pyvenv(prefix).get("version") or ""
    return ActivePython(environment, prefix, _version(version))


def editable_in(prefix: Path) -> dict[str, str]:
    """Return the packages that are installed editable, and the folders of their code (PEP 610)."""
    found = {}
    for site in _site_packages(prefix):
        for origin in sorted(site.glob("*.dist-info/direct_url.json")):
            try:
                facts = json.loads(origin.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(facts, dict) and (facts.get("dir_info") or {}).get("editable"):
                name = origin.parent.name.partition("-")[0]
                found[name] = unquote(urlsplit(str(facts.get("url", ""))).path)
    return {name: path for name, path in found.items() if name != "raylaunch"}


def _choose(spec: JobSpec, cluster: ClusterPython, active: ActivePython | None, *, here: bool) -> EnvironmentChoice:
    if spec.environment.kind != "auto":
        of_cluster = _of_cluster(cluster, here=here) if spec.environment.kind in OF_THE_CLUSTER else None
        found = of_cluster or EnvironmentChoice(environment=spec.environment, source="job", here=here)
        return found.model_copy(update={"environment": spec.environment})
    lock = _lock(spec)
    if cluster.environment.kind not in OF_THE_CLUSTER:
        return _of_cluster(cluster, here=here).model_copy(update={"note": _passed_over(lock, active)})
    notes = []
    if lock is not None:
        if problem := _unfit_lock(spec, cluster, lock):
            notes.append(problem)
        else:
            return EnvironmentChoice(
                environment=Environment(kind="uv"), source="lock", python=_pinned(lock.parent), here=here
            )
    if active is not None:
        if problem := _unfit_active(spec, cluster, active):
            notes.append(problem)
        else:
            return EnvironmentChoice(
                environment=active.environment, source="active", python=active.version, here=here, note="; ".join(notes)
            )
    return _of_cluster(cluster, here=here).model_copy(update={"note": "; ".join(notes)})


def _of_cluster(cluster: ClusterPython, *, here: bool) -> EnvironmentChoice:
    default = Environment(kind="default")
    if cluster.environment.kind not in {*OF_THE_CLUSTER, "ray"}:
        return EnvironmentChoice(environment=default, source="cluster", where=str(cluster.environment), here=here)
    return EnvironmentChoice(environment=default, source="own", python=cluster.version, where=cluster.prefix, here=here)


def _passed_over(lock: Path | None, active: ActivePython | None) -> str:
    if lock is not None:
        return "this folder has a uv.lock: --environment uv"
    return f"active is another one: --environment {active.environment}" if active else ""


def _lock(spec: JobSpec) -> Path | None:
    if not spec.working_dir:
        return None
    folder = Path(spec.working_dir)
    lock = folder / "uv.lock"
    return lock if lock.is_file() and (folder / "pyproject.toml").is_file() else None


def _pinned(folder: Path) -> str:
    try:
        return _version((folder / ".python-version").read_text(encoding="utf-8").strip().removeprefix("cpython-"))
    except (OSError, UnicodeDecodeError):
        return ""


def _unfit_lock(spec: JobSpec, cluster: ClusterPython, lock: Path) -> str:
    if spec.launcher != "ray":
        return ""
    found = _RAY_IN_LOCK.search(lock.read_text(encoding="utf-8", errors="replace"))
    return _unfit_ray("uv.lock", found.group(1) if found else "", cluster)


def _unfit_active(spec: JobSpec, cluster: ClusterPython, active: ActivePython) -> str:
    if spec.launcher != "ray":
        return ""
    if _minor(active.version) != _minor(cluster.version):
        return f"the active environment ({active.environment}) has Python {active.version}"
    rays = [path.name for site in _site_packages(active.prefix) for path in site.glob("ray-*.dist-info")]
    version = rays[0].removeprefix("ray-").removesuffix(".dist-info") if rays else ""
    return _unfit_ray(f"the active environment ({active.environment})", version, cluster)


def _unfit_ray(what: str, version: str, cluster: ClusterPython) -> str:
    if version and version == cluster.ray:
        return ""
    has = f"has Ray {version}" if version else "has no Ray"
    return f"{what} {has}, and launcher: ray needs the cluster's" + (f" ({cluster.ray})" if cluster.ray else "")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _site_packages(prefix: Path) -> Iterator[Path]:
    yield from sorted(prefix.glob("lib/python3*/site-packages"))


# -- missing modules


def missing_module(lines: tuple[str, ...]) -> str:
    """Return the top-level module that a program did not find, from its last lines; empty if there is none."""
    found = list(_MISSING.finditer("\n".join(lines)))
    return (found[-1][1] or found[-1][2]).partition(".")[0] if found else ""


def import_hint(job: JobView, active: ActivePython | None) -> str:
    """Return what to do about a module that a job did not find; empty if it did not fail for that reason."""
    if job.state is not JobState.FAILED:
        return ""
    module, spec, chosen = missing_module(job.log_tail), job.spec, job.chosen
    if not module or spec is None or chosen is None or _is_file_of(spec, module):
        return ""
    package = _COMES_FROM.get(module, module)
    python = job.environment.python if job.environment else ""
    ran = f"it ran in {python or chosen.where or chosen.environment}, without {module}"
    if chosen.environment.kind != "uv" and _locks(spec, package):
        return f"{ran}; uv.lock has {package}: --environment uv"
    if chosen.here and active and active.environment != spec.environment and has_module(active.prefix, module):
        return f"{ran}; your active environment has {module}: --environment {active.environment}"
    return f"{ran}; add it: --with {package}"


def has_module(prefix: Path, module: str) -> bool:
    """Return whether an environment has a top-level module, from the files in its site-packages."""
    for site in _site_packages(prefix):
        if (site / module).is_dir() or (site / f"{module}.py").is_file() or any(site.glob(f"{module}.*.so")):
            return True
        for listed in site.glob("*.dist-info/top_level.txt"):  # an editable installation
            if module in listed.read_text(encoding="utf-8", errors="replace").split():
                return True
    return False


def _is_file_of(spec: JobSpec, module: str) -> bool:
    folders = [Path(spec.working_dir), Path(spec.working_dir) / "src"] if spec.working_dir else []
    return any((folder / name).exists() for folder in folders for name in (module, f"{module}.py"))


def _locks(spec: JobSpec, package: str) -> bool:
    lock = _lock(spec)
    return lock is not None and f'name = "{package}"' in lock.read_text(encoding="utf-8", errors="replace")
