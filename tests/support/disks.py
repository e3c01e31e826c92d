"""A disk that is full: a tiny file system of the test's own."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, *, kib: int, options: str = "exec") -> Iterator[Path]:
    """Mount an empty file system of `kib` KiB at `folder`; skip the test where that is not possible."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={kib}k,mode=0700,{options}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, *, but_kib: int = 0) -> Path:
    """Fill the disk of `folder` with a file, leaving about `but_kib` KiB, and return the file. Others may write too."""
    ballast = folder / "ballast"
    left = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - but_kib * 1024
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while left > 0:
            left -= file.write(b"\0" * min(left, 65536)) or 0
    return ballast
