"""Asking this node whether the Ray of a job's environment fits the cluster's, before the job is taken in."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from raylaunch.runner.contract import RUNNER

LIMIT_S = 20.0


def ask(root: Path, question: Mapping[str, object], runner: bytes) -> tuple[str, str]:
    """Return what does not fit, and what mends it; nothing when it fits, or cannot be known here within `LIMIT_S`.

    Args:
        root: The node root.
        question: For `raylaunch.runner.ray_fit`: ``environment``, ``env`` and ``files``.
        runner: Bytes of the runner's zip, which knows how environments are prepared.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fit-", dir=root) as folder:
        archive = Path(folder) / RUNNER
        archive.write_bytes(runner)
        asked = json.dumps({**question, "envs": str(root / "envs")})
        try:
            done = subprocess.run(  # noqa: S603 -- a list of ours, no shell
                [sys.executable, "-I", str(archive), "--fit"],
                input=asked.encode(),
                capture_output=True,
                timeout=LIMIT_S,
                check=True,
                start_new_session=True,
            )
            answer = json.loads(done.stdout)
            return str(answer["what"]), str(answer["mend"])
        except (subprocess.SubprocessError, OSError, ValueError, KeyError):
            return "", ""
