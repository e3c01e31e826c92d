"""Wheels that were pushed in one piece: a tar file of ``<sha256>/<file>`` each, below the host's folder of wheels."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tarfile
import time
from pathlib import Path

from raylaunch.cluster.installer.places import Places
from raylaunch.cluster.installer.words import Request, TransferProblem

_SHA256_DIGITS = 64
_OLD_S = 24 * 3600.0


def unpack(request: Request) -> dict[str, object]:
    """Put the wheels of the request's bundle into their places, unless that was done already.

    They are not forced to the disk, which takes longest: `make` compares all checksums before it uses any.

    Raises:
        Problem: it is damaged, or the disk is full.
    """
    places = Places(request)
    if request.bundle:
        _unpack(places, Path(request.bundle))
        _sweep(places)
    return {"wheels": str(places.wheels)}


def _unpack(places: Places, bundle: Path) -> None:
    folder = places.wheels / f".unpacking-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with contextlib.suppress(FileNotFoundError), tarfile.open(bundle) as archive:
            for member in archive:
                content = archive.extractfile(member)
                _write(folder, member.name, content.read() if content else b"")
        for path in folder.glob("*/*"):
            target = places.wheels / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        bundle.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, name: str, content: bytes) -> None:
    sha256, _, file = name.partition("/")
    if len(sha256) != _SHA256_DIGITS or not file or "/" in file or hashlib.sha256(content).hexdigest() != sha256:
        msg = f"{name} did not arrive as it was sent"
        raise TransferProblem(msg, "run the same command again: it is pushed anew")
    (folder / sha256).mkdir(parents=True)
    (folder / sha256 / file).write_bytes(content)


def _sweep(places: Places) -> None:
    """Remove bundles whose clients never came back."""
    for bundle in places.wheels.glob(".bundle-*"):
        with contextlib.suppress(OSError):
            if time.time() - bundle.stat().st_mtime > _OLD_S:
                bundle.unlink()
