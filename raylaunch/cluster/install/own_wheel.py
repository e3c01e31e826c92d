"""raylaunch's own wheel for hosts, made from the package that runs here. Hosts get no MCP server and no SSH client.

A wheel is a zip with a folder of metadata, so none of a build backend, a checkout or an index is needed: the same is
made from a checkout, an editable installation and an installed wheel.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import raylaunch
from raylaunch.version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_ON_HOSTS = frozenset({"mcp", "asyncssh"})
"""What only clients need."""

_NAME = "raylaunch"
_DEMO = "raylaunch/demo/digits"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MODE = 0o644 << 16
_MINIMUM_PYTHON = ">=3.10"


@dataclass(frozen=True)
class OwnWheel:
    """The wheel, in memory (about half a megabyte), and what it is known by."""

    file: str
    content: bytes = field(repr=False)
    digest: str
    """SHA-256 of what is in it, the same wherever it was packed."""
    requirements: tuple[str, ...]
    """What a host needs beside it."""

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.content).hexdigest()


def own_wheel() -> OwnWheel:
    """Make the wheel of the package that runs here, as it is on the disk now."""
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
    """Return what raylaunch needs on a host. A checkout's own list counts, not what was noted when it was installed.

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
