"""What Ray itself brings to a node without a steward: a job's code, its runner, and what that is told, as one zip."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from raylaunch.errors import ConflictError, NotFoundError
from raylaunch.runner.archive import runner_zip
from raylaunch.runner.contract import ATTEMPT, BROUGHT, PACKAGE, RUNNER, AttemptSpec

LIMIT = 100 * 1024 * 1024
"""What Ray's Jobs API takes at most."""

COMMAND = f'exec "$(readlink -f /proc/$PPID/exe || command -v python3)" -I {BROUGHT}/{RUNNER} --alone {BROUGHT}'
"""The entrypoint: the shell's parent is Ray's own process, and so there is a Python, whatever PATH says."""

_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Upload:
    """A zip for Ray, and the name by which Ray knows its content."""

    name: str
    data: bytes

    @property
    def uri(self) -> str:
        """Return what a runtime environment calls it."""
        return f"gcs://{self.name}"


def pack(spec: AttemptSpec, package: Path | None) -> Upload:
    """Make the zip of one attempt.

    Args:
        spec: what its runner is told; it holds no secret.
        package: the job's code as it lies in the store, a ``.tar.gz``; None for a job without code.

    Raises:
        ConflictError: it is larger than Ray takes.
        NotFoundError: the package is not in the store.
    """
    code = _read(package) if package is not None else b""
    _check(len(code))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # all of it is compressed already
        for name, data in ((ATTEMPT, json.dumps(spec).encode()), (RUNNER, runner_zip()), (PACKAGE, code)):
            archive.writestr(zipfile.ZipInfo(f"{BROUGHT}/{name}", _EPOCH), data)
    _check(buffer.tell())
    return Upload(f"_ray_pkg_{hashlib.sha256(buffer.getvalue()).hexdigest()[:32]}.zip", buffer.getvalue())


def _read(package: Path) -> bytes:
    try:
        _check(package.stat().st_size)
        return package.read_bytes()
    except FileNotFoundError:
        msg = f"the package {package.name.partition('.')[0][:12]} is not in the store"
        raise NotFoundError(msg, hint="submit again") from None


def _check(size: int) -> None:
    if size > LIMIT:
        msg = f"the code is larger than the {LIMIT // 1024**2} MiB that Ray's Jobs address takes"
        hint = "leave large files out by .raylaunchignore, and load data from where the nodes reach it"
        raise ConflictError(msg, hint=hint)
