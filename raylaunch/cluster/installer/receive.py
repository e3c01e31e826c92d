"""While a client pushes wheels: holds their lock, and unpacks small ones that come in one piece.

Two clients that pushed the same file would take each other's half of it for their own. The lock is freed when the
client's words end; or when it says nothing any more, for where a link is cut the host may not notice for hours.
"""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import tarfile
import time
from pathlib import Path

from raylaunch.cluster.installer.places import Places, is_taken
from raylaunch.cluster.installer.words import Request, TransferProblem, say

_TELL_EVERY_S = 0.5
_SHA256_DIGITS = 64


def receive(request: Request) -> dict[str, object]:
    """Hold the lock of the host's wheels while lines come on stdin: each is a bundle to unpack, or a sign of life.

    Raises:
        Problem: a bundle is damaged, or the disk is full.
    """
    places = Places(request)
    places.make()
    with (places.wheels / ".lock").open("a+b") as lock:
        while not is_taken(lock.fileno()):
            say("state", "waits")
            time.sleep(_TELL_EVERY_S)
        say("state", "holds")
        held = b""
        while select.select([0], [], [], request.patience_s)[0] and (data := os.read(0, 65536)):
            *lines, held = (held + data).split(b"\n")
            for line in filter(None, lines):
                _unpack(Path(line.decode()), places)
                say("state", "unpacked")
    return {"done": True}


def _unpack(bundle: Path, places: Places) -> None:
    """Put the wheels of a tar file (``<sha256>/<file>`` each) into their places.

    They are not forced to the disk, which takes longest: `make` compares all checksums before it uses any.
    """
    folder = places.wheels / f".unpacking-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with tarfile.open(bundle) as archive:
            for member in archive:
                content = archive.extractfile(member)
                _write(folder, member.name, content.read() if content else b"")
        for path in folder.glob("*/*"):
            target = places.wheels / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        bundle.unlink(missing_ok=True)


def _write(folder: Path, name: str, content: bytes) -> None:
    sha256, _, file = name.partition("/")
    if len(sha256) != _SHA256_DIGITS or not file or "/" in file or hashlib.sha256(content).hexdigest() != sha256:
        msg = f"{name} did not arrive as it was sent"
        raise TransferProblem(msg, "run the same command again: it is pushed anew")
    (folder / sha256).mkdir(parents=True)
    (folder / sha256 / file).write_bytes(content)
