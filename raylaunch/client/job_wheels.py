"""Wheels of a job's environment for nodes that reach no package index: gathered here, and sent with the job.

They are uploaded as packages of the cluster, by their sha256: those that it has are not sent again. The controller
sends them to each node together with the job's code.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from raylaunch.client.local_projects import (
    OTHER_FILE,
    RequirementError,
    check_line,
    check_named,
    joined,
    local_folder,
    read_project,
)
from raylaunch.client.packing import Packed, upload
from raylaunch.client.transport import OnProgress, Retry, Transport
from raylaunch.cluster.commands import run_program
from raylaunch.cluster.install.platforms import WheelPlatform
from raylaunch.cluster.install.resolve import IndexUnreachableError, Wheel, find_uv, tool_environment
from raylaunch.cluster.install.wheel_store import WheelStore
from raylaunch.errors import SpecError
from raylaunch.files import sha256_of
from raylaunch.models.fields import Environment
from raylaunch.models.job import BuildPlatform, PackReport, WheelFile, WheelSet
from raylaunch.models.job_spec import JobSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_EXPORT_S = 120.0
_DEEPEST = 5
_UNGATHERED = (
    "nodes reach no package index, and wheels for them could not be gathered; "
    "the job can only start where an earlier one has made its environment"
)


async def send_wheels(  # noqa: PLR0913 -- what goes where, and callbacks
    transport: Transport,
    spec: JobSpec,
    platforms: Sequence[BuildPlatform],
    *,
    retry: Retry,
    on_progress: OnProgress,
    on_notice: Callable[[str], None],
    added: bool = False,
) -> tuple[WheelSet, ...]:
    """Gather the wheels of a job's environment for each platform, and send those that the cluster lacks.

    If no index can be reached from here either, nothing is sent, and `on_notice` is called: an earlier job may have
    made the environment. `added` marks packages that a job adds to the cluster's own environment.

    Raises:
        ClusterStartError: the wheels could not be found or downloaded for another reason.
        SpecError: requirements or lock file cannot be read, or the project needs another Python.
        TransferError: a wheel did not arrive as it was sent.
        VersionError: a package has no wheel for a platform; the message names both.
    """
    store = _store_for(spec)

    async def gather(requirements: Sequence[str], platform: WheelPlatform) -> tuple[Wheel, ...]:
        return await store.gather(
            requirements, platform, on_bytes=lambda done, total: on_progress("gathering wheels", done, total)
        )

    sets = []
    async for platform, wheels, tools in _found(spec, platforms, gather, on_notice):
        for wheel in (*wheels, *tools):
            await _send(transport, store, wheel, retry=retry, on_progress=on_progress)
        files = [WheelFile(file=wheel.file, sha256=wheel.sha256, added=added) for wheel in wheels]
        files += [WheelFile(file=wheel.file, sha256=wheel.sha256, build=True) for wheel in tools]
        sets.append(WheelSet(platform=platform, wheels=tuple(dict.fromkeys(files))))
    return tuple(sets)


async def check_wheels(spec: JobSpec, platforms: Sequence[BuildPlatform], *, on_notice: Callable[[str], None]) -> None:
    """Check that there are wheels of a job's environment for each platform; download and send nothing.

    Raises:
        RaylaunchError: as `send_wheels`.
    """
    async for _ in _found(spec, platforms, _store_for(spec).find, on_notice):
        pass


def _store_for(spec: JobSpec) -> WheelStore:
    if spec.environment.kind != "uv":
        return WheelStore()
    return WheelStore(environ={"UV_INDEX_STRATEGY": "unsafe-best-match", **os.environ})


class _Found(NamedTuple):
    """Wheels for one platform: those to install, and those that build the projects of the working directory."""

    platform: BuildPlatform
    wheels: tuple[Wheel, ...]
    tools: tuple[Wheel, ...]


async def _found(
    spec: JobSpec,
    platforms: Sequence[BuildPlatform],
    find: Callable[[Sequence[str], WheelPlatform], Awaitable[tuple[Wheel, ...]]],
    on_notice: Callable[[str], None],
) -> AsyncIterator[_Found]:
    """Yield the wheels for each platform; call `on_notice` instead if no index can be reached."""
    folder = Path(spec.working_dir or ".")
    needed = await needed_by(spec, folder)
    for platform in platforms:
        if spec.environment.kind == "uv":
            _check_python(folder, platform)
        fits = WheelPlatform(arch=platform.arch, glibc=platform.glibc, python=platform.python)
        try:
            wheels = await find(needed.requirements, fits) if needed.requirements else ()
            tools = [wheel for one in needed.built_with for wheel in await find(one, fits)]
        except IndexUnreachableError as error:
            on_notice(f"{_UNGATHERED}: {error.message.splitlines()[0]}")
            continue
        yield _Found(platform, wheels, tuple(tools))


async def _send(
    transport: Transport, store: WheelStore, wheel: Wheel, *, retry: Retry, on_progress: OnProgress
) -> None:
    empty = PackReport(files=1, bytes=wheel.bytes, ignored=0, ignored_bytes=0)
    with Packed(store.path(wheel).open("rb"), wheel.sha256, empty) as packed:
        await upload(transport, packed, retry=retry, on_progress=on_progress, what=wheel.file)


class Requirement(NamedTuple):
    """The packages that a job's environment needs."""

    requirements: tuple[str, ...]
    """Lines of a requirements file, without projects of the working directory."""
    built_with: tuple[tuple[str, ...], ...]
    """For each such project, what builds it."""


async def needed_by(spec: JobSpec, folder: Path) -> Requirement:
    """Return the packages that a job's environment needs, with those that are added to it.

    Raises:
        SpecError: as `requirements_of`, or a project of the working directory does not list its dependencies.
    """
    check_named(spec.packages)
    if spec.environment.kind not in {"uv", "pip"}:
        return Requirement(spec.packages, ())
    locked = spec.environment.kind == "uv"
    requirements, built_with = list[str](), list[tuple[str, ...]]()
    for line in await requirements_of(spec.environment, folder):
        if local := local_folder(line, folder):
            project = read_project(*local, locked=locked)
            check_named((*project.needs, *project.built_with))
            requirements += project.needs
            built_with += [project.built_with] if project.built_with else []
        elif (archive := folder / line.partition(";")[0].strip()).is_file():
            if not locked:  # uv installs it from its place
                requirements.append(f"{archive.resolve()}  # {sha256_of(archive)}")
        else:
            requirements.append(line)
    return Requirement((*requirements, *spec.packages), tuple(dict.fromkeys(built_with)))


async def requirements_of(environment: Environment, folder: Path) -> tuple[str, ...]:
    """Return the packages of an environment, as lines of a requirements file.

    Raises:
        SpecError: the file is missing, uv cannot read the lock, or this machine does not resolve a line.
    """
    if environment.kind == "uv":
        return await _locked(folder)
    if not environment.value:
        check_named(environment.requirements)
        return environment.requirements
    check_line(f"-r {environment.value}", folder)
    return tuple(_lines(folder / environment.value, folder))


def resolved_here(environment: Environment, known: Environment | None) -> Environment | None:
    """Return the environment that this machine resolves for the cluster's own; None for nothing. Pure.

    Args:
        environment: the one that the head reports. A file of the working directory that it names is resolved, packages
            that it lists are not.
        known: the one in the cluster.yaml here. Its packages are resolved if the head reports the same.
    """
    match environment.kind:
        case "uv":
            return Environment(kind="uv")
        case "pip" if environment.value:
            return Environment(kind="pip", value=environment.value)
        case _:
            return known if known is not None and known == environment and known.kind == "pip" else None


def _lines(file: Path, folder: Path, *, depth: int = 0) -> Iterator[str]:
    """Yield a requirements file's lines; references to other files are absolute, with a digest of their content."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"the requirements file {file} cannot be read: {getattr(error, 'strerror', None) or error}"
        raise SpecError(
            msg, hint="name one in the working directory: environment: pip:FILE", field="environment"
        ) from None
    for number, line in joined(text):
        _check_of_file(_from(file.parent, line, folder), folder, where=f"{file}:{number}")
        if found := OTHER_FILE.match(line.strip()):
            if depth == _DEEPEST:
                msg = f"the requirements file {file} refers to others more than {_DEEPEST} deep"
                raise SpecError(msg, field="environment")
            other = file.parent / found[1]
            inside = "\n".join(_lines(other, folder, depth=depth + 1))
            option = line.strip()[: found.start(1)]
            yield f"{option}{other.absolute()}  # {hashlib.sha256(inside.encode()).hexdigest()}"
        else:
            yield line


def _from(parent: Path, line: str, folder: Path) -> str:
    """Return a line with its reference to another file relative to the working directory."""
    found = OTHER_FILE.match(line.strip())
    if found is None:
        return line
    return f"-r {os.path.relpath(parent / found[1], folder)}"


async def _locked(folder: Path) -> tuple[str, ...]:
    """Return the packages in a project's ``uv.lock``, with its indexes, and the project if it is installed."""
    argv = [find_uv(os.environ), "export", "--frozen", "--no-hashes", "--no-header", "--quiet"]
    env = {**tool_environment(os.environ), "UV_NO_PROGRESS": "1"}
    ran = await run_program([*argv, "--color=never"], cwd=folder, env=env, limit_s=_EXPORT_S, step="uv export")
    if ran.status != 0:
        msg = f"uv cannot read the lock of {folder}"
        raise SpecError(msg, hint="uv export --frozen shows why; uv lock makes it again", field="environment")
    lines = tuple(line for line in ran.text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    found = (*_indexes(folder), *lines)
    for line in found:
        _check_of_file(line, folder, where=str(folder / "uv.lock"))
    return found


def _check_of_file(line: str, folder: Path, *, where: str) -> None:
    try:
        check_line(line, folder)
    except RequirementError as error:
        raise error.in_file(where) from None


def _indexes(folder: Path) -> Iterator[str]:
    uv = _project(folder).get("tool", {}).get("uv", {})
    listed = uv.get("index", []) if isinstance(uv, dict) else []
    for index in listed if isinstance(listed, list) else []:
        if isinstance(index, dict) and isinstance(index.get("url"), str):
            yield f"{'--index-url' if index.get('default') is True else '--extra-index-url'} {index['url']}"


def _check_python(folder: Path, platform: BuildPlatform) -> None:
    needs = _project(folder).get("project", {}).get("requires-python", "")
    try:
        fits = SpecifierSet(str(needs)).contains(platform.python, prereleases=True)
    except InvalidSpecifier:
        return
    if not fits:
        msg = f"the project needs Python {needs}; nodes that reach no package index have {platform.python}"
        raise SpecError(msg, hint="allow that Python in pyproject.toml, then: uv lock", field="environment")


def _project(folder: Path) -> dict[str, dict[str, object]]:
    try:
        return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        msg = f"{folder / 'pyproject.toml'} cannot be read: {error}"
        raise SpecError(msg, hint="the environment uv needs pyproject.toml and uv.lock", field="environment") from None
