"""A job's folder in the store: its name, and what is written into it for people."""

from __future__ import annotations

import base64
import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path

import yaml

from raylaunch.controller import journal
from raylaunch.controller.record import JobRecord


def free_id(jobs: Path, name: str) -> str:
    """Return an id for a new job of this name, of which there is no folder in `jobs`."""
    while True:
        job_id = f"{name}-{base64.b32encode(secrets.token_bytes(4)).decode().lower()[:6]}"
        if not (jobs / job_id).exists():
            return job_id


def make(folder: Path, record: JobRecord) -> None:
    """Make the folder of a new job, with its spec and the changes that were not committed.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(mode=0o700)
    journal.sync_folder(folder.parent)
    if record.spec is not None:
        spec = record.spec.model_dump(mode="json", exclude_defaults=True)
        journal.write_text(folder / "spec.yaml", yaml.safe_dump(spec, sort_keys=False, allow_unicode=True))
    if record.git is not None and record.git.diff:
        journal.write_text(folder / "git.diff", record.git.diff)


def write_packages(folder: Path, packages: Sequence[str]) -> None:
    """Write which packages the job's environment had; the record has them too, so that a failure is no harm."""
    with contextlib.suppress(OSError):
        journal.write_text(folder / "packages.txt", "\n".join(packages) + "\n")
