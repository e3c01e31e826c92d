"""Files of jobs: listing them, the manifest of sizes and sha256s, and disk usage."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, Field, ValidationError

from raylaunch.agent.attempt_dir import read_json
from raylaunch.contract import CHECKPOINTS, FACTS, LEFT_S, LOGS, OUTPUTS, WANDB, WITHHELD
from raylaunch.controller.store.journal import JOURNAL, write_problem
from raylaunch.errors import NotFoundError
from raylaunch.files import sha256_of, write_atomic
from raylaunch.models.job import Artifact, Usage
from raylaunch.models.states import JobState

MANIFEST = "manifest.json"
_INTERNAL = (f".{MANIFEST}.", f"{MANIFEST}.new", ".replicated.json", ".raylaunch-part")
"""Files whose names contain one of these are internal to the store, and are not listed."""

Kind: TypeAlias = Literal["output", "checkpoint", "log", "wandb", "record"]

_KINDS: dict[str, Kind] = {OUTPUTS: "output", CHECKPOINTS: "checkpoint", LOGS: "log", WANDB: "wandb"}


class ManifestEntry(BaseModel):
    """A file at the time of its checksum."""

    bytes: int
    sha256: str
    mtime_ns: int


class Manifest(BaseModel):
    """``manifest.json`` of a job: its files, by path relative to the job's folder."""

    files: dict[str, ManifestEntry] = Field(default_factory=dict)


class Left(NamedTuple):
    """Outputs of a job's last attempt that were not kept, and remain on its node for some days."""

    n: int
    """The attempt's number."""
    sizes: Mapping[str, int] = MappingProxyType({})
    """By path, relative to the working directory."""
    withheld: frozenset[str] = frozenset()
    """Those that look like secrets."""

    def name_of(self, path: str) -> str:
        """Return the one that `path` refers to, in the forms of `Artifacts.path`; else an empty string."""
        name = path.removeprefix(f"attempt-{self.n}/").removeprefix(f"{OUTPUTS}/")
        return name if name in self.sizes else ""


class Artifacts:
    """The files of all jobs of a store. May be used from several threads."""

    def __init__(self, store: Path) -> None:
        self._jobs = store / "jobs"
        self._lock = threading.Lock()
        self._noted: dict[str, dict[str, ManifestEntry]] = {}

    def files(self, job_id: str) -> tuple[Artifact, ...]:
        """Return the job's files, with checksums that are still valid; a folder's files come before its subfolders."""
        folder, known = self._jobs / job_id, self._known(job_id)
        found = [(path, _artifact(path, facts, known.get(path))) for path, facts in _walk(folder)]
        found += _links(folder, known)
        left = self.left(job_id)
        for path in left.sizes.keys() - {path.partition(f"attempt-{left.n}/{OUTPUTS}/")[2] for path, _ in found}:
            artifact = _artifact(f"attempt-{left.n}/{OUTPUTS}/{path}", None, None)
            facts = {"bytes": left.sizes[path], "left": True, "withheld": path in left.withheld}
            found.append((artifact.path, artifact.model_copy(update=facts)))
        return tuple(artifact for _, artifact in sorted(found, key=_sort_key))

    def left(self, job_id: str) -> Left:
        """Return the outputs that the last attempt has left on its node."""
        numbers = [int(path.parent.name[8:]) for path in (self._jobs / job_id).glob(f"attempt-*/{FACTS}")]
        n = max(numbers, default=0)
        facts = self._jobs / job_id / f"attempt-{n}" / FACTS
        try:
            if time.time() - facts.stat().st_mtime > LEFT_S:
                return Left(n)
        except OSError:
            return Left(n)
        found = read_json(facts) or {}
        left, withheld = found.get("left"), found.get("withheld")
        sizes = left.items() if isinstance(left, dict) else ()
        return Left(
            n,
            {path: size for path, size in sizes if isinstance(size, int) and size >= 0},
            frozenset(str(path) for path in withheld) if isinstance(withheld, list) else frozenset(),
        )

    def withheld(self, job_id: str, path: str) -> tuple[Path, Artifact]:
        """Return the path of an output that looks like a secret, once it was fetched for the job's owner.

        Args:
            job_id: the job's id.
            path: relative to the working directory.

        Raises:
            NotFoundError: it was not fetched.
        """
        n = self.left(job_id).n
        found = _inside(self._jobs / job_id / f"attempt-{n}" / WITHHELD, path)
        if found is None:
            msg = f"{job_id} has no file {path!r}"
            raise NotFoundError(msg)
        facts = found.stat()
        entry = ManifestEntry(bytes=facts.st_size, sha256=sha256_of(found), mtime_ns=facts.st_mtime_ns)
        return found, _artifact(f"attempt-{n}/{OUTPUTS}/{path}", facts, entry)

    def path(self, job_id: str, path: str) -> tuple[Path, Artifact]:
        """Return the path of a job's file in the store, and its facts.

        Args:
            job_id: the job's id.
            path: relative to the job's folder; or, in short, to the outputs or the folder of an attempt (the
                latest that has it).

        Raises:
            NotFoundError: the job has no such file, or the path leads out of the job's folder.
        """
        folder = self._jobs / job_id
        for candidate in _candidates(folder, path):
            found = _inside(folder, candidate)
            if found is not None and not _is_withheld(found.relative_to(folder.resolve()).parts):
                entry = self._known(job_id).get(candidate)
                return found, _artifact(candidate, found.stat(), entry)
        msg = f"{job_id} has no file {path!r}"
        raise NotFoundError(msg, hint=f"see its files: raylaunch files {job_id}")

    def note(self, job_id: str, path: str, *, size: int, sha256: str) -> None:
        """Note the checksum of a file that has just arrived; `finalize` stores it.

        Args:
            job_id: the job's id.
            path: relative to the job's folder, for example ``attempt-1/outputs/model.pt``.
            size: size to which the checksum belongs, bytes.
            sha256: in hex.
        """
        try:
            facts = (self._jobs / job_id / path).stat()
        except FileNotFoundError:
            return
        if facts.st_size == size:
            entry = ManifestEntry(bytes=size, sha256=sha256, mtime_ns=facts.st_mtime_ns)
            with self._lock:
                self._noted.setdefault(job_id, {})[path] = entry

    def finalize(self, job_id: str) -> Manifest:
        """Write ``manifest.json`` for all files that the job has now; missing checksums are computed.

        Reads files without a checksum: call it from a worker thread.

        Raises:
            StorageError: it cannot be written.
        """
        folder = self._jobs / job_id
        known = self._known(job_id)
        files: dict[str, ManifestEntry] = {}
        for path, facts in _walk(folder):
            if path in {MANIFEST, JOURNAL}:
                continue
            entry = known.get(path)
            if entry is None or not _current(entry, facts):
                sha256 = sha256_of(folder / path)
                entry = ManifestEntry(bytes=facts.st_size, sha256=sha256, mtime_ns=facts.st_mtime_ns)
            files[path] = entry
        manifest = Manifest(files=files)
        try:
            write_atomic(folder / MANIFEST, json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False))
        except OSError as error:
            raise write_problem(folder / MANIFEST, error) from error
        with self._lock:
            self._noted.pop(job_id, None)
        return manifest

    def outputs(self, job_id: str) -> tuple[int, int]:
        """Return number and size of the outputs; of files with the same name only the latest attempt's counts."""
        oldest_first = sorted(self._kept(job_id), key=lambda file: file.attempt)
        latest = {file.path.partition("/")[2]: file.bytes for file in oldest_first}
        return len(latest), sum(latest.values())

    def _kept(self, job_id: str) -> Iterator[Artifact]:
        return (file for file in self.files(job_id) if file.kind == "output" and not file.left and not file.link)

    def bytes_of(self, job_id: str) -> int:
        """Return the size of the job's files in the store."""
        return sum(facts.st_size for _, facts in _without_hard_links(_walk(self._jobs / job_id)))

    def usage(self, job_id: str, *, name: str, state: JobState) -> Usage:
        """Return a job's disk usage in the store. Walks its folder: call it from a worker thread."""
        sizes: dict[Kind, int] = {"output": 0, "checkpoint": 0, "log": 0, "wandb": 0, "record": 0}
        for path, facts in _without_hard_links(_walk(self._jobs / job_id)):
            sizes[_kind(path)] += facts.st_size
        return Usage(
            job=job_id,
            name=name,
            state=state,
            bytes=sum(sizes.values()),
            outputs=sizes["output"],
            checkpoints=sizes["checkpoint"],
            logs=sizes["log"],
            wandb=sizes["wandb"],
        )

    def free_bytes(self) -> int:
        """Return the free bytes on the store's disk."""
        return shutil.disk_usage(self._jobs).free

    def _known(self, job_id: str) -> dict[str, ManifestEntry]:
        try:
            written = Manifest.model_validate_json((self._jobs / job_id / MANIFEST).read_bytes()).files
        except (FileNotFoundError, ValidationError):
            written = {}  # a manifest can be recreated from the files
        with self._lock:
            return {**written, **self._noted.get(job_id, {})}


def _walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield regular files with their facts by name, a folder's files before its subfolders; links are not followed."""
    for root, folders, names in os.walk(folder):
        here = Path(root).relative_to(folder).parts
        folders[:] = sorted(name for name in folders if not _is_withheld((*here, name)))
        for name in sorted(name for name in names if not any(mark in name for mark in _INTERNAL)):
            path = Path(root, name)
            try:
                facts = path.lstat()
            except FileNotFoundError:
                continue
            if not path.is_symlink() and path.is_file():
                yield path.relative_to(folder).as_posix(), facts


def _is_withheld(parts: tuple[str, ...]) -> bool:
    """Whether a path in a job's folder is reserved for the job's owner."""
    return parts[1:2] == (WITHHELD,) and parts[0].startswith("attempt-")


def _without_hard_links(files: Iterable[tuple[str, os.stat_result]]) -> Iterator[tuple[str, os.stat_result]]:
    """Skip further hard links to one file: files that are unchanged since the previous attempt."""
    seen: set[tuple[int, int]] = set()
    for path, facts in files:
        if facts.st_nlink == 1 or (facts.st_dev, facts.st_ino) not in seen:
            seen.add((facts.st_dev, facts.st_ino))
            yield path, facts


def _links(folder: Path, known: Mapping[str, ManifestEntry]) -> Iterator[tuple[str, Artifact]]:
    """Yield links that stay inside: one to a file as that file, one to a folder with its target."""
    top = Path(os.path.realpath(folder))
    for root, folders, names in os.walk(folder):
        for name in [*names, *folders]:
            link = Path(root, name)
            if not link.is_symlink():
                continue
            path, target = link.relative_to(folder).as_posix(), Path(os.path.realpath(link))
            if not target.is_relative_to(top):
                continue
            if target.is_dir():
                artifact = _artifact(path, None, None)
                yield path, artifact.model_copy(update={"link": os.fspath(link.readlink())})
            elif target.is_file():
                yield path, _artifact(path, target.stat(), known.get(target.relative_to(top).as_posix()))


def _sort_key(found: tuple[str, Artifact]) -> tuple[tuple[int, str], ...]:
    """Sort key: a folder's files before its subfolders."""
    *folders, name = found[0].split("/")
    return (*((1, folder) for folder in folders), (0, name))


def _kind(path: str) -> Kind:
    parts = PurePosixPath(path).parts
    return _KINDS.get(parts[1], "record") if len(parts) > 2 else "record"  # noqa: PLR2004 -- attempt-1/outputs/x


def _artifact(path: str, facts: os.stat_result | None, entry: ManifestEntry | None) -> Artifact:
    first = path.partition("/")[0]
    number = first.removeprefix("attempt-")
    return Artifact(
        path=path,
        bytes=facts.st_size if facts else 0,
        sha256=entry.sha256 if facts and entry and _current(entry, facts) else "",
        kind=_kind(path),
        attempt=int(number) if first != number and number.isdigit() else 0,
    )


def _current(entry: ManifestEntry, facts: os.stat_result) -> bool:
    return entry.bytes == facts.st_size and entry.mtime_ns == facts.st_mtime_ns


def _candidates(folder: Path, path: str) -> Iterator[str]:
    yield path
    numbers = sorted(
        (int(found.name[8:]) for found in folder.glob("attempt-*") if found.name[8:].isdigit()), reverse=True
    )
    for within in (f"{OUTPUTS}/", ""):
        for number in numbers:
            yield f"attempt-{number}/{within}{path}"


def _inside(folder: Path, path: str) -> Path | None:
    """Return the file at `path` below `folder`; None if there is none, or if it leads out of the folder."""
    if "\0" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        return None
    try:
        real = (folder / path).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return None
    return real if real.is_relative_to(folder.resolve()) and real.is_file() else None
