"""Which hosts are drained: ``drains.json`` in the store. A drained host gets no new attempts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from raylaunch.cluster_state import Drain
from raylaunch.controller.private_file import write_private
from raylaunch.errors import NotFoundError

_log = logging.getLogger(__name__)

_DRAINS: TypeAdapter[dict[str, Drain]] = TypeAdapter(dict[str, Drain])


class DrainBook:
    """The drains of one store, by host. One whose time has come is over by itself.

    Args:
        store: the store's folder.
        clock: the time now, seconds since the epoch.
    """

    def __init__(self, store: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = store / "drains.json"
        self._clock = clock
        self.problem = ""
        """Why the file could not be read at the start, in words; nothing is drained then."""
        self._known = self._read()

    def now(self) -> Mapping[str, Drain]:
        """Return the drains that hold now."""
        at = self._clock()
        return {host: drain for host, drain in self._known.items() if drain.until is None or drain.until > at}

    def put(self, drain: Drain) -> None:
        """Drain a host; a later drain of it replaces the earlier.

        Raises:
            StorageError: it cannot be written; all is as it was.
        """
        self._write({**self.now(), drain.host: drain})

    def remove(self, host: str) -> None:
        """Let a host take jobs again.

        Raises:
            NotFoundError: it is not drained.
            StorageError: it cannot be written; all is as it was.
        """
        now = self.now()
        if host not in now:
            msg = f"{host} is not drained"
            raise NotFoundError(msg, hint="see which hosts are: raylaunch status")
        self._write({name: drain for name, drain in now.items() if name != host})

    def _read(self) -> dict[str, Drain]:
        try:
            return _DRAINS.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            self.problem = f"{self._path} cannot be read ({type(error).__name__}), so no host counts as drained"
            _log.warning("%s", self.problem)
            return {}

    def _write(self, drains: Mapping[str, Drain]) -> None:
        text = json.dumps({host: drain.model_dump(mode="json") for host, drain in drains.items()}, indent=2)
        write_private(self._path, text)
        self._known, self.problem = dict(drains), ""
