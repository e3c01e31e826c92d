"""Where an on-line run can be seen: the address that W&B itself prints into the training's log.

Only the server knows the entity when the person names none; neither the run's file nor its settings hold it. So what
W&B says is read: ``wandb: 🚀 View run at https://…/team/project/runs/ID``.
"""

from __future__ import annotations

import re
from pathlib import Path

_LOOK_INTO = 32 * 1024 * 1024
_BLOCK = 1024 * 1024
_OVERLAP = 4096


class RunAddress:
    """Looks for a run's address in a growing log, as far as it has not been found."""

    def __init__(self, log: Path) -> None:
        self._log = log
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
        pattern = rb"https?://[^\s\x1b\"'<>]+/runs/" + re.escape(run_id.encode()) + rb"(?![\w-])"
        found = re.search(pattern, block) if end > self._at else None
        self._at = end
        if found is not None:
            self.url = found.group().decode("utf-8", "replace")
        return found is not None
