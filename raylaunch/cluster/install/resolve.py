"""From requirements to the wheels that fit a host, with ``uv``: names, versions, addresses, sizes and checksums.

uv resolves for another platform than this one, and prefers given versions if they fit. It reads its own configuration;
if that names no index, it gets the settings of pip's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

import anyio
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from pydantic import BaseModel, ConfigDict, Field

from raylaunch.cluster.commands import run_program
from raylaunch.cluster.install.platforms import WheelPlatform
from raylaunch.cluster.installer.tools import index_settings
from raylaunch.errors import ClusterStartError, VersionError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RESOLVE_S = 300.0
STEP = "wheels"

_UNREACHABLE = re.compile(
    r"failed to fetch|error sending request|client error \(connect\)|dns error|timed out|offline|status code 5",
    re.IGNORECASE,
)
_NO_WHEEL = re.compile(
    r"(?:Because |and |only )`?([A-Za-z0-9._-]+?)(?:\[\S+\])?(?:==\S+)?`? (?:has no|have no) [^,]*?wheels?"
)
_LAST_LINES = 20


class Wheel(BaseModel):
    """One wheel: a file with a name, a size and a checksum."""

    model_config = ConfigDict(frozen=True)

    name: str
    version: str
    file: str
    sha256: str
    bytes: int
    url: str = Field(default="", exclude=True, repr=False)
    """Its address on the index; not saved, because an index may change its addresses."""


_KEPT = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TMPDIR|XDG_\w+|DBUS_SESSION_BUS_ADDRESS|NETRC|(?:UV|PIP)_\w+"
    r"|SSL_CERT_(?:FILE|DIR)|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|(?:HTTPS?|ALL|NO|FTP)_PROXY",
    re.IGNORECASE,
)


def tool_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that uv and pip need: their settings, proxies and certificates, and no other secrets."""
    return {name: value for name, value in environ.items() if _KEPT.fullmatch(name)}


def find_uv(environ: Mapping[str, str]) -> str:
    """Return the path of the program uv, which is installed with raylaunch.

    Raises:
        ClusterStartError: it is not installed.
    """
    beside = Path(sysconfig.get_path("scripts")) / "uv"
    found = str(beside) if beside.exists() else shutil.which("uv", path=environ.get("PATH", os.defpath))
    if found is None:
        msg = "the program uv, which finds what a host needs, is not installed here"
        raise ClusterStartError(msg, hint=f"{sys.executable} -m pip install uv", step=STEP)
    return found


async def resolve(
    requirements: Sequence[str], preferences: Mapping[str, str], platform: WheelPlatform, *, environ: Mapping[str, str]
) -> tuple[Wheel, ...]:
    """Find the wheels of all requirements for that platform, in the preferred versions if they fit.

    If one of several indexes has wheels of the preferred version, but none that fits, uv does not check the others.
    Then that preference is dropped, and finally all of them.

    Raises:
        ClusterStartError: the index cannot be reached from here, or uv is not here or does not end.
        VersionError: nothing fits: a package has no wheel for the platform, or versions contradict each other.
    """
    left = dict(preferences)
    while True:
        try:
            return await _resolve(requirements, left, platform, environ)
        except NoWheelError as error:
            dropped = error.names & left.keys()
            if not left:
                raise
        left = {name: version for name, version in left.items() if dropped and name not in dropped}


async def _resolve(
    requirements: Sequence[str], preferences: Mapping[str, str], platform: WheelPlatform, environ: Mapping[str, str]
) -> tuple[Wheel, ...]:
    with TemporaryDirectory(prefix="raylaunch-resolve-") as name:  # no project of the user's applies there
        folder = Path(name)
        lock = folder / "pylock.toml"
        if preferences:
            await anyio.to_thread.run_sync(lock.write_text, _preferred(preferences))
        argv = [find_uv(environ), "pip", "compile", "-", "--quiet", "--no-build", "--no-header", "--color=never"]
        argv += ["--python-version", platform.python, "--python-platform", platform.uv_name]
        argv += ["--format", "pylock.toml", "--output-file", str(lock)]
        body = "".join(f"{one}\n" for one in requirements).encode()
        env = {**tool_environment(environ), **index_settings(environ), "UV_NO_PROGRESS": "1"}
        ran = await run_program(argv, input=body, cwd=folder, env=env, limit_s=RESOLVE_S, step=STEP)
        if ran.status != 0:
            raise _problem(ran.text, platform)
        return _wheels(tomllib.loads(lock.read_text(encoding="utf-8")), folder, platform)


def _preferred(preferences: Mapping[str, str]) -> str:
    """Format versions as the lock file of an earlier resolution, which uv follows if it can."""
    packages = (
        f"[[packages]]\nname = {json.dumps(name)}\nversion = {json.dumps(version)}\n"
        for name, version in preferences.items()
    )
    return "\n".join(['lock-version = "1.0"\ncreated-by = "raylaunch"\n', *packages])


def _wheels(lock: dict[str, object], folder: Path, platform: WheelPlatform) -> tuple[Wheel, ...]:
    packages = lock.get("packages", [])
    if not isinstance(packages, list):
        packages = []
    return tuple(_best(_Package.model_validate(package), folder, platform) for package in packages)


class _File(BaseModel):
    url: str = ""
    path: str = ""
    size: int = 0
    hashes: dict[str, str] = Field(default_factory=dict)


class _Package(BaseModel):
    name: str
    version: str = ""
    wheels: tuple[_File, ...] = ()


def _best(package: _Package, folder: Path, platform: WheelPlatform) -> Wheel:
    ranked = sorted((_rank(file, platform), index) for index, file in enumerate(package.wheels))
    if not ranked or ranked[0][0] == len(platform.tags):
        msg = f"{package.name} {package.version} has no wheel for {platform}"
        raise VersionError(msg, hint=_NO_WHEEL_HINT)
    best = package.wheels[ranked[0][1]]
    url = best.url or (folder / best.path).resolve().as_uri()
    return Wheel(
        name=str(canonicalize_name(package.name)),
        version=package.version,
        file=_file_name(best),
        sha256=best.hashes.get("sha256", ""),
        bytes=best.size,
        url=url,
    )


def _file_name(file: _File) -> str:
    return unquote((urlsplit(file.url).path or file.path).rpartition("/")[2])


def _rank(file: _File, platform: WheelPlatform) -> int:
    worst = len(platform.tags)
    try:
        tags = parse_wheel_filename(_file_name(file))[3]
    except InvalidWheelFilename:
        return worst
    return min(platform.tags.get(tag, worst) for tag in tags)


_NO_WHEEL_HINT = (
    "put a wheel of it where pip or uv find it (find-links), or name an environment that has it (environment: …)"
)


def _problem(text: str, platform: WheelPlatform) -> ClusterStartError | VersionError:
    last = "\n".join(f"    {line}" for line in text.strip().splitlines()[-_LAST_LINES:])
    if _UNREACHABLE.search(text):
        msg = f"the package index cannot be reached from here:\n{last}"
        hint = "check the network and the index in pip's or uv's configuration (pip config list)"
        return IndexUnreachableError(msg, hint=hint, step=STEP)
    without = frozenset(str(canonicalize_name(name)) for name in _NO_WHEEL.findall(text))
    if without:
        msg = f"{', '.join(sorted(without))}: no wheel for {platform}\n{last}"
        return NoWheelError(msg, hint=_NO_WHEEL_HINT, names=without)
    if "No solution found" in text:
        return VersionError(f"nothing on the package index fits {platform}:\n{last}", hint=_NO_WHEEL_HINT)
    return ClusterStartError(f"uv could not find what a host with {platform} needs:\n{last}", step=STEP)


class IndexUnreachableError(ClusterStartError):
    """The package index cannot be reached from here; a host may still reach one."""


class NoWheelError(VersionError):
    """The packages in `names` have no wheel that fits."""

    def __init__(self, message: str, *, hint: str = "", names: frozenset[str] = frozenset()) -> None:
        super().__init__(message, hint=hint)
        self.names = names
