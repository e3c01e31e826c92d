"""Secrets of the cluster, and those that came with a job. They are stored in 0600 files and nowhere else."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raylaunch.controller.store.journal import write_problem
from raylaunch.errors import NotFoundError, SpecError, StorageError
from raylaunch.files import write_atomic

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path`, 0600: as a whole, and on the disk.

    Raises:
        StorageError: it cannot be written; the old file remains.
    """
    try:
        write_atomic(path, text, only_writer=True)
    except OSError as error:
        raise write_problem(path, error) from error


class SecretStore:
    """``secrets.json`` and ``job_secrets/`` of one store. Values are sent to nodes only.

    `names`, `put` and `remove` may be called from any thread.

    ``secret_people.json`` lists whose jobs get a secret; one that is not in it is available to all.
    """

    def __init__(self, store: Path) -> None:
        self._path = store / "secrets.json"
        self._people_path = store / "secret_people.json"
        self._jobs = store / "job_secrets"
        self._jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()

    def names(self) -> tuple[str, ...]:
        """Return the names of the cluster's secrets, sorted."""
        return tuple(sorted(_read(self._path)))

    def put(self, name: str, value: str, people: Sequence[str] | None = None) -> None:
        """Set a secret of the cluster.

        Args:
            name: its name.
            value: its value.
            people: whose jobs get it; empty for all. None leaves that unchanged.

        Raises:
            SpecError: the name is not a valid variable name, or the value is invalid.
            StorageError: it cannot be written; the old value remains.
        """
        _check(name, value)
        with self._lock:
            if people:
                self._restrict(name, people)  # before the value is there
            _write(self._path, {**_read(self._path), name: value})
            if people is not None and not people:
                self._restrict(name, ())

    def _restrict(self, name: str, people: Sequence[str]) -> None:
        known = {key: who for key, who in self._people().items() if key != name}
        write_private(self._people_path, json.dumps({**known, name: list(people)} if people else known))

    def _people(self) -> dict[str, list[str]]:
        return _loaded(self._people_path)

    def withheld(self, names: Iterable[str], person: str) -> tuple[str, ...]:
        """Return those of `names` that are set, but not available to a person's jobs."""
        people, known = self._people(), _read(self._path)
        return tuple(name for name in names if name in known and name in people and person not in people[name])

    def remove(self, name: str) -> None:
        """Delete a secret of the cluster.

        Raises:
            NotFoundError: there is none with this name.
        """
        with self._lock:
            known = _read(self._path)
            if name not in known:
                msg = f"no such secret: {name!r}"
                raise NotFoundError(msg, hint="list them: raylaunch secret list")
            _write(self._path, {key: value for key, value in known.items() if key != name})
            self._restrict(name, ())

    def put_job(self, job_id: str, values: Mapping[str, str]) -> None:
        """Store the values that came with a job, until `forget_job`. Nothing is written if there are none.

        Raises:
            SpecError: a name is not a valid variable name, or a value is invalid.
            StorageError: they cannot be written.
        """
        self.check(values)
        if values:
            _write(self._jobs / f"{job_id}.json", dict(values))

    def check(self, values: Mapping[str, str]) -> None:
        """Refuse invalid names and values.

        Raises:
            SpecError: a name is not a valid variable name, or a value is invalid.
        """
        for name, value in values.items():
            _check(name, value)

    def missing(self, names: Iterable[str], *, given: Mapping[str, str]) -> tuple[str, ...]:
        """Return those of `names` that are neither `given` with a job nor set on the cluster."""
        known = _read(self._path)
        return tuple(name for name in names if name not in given and name not in known)

    def for_job(self, job_id: str, names: Iterable[str], person: str) -> dict[str, str]:
        """Return the values of `names` for a person's job, and all that came with it; these take precedence.

        Names without a value are omitted, and so are secrets of the cluster that are for other people.
        """
        names = tuple(names)
        own = _read(self._jobs / f"{job_id}.json")
        others = self.withheld(names, person)
        known = {**{name: value for name, value in _read(self._path).items() if name not in others}, **own}
        return {name: known[name] for name in [*names, *own] if name in known}

    def forget_job(self, job_id: str) -> None:
        """Delete the values that came with a job."""
        (self._jobs / f"{job_id}.json").unlink(missing_ok=True)

    def keep_only(self, jobs: Iterable[str]) -> None:
        """Delete the values of all other jobs, which a crash may have left behind."""
        kept = {f"{job}.json" for job in jobs}
        for path in self._jobs.iterdir():
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _check(name: str, value: str) -> None:
    if not _VARIABLE.fullmatch(name):
        msg = f"{name!r} is not a valid name for a secret"
        raise SpecError(msg, hint="use letters, digits and '_', as for an environment variable")
    if not value or "\0" in value:
        what = "is empty" if not value else "contains a NUL byte"
        msg_0 = f"the value of {name} {what}"
        raise SpecError(msg_0, hint="give a value that can be an environment variable")


def _read(path: Path) -> dict[str, str]:
    return {str(key): str(value) for key, value in _loaded(path).items()}


def _loaded(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        msg = f"the secrets in {path} cannot be read: {type(error).__name__}"
        raise StorageError(
            msg, hint=f"check {path}, or delete it and set them again: raylaunch secret set NAME"
        ) from None
    return found


def _write(path: Path, values: Mapping[str, str]) -> None:
    write_private(path, json.dumps(values))
