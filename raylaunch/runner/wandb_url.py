"""Where an on-line run can be seen: the address that W&B itself prints into the training's log.

Only the server knows the entity when the person names none; neither the run's file nor its settings hold it. So what
W&B says is read: ``wandb: 🚀 View run at https://…/team/project/runs/ID``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

_LOOK_INTO = 32 * 1024 * 1024
_BLOCK = 1024 * 1024
_OVERLAP = 4096
_PUBLIC = frozenset({"wandb.ai", "forge.coreweave.com"})


def hosts_of(server: str, environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Return where W&B shows the runs of a server: its own address, and the page that belongs to an API's."""
    host = urlsplit(server).netloc
    bare = re.sub(r"^api\.", "", host)  # Python 3.8
    pages = {*(_PUBLIC if bare in _PUBLIC else ()), urlsplit(environ.get("WANDB_APP_URL", "")).netloc}
    return frozenset({host, bare, f"app.{bare}", *pages}) - {"", "app."}


class RunAddress:
    """Looks for a run's address in a growing log, as far as it has not been found.

    A program may print any address: only one at W&B's own server counts.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self.hosts: frozenset[str] = frozenset()
        """Where a run may be shown: see `hosts_of`."""
        self._run_id = ""
        self._at = 0
        self.url = ""

    def look(self, run_id: str) -> bool:
        """Read on in the log, from its beginning for another run; True when the address has been found just now."""
        if run_id != self._run_id:
            self._run_id, self._at, self.url = run_id, 0, ""
        if self.url or self._at >= _LOOK_INTO:
            return False
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, self._at - _OVERLAP))
                block = log.read(_BLOCK + _OVERLAP)
                end = log.tell()
        except FileNotFoundError:
            return False
        hosts = b"|".join(re.escape(host.encode()) for host in sorted(self.hosts))
        part = rb"[\w.%~-]+"
        run = re.escape(run_id.encode())
        pattern = rb"https?://(?:%s)/(?:%s/)*%s/%s/runs/%s(?![\w-])" % (hosts, part, part, part, run)
        found = re.search(pattern, block) if hosts and end > self._at else None
        self._at = end
        if found is not None:
            self.url = found.group().decode("utf-8", "replace")
        return found is not None
