"""Wheels gathered here for hosts of other platforms: ``$RAYLAUNCH_HOME/wheels/<sha256>/name.whl``, once each.

What is needed is found with uv and downloaded with pip, both with the user's own configuration (index, proxy,
credentials). The result is saved, so that the next request for the same needs no network.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.to_thread
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pydantic import TypeAdapter, ValidationError

import raylaunch
from raylaunch.cluster.commands import run_program
from raylaunch.cluster.install.platforms import WheelPlatform
from raylaunch.cluster.install.resolve import STEP, Wheel, find_uv, resolve, tool_environment
from raylaunch.cluster.installer.tools import pip_settings
from raylaunch.errors import ClusterStartError, ConflictError, RaylaunchError, TransferError
from raylaunch.files import sha256_of, sync, try_lock, write_atomic
from raylaunch.paths import make_private_dir, raylaunch_home, storage_error, storage_errors, write_private
from raylaunch.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_ON_HOSTS = frozenset({"mcp", "asyncssh"})
"""Packages that only clients need."""

_NAME = "raylaunch"
_DEMO = "raylaunch/demo/digits"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MODE = 0o644 << 16
_MINIMUM_PYTHON = ">=3.10"


OnBytes = Callable[[int, int], None]
"""Called with bytes done and bytes in total; the total is 0 if the index does not report sizes."""

GATHER_S = 1800.0
_AT_ONCE = 4
_PER_PROGRAM = 12
_POLL_S = 0.2
_START_BYTES = 1_000_000
"""The time for one more wheel, in bytes."""
_LAST_LINES = 12
_NO_SPACE = "No space left on device"
_LOCK: TypeAdapter[tuple[Wheel, ...]] = TypeAdapter(tuple[Wheel, ...])


@dataclass(frozen=True)
class OwnWheel:
    """raylaunch's own wheel, in memory (about half a megabyte)."""

    file: str
    content: bytes = field(repr=False)
    digest: str
    """SHA-256 of its content, the same wherever it was packed."""
    requirements: tuple[str, ...]
    """What a host needs in addition."""

    @property
    def sha256(self) -> str:
        """Checksum of the file."""
        return hashlib.sha256(self.content).hexdigest()


def no_progress(_done: int, _total: int, /) -> None:
    """Show nothing."""


class WheelStore:
    """The wheels on this machine for hosts.

    Args:
        home: raylaunch's folder, by default ``$RAYLAUNCH_HOME``.
        environ: the environment of pip and uv.
    """

    def __init__(self, home: Path | None = None, *, environ: Mapping[str, str] = os.environ) -> None:
        self.folder = (home or raylaunch_home(environ)) / "wheels"
        self.environ = environ

    @functools.cached_property
    def own(self) -> OwnWheel:
        """The wheel of raylaunch itself, as the package was when this store was first asked for it."""
        return own_wheel()

    def path(self, wheel: Wheel) -> Path:
        """Return a wheel's path; the file exists once it was gathered."""
        return self.folder / wheel.sha256 / wheel.file

    def has(self, wheel: Wheel) -> bool:
        """Return whether a wheel is here, complete."""
        return bool(wheel.sha256) and self.path(wheel).is_file()

    def add(self, own: OwnWheel) -> Wheel:
        """Save raylaunch's own wheel here."""
        wheel = Wheel(name="raylaunch", version="", file=own.file, sha256=own.sha256, bytes=len(own.content))
        if not self.has(wheel):
            make_private_dir(self.path(wheel).parent)
            with storage_errors(self.path(wheel)):
                write_atomic(self.path(wheel), own.content, durable=False)
        return wheel

    async def gather(
        self,
        requirements: Sequence[str],
        platform: WheelPlatform,
        *,
        preferences: Mapping[str, str] | None = None,
        on_bytes: OnBytes = no_progress,
    ) -> tuple[Wheel, ...]:
        """Collect the wheels of all requirements for a platform; download those that are missing.

        A repeated call continues where an interrupted one stopped. Of several at once, one downloads, the others wait.

        Args:
            requirements: as in a requirements file; also a job's own.
            platform: of the host.
            preferences: versions to take where they fit, by name.
            on_bytes: called with the progress.

        Raises:
            ClusterStartError: the index cannot be reached, or a download failed.
            StorageError: the disk here is full.
            TransferError: a file differs from the checksum of the index.
            VersionError: a package has no wheel for that platform.
        """
        preferences = dict(preferences or {})
        key = _key(requirements, preferences, platform)
        known = self._known(key)
        if known and all(map(self.has, known)):
            return known
        make_private_dir(self.folder)
        async with self._locked():
            known = self._known(key)
            if known and all(map(self.has, known)):
                return known
            preferences |= {wheel.name: wheel.version for wheel in known}
            found = await resolve(requirements, preferences, platform, environ=self.environ)
            found = await self._fetch(found, platform, on_bytes)
            self._know(key, found)
            return found

    async def find(self, requirements: Sequence[str], platform: WheelPlatform) -> tuple[Wheel, ...]:
        """Find the wheels that `gather` would return, without a download. Raises as `gather`."""
        known = self._known(_key(requirements, {}, platform))
        return known or await resolve(requirements, {}, platform, environ=self.environ)

    def _known(self, key: str) -> tuple[Wheel, ...]:
        try:
            return _LOCK.validate_json((self.folder / "found" / f"{key}.json").read_bytes())
        except (FileNotFoundError, ValidationError):
            return ()

    def _know(self, key: str, wheels: tuple[Wheel, ...]) -> None:
        make_private_dir(self.folder / "found")
        write_private(self.folder / "found" / f"{key}.json", _LOCK.dump_json(wheels, indent=1).decode())

    async def _fetch(self, wheels: tuple[Wheel, ...], platform: WheelPlatform, on_bytes: OnBytes) -> tuple[Wheel, ...]:
        """Download missing wheels, with several programs at once. Those that arrive are kept, even if others fail."""
        missing = [one for one in wheels if not self.has(one)]
        arrived: dict[str, Wheel] = {}
        problems: list[RaylaunchError] = []
        slots = anyio.Semaphore(_AT_ONCE)
        incoming = self._incoming()

        async def fetch(number: int, group: list[Wheel]) -> None:
            async with slots:
                try:
                    done = await self._download(group, incoming / str(number), platform)
                    for wheel in group:
                        arrived[wheel.name] = await anyio.to_thread.run_sync(self._accept, done / wheel.file, wheel)
                except RaylaunchError as error:
                    problems.append(error)

        def tell() -> None:
            done = sum(one.bytes for one in arrived.values()) + _size(incoming)
            total = sum(one.bytes for one in missing) if all(one.bytes for one in missing) else 0
            on_bytes(min(done, total) if total else done, total)

        try:
            async with anyio.create_task_group() as telling:
                telling.start_soon(_each_second, tell)
                async with anyio.create_task_group() as fetching:
                    for number, group in enumerate(_groups(missing)):
                        fetching.start_soon(fetch, number, group)
                telling.cancel_scope.cancel()
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        if problems:
            raise problems[0]
        return tuple(arrived.get(one.name, one).model_copy(update={"url": ""}) for one in wheels)

    async def _download(self, wheels: Sequence[Wheel], folder: Path, platform: WheelPlatform) -> Path:
        """Run pip once; return the folder with the wheels."""
        done, listed = folder / "done", folder / "wheels.txt"
        with storage_errors(folder):
            (folder / "tmp").mkdir(parents=True)
            done.mkdir()
            listed.write_text("".join(f"{one.name} @ {_pinned(one)}\n" for one in wheels), encoding="utf-8")
        argv = [*find_pip(), "download", "--quiet", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
        argv += ["--no-deps", "--only-binary=:all:", "--python-version", platform.minor, "--implementation=cp"]
        argv += [f"--platform={name}" for name in platform.platforms]
        argv += ["--dest", str(done), "--requirement", str(listed)]
        env = {**tool_environment(self.environ), **pip_settings(self.environ), "TMPDIR": str(folder / "tmp")}
        ran = await run_program(argv, cwd=folder, env=env, limit_s=GATHER_S, step=STEP)
        if ran.status != 0:
            raise self._not_downloaded(wheels, ran.text)
        return done

    def _not_downloaded(self, wheels: Sequence[Wheel], text: str) -> RaylaunchError:
        if _NO_SPACE in text:
            return storage_error(OSError(errno.ENOSPC, _NO_SPACE), self.folder)
        said = "\n".join(f"    {line}" for line in text.strip().splitlines()[-_LAST_LINES:])
        msg = f"downloading wheels for hosts failed ({len(wheels)} of them, {wheels[0].file} first):\n{said}"
        return ClusterStartError(msg, hint="run the same command again: downloaded wheels are kept", step=STEP)

    def _accept(self, path: Path, wheel: Wheel) -> Wheel:
        """Compare a downloaded file with its checksum in the index, and keep it."""
        with storage_errors(self.path(wheel)):
            if not path.is_file():
                msg = f"pip did not download {wheel.file}"
                raise TransferError(msg, hint="run the same command again")
            sha256, size = sha256_of(path), path.stat().st_size
            if wheel.sha256 not in {"", sha256}:
                msg = f"{wheel.file} arrived with the checksum {sha256}, not {wheel.sha256}"
                raise TransferError(msg, hint="run the same command again; a proxy may have changed it")
            wheel = wheel.model_copy(update={"sha256": sha256, "bytes": size})
            self._keep(path, wheel)
            return wheel

    def _keep(self, path: Path, wheel: Wheel) -> None:
        sync(path)
        self.path(wheel).parent.mkdir(mode=0o700, exist_ok=True)
        path.replace(self.path(wheel))

    def _incoming(self) -> Path:
        """Create a folder for downloads; remove those of killed processes. The caller holds the lock."""
        for left in self.folder.glob(".incoming-*"):
            shutil.rmtree(left, ignore_errors=True)
        folder = self.folder / f".incoming-{os.getpid()}"
        make_private_dir(folder)
        return folder

    @contextlib.asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        path, deadline = self.folder / "lock", time.monotonic() + GATHER_S
        while time.monotonic() < deadline:
            with contextlib.ExitStack() as stack:
                with storage_errors(path):
                    locked = stack.enter_context(try_lock(path))
                if locked:
                    yield
                    return
            await anyio.sleep(_POLL_S)
        msg = f"another raylaunch has been gathering wheels for more than {GATHER_S:.0f} s"
        raise ConflictError(msg, hint=f"see which process: fuser -v {path}")


def _key(requirements: Sequence[str], preferences: Mapping[str, str], platform: WheelPlatform) -> str:
    facts = [sorted(requirements), sorted(preferences.items()), platform.arch, platform.glibc, platform.python]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _pinned(wheel: Wheel) -> str:
    return f"{wheel.url}#sha256={wheel.sha256}" if wheel.sha256 else wheel.url


def _groups(wheels: Sequence[Wheel]) -> list[list[Wheel]]:
    """Distribute wheels among programs: the largest first, so few in each that an interruption costs little."""
    count = max(1, min(len(wheels), max(_AT_ONCE, -(-len(wheels) // _PER_PROGRAM))))
    groups: list[list[Wheel]] = [[] for _ in range(count)]
    for wheel in sorted(wheels, key=lambda one: -one.bytes):
        min(groups, key=lambda group: sum(one.bytes + _START_BYTES for one in group)).append(wheel)
    return [group for group in groups if group]


async def _each_second(tell: Callable[[], None]) -> None:
    while True:
        tell()
        await anyio.sleep(1)


def _size(folder: Path) -> int:
    total = 0
    for inner, _, names in os.walk(folder):  # pip removes files meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(inner, name).stat().st_size
    return total


def find_pip() -> list[str]:
    """Return the command of pip: from the wheel in virtualenv (which Ray needs), else the installed one.

    Raises:
        ClusterStartError: pip is not installed; environments made by uv have no pip.
    """
    carrier = importlib.util.find_spec("virtualenv")
    places = [Path(str(carrier.origin)).parent / "seed" / "wheels" / "embed"] if carrier and carrier.origin else []
    wheels = sorted((wheel for place in places for wheel in place.glob("pip-*.whl")), key=_release)
    if wheels:
        return [sys.executable, str(wheels[-1] / "pip")]
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    msg = "pip, which downloads wheels for hosts, is not installed here"
    raise ClusterStartError(msg, hint=f"{find_uv(os.environ)} pip install --python {sys.executable} pip", step=STEP)


def _release(wheel: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in wheel.name.split("-")[1].split(".") if part.isdigit())


def own_wheel() -> OwnWheel:
    """Build the wheel of the package that runs here, as it is on the disk now."""
    package = Path(str(raylaunch.__file__)).resolve().parent
    requirements = host_requirements(package)
    info = f"{_NAME}-{__version__}.dist-info"
    files = dict(_package_files(package)) | {
        f"{info}/METADATA": _metadata(requirements),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: raylaunch\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": b"[console_scripts]\nraylaunch = raylaunch.cli:main\n",
    }
    record = _record(files, f"{info}/RECORD")
    file = f"{_NAME}-{__version__}-py3-none-any.whl"
    digest = hashlib.sha256(record).hexdigest()  # it lists every file with its checksum
    return OwnWheel(file, _zip(files | {f"{info}/RECORD": record}), digest, requirements)


def host_requirements(package: Path) -> tuple[str, ...]:
    """Return what raylaunch needs on a host. In a checkout, pyproject.toml counts, not the installed metadata.

    Args:
        package: the folder of the package `raylaunch`.
    """
    stated = _of_checkout(package.parent / "pyproject.toml")
    if stated is None:
        stated = importlib.metadata.requires(_NAME) or []
    needed = [one for one in map(Requirement, stated) if "extra ==" not in str(one.marker)]
    return tuple(sorted(str(one) for one in needed if canonicalize_name(one.name) not in NOT_ON_HOSTS))


def _of_checkout(pyproject: Path) -> list[str] | None:
    if not pyproject.is_file():
        return None
    project = tomllib.loads(pyproject.read_text(encoding="utf-8")).get("project", {})
    return list(project.get("dependencies", [])) if project.get("name") == _NAME else None


def _package_files(package: Path) -> Iterator[tuple[str, bytes]]:
    yield from _files_below(package, _NAME)
    example = package.parent / "examples" / "digits"
    if not (package / "demo").exists() and example.is_dir():  # a built wheel has it inside already
        yield from _files_below(example, _DEMO)


def _files_below(folder: Path, name: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part == "__pycache__" or part.startswith(".") for part in inner.parts)
        if path.is_file() and not hidden and path.suffix not in {".pyc", ".pyo"}:
            yield f"{name}/{inner.as_posix()}", path.read_bytes()


def _metadata(requirements: Iterable[str]) -> bytes:
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {_NAME}",
        f"Version: {__version__}",
        f"Requires-Python: {_MINIMUM_PYTHON}",
    ]
    return "".join(f"{line}\n" for line in [*lines, *(f"Requires-Dist: {one}" for one in requirements)]).encode()


def _record(files: Mapping[str, bytes], own: str) -> bytes:
    lines = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in sorted(files.items())]
    return "".join(f"{line}\n" for line in [*lines, f"{own},,"]).encode()


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in sorted(files.items()):
            member = zipfile.ZipInfo(name, _EPOCH)
            member.external_attr = _MODE
            archive.writestr(member, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
