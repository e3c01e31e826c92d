"""W&B's core started apart from the training, for versions that write the run's file in blocks only (before 0.31).

Their core ends with the training that started it, and what is in the unfinished block is lost with a SIGKILL, or with a
SIGTERM that nobody handles. A core that was started before (``wandb beta core start``, found by WANDB_SERVICE) lives
on; told to end, it writes all that it was given: of a killed training with 0.28, 0.29 and 0.30 every row was in its
file then. It costs the time of importing wandb once more. A run that is ended so counts as finished at W&B, for a core
apart cannot know how its training ended.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from raylaunch.runner.environment import Prepared
from raylaunch.runner.watch import Pulse, run_program

if TYPE_CHECKING:
    from raylaunch.runner.builds import Place

VARIABLE = "WANDB_SERVICE"
_START_S = 60.0
_TELL_S = 2.0
_TOKEN = re.compile(r"^3-\d+-(?:unix-(?P<path>\S+)|tcp-localhost-(?P<port>\d+))$", re.MULTILINE)
_END = b"W\x02\x00\x00\x00\x3a\x00"
"""What ``wandb beta core stop`` sends in these versions: ``W``, the length, an empty `inform_teardown` (field 7). The
command itself would take a second to start, which is more than Ray's stop leaves."""


def start(prepared: Prepared, place: Place, pulse: Pulse) -> str:
    """Start a core; returns the value of `VARIABLE` that makes a training use it, or nothing when it did not start.

    Raises:
        StopAsked: meanwhile somebody wants the attempt to end.
    """
    argv = [prepared.python, "-m", "wandb", "beta", "core", "start", "--idle-timeout", "0"]
    place.tmp.mkdir(parents=True, exist_ok=True)
    try:
        with (place.tmp / "wandb-core.out").open("w+b") as output:
            ran = run_program(argv, env=prepared.env, cwd=place.tmp, timeout_s=_START_S, pulse=pulse, output=output)
    except OSError:
        return ""
    found = _TOKEN.search(ran.output) if ran.status == 0 else None
    return found.group() if found is not None else ""


def tell_to_end(service: str) -> None:
    """Tell a core that `start` started to write what it has, and to end. One that is gone already is no problem."""
    found = _TOKEN.fullmatch(service)
    if found is None:
        return
    import socket  # noqa: PLC0415 -- for older versions of W&B alone; each start would pay for it

    path, port = found.group("path", "port")
    try:
        with socket.socket(socket.AF_UNIX if path else socket.AF_INET, socket.SOCK_STREAM) as core:
            core.settimeout(_TELL_S)
            core.connect(path or ("127.0.0.1", int(port)))
            core.sendall(_END)
    except OSError:
        return
