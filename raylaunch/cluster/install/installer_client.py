"""Running the installer (`raylaunch.cluster.installer`) on a host: its source is sent with one request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from raylaunch.cluster import installer
from raylaunch.cluster.types import Step
from raylaunch.errors import HostError, HostStepError, RaylaunchError, from_wire
from raylaunch.ssh.host import SSHHost
from raylaunch.ssh.process import RemoteLines
from raylaunch.ssh.scripts import Script

OnStep = Callable[[Step], None]

STEP = "install"
_LAST_LINES = 12
_CANNOT_RUN = (126, 127)

_PACKAGE = "raylaunch.cluster.installer"
# Imports modules from the line that comes on stdin: the host has none of our files yet.
_LOADER = """
import json, sys
from importlib.machinery import ModuleSpec
order = json.loads(sys.stdin.readline())
texts = order["modules"]
class Sent:
    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self, is_package=not texts[name]) if name in texts else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        exec(compile(texts[module.__name__], module.__name__, "exec"), module.__dict__)
sys.meta_path.insert(0, Sent())
from raylaunch.cluster.installer.environment import main
sys.exit(main(order["request"]))
"""

_NAMED = """
case $1 in '~'/*) named=$HOME/${1#??} ;; *) named=$1 ;; esac
for python in "$named/bin/python" "$named/bin/python3" "$named"; do
    [ -f "$python" ] && [ -x "$python" ] && exec "$python" -I -c "$2"
done
printf '%s is neither a Python interpreter nor an environment with bin/python\\n' "$named" >&2
exit 127
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python on a host: its path or, if `named`, the path of its environment."""

    path: str
    named: bool = False

    def runs(self, program: str) -> Sequence[str] | Script:
        """Return the command that runs a program with it, isolated from the user's settings."""
        if self.named:
            return Script(_NAMED, args=(self.path, program), name=STEP)
        return [self.path, "-I", "-c", program]


class _Answer(BaseModel):
    """One line of the installer."""

    model_config = ConfigDict(extra="forbid")

    step: Step | None = None
    error: dict[str, str] | None = None
    result: dict[str, object] | None = None

    @staticmethod
    def read(line: bytes) -> _Answer:
        """Parse a line; other output is ignored."""
        try:
            return _Answer.model_validate_json(line)
        except ValidationError:
            return _Answer()


async def ask_installer(
    machine: SSHHost, interpreter: Interpreter, request: Mapping[str, object], *, limit_s: float, on_step: OnStep
) -> dict[str, object]:
    """Send the installer with one request, report its steps, and return its result.

    Raises:
        RaylaunchError: the error of the installer, or of the connection.
        HostStepError: it cannot be run, or exited without a result.
    """
    body = json.dumps({"modules": _modules(), "request": json.dumps(request)}).encode() + b"\n"
    result: dict[str, object] | None = None
    async with machine.lines(interpreter.runs(_LOADER), input=body, limit_s=limit_s, step=STEP) as lines:
        async for line in lines:
            answer = _Answer.read(line)
            if answer.step:
                on_step(answer.step)
            if answer.error:
                raise _error(machine, answer.error)
            result = answer.result or result
    if result is None:
        raise _no_answer(machine, interpreter, lines)
    return result


def _modules() -> dict[str, str]:
    """Return the installer's modules by name, with their text; packages have none."""
    folder = Path(str(installer.__file__)).parent
    texts = {f"{_PACKAGE}.{path.stem}": path.read_text("utf-8") for path in folder.glob("[!_]*.py")}
    return {_PACKAGE.rsplit(".", count)[0]: "" for count in (2, 1, 0)} | texts


def _error(machine: SSHHost, value: Mapping[str, str]) -> RaylaunchError:
    """Return the error that the installer reported."""
    error = from_wire(value["code"], f"{machine.name}: {value['message']}", value["hint"])
    if isinstance(error, HostError):
        error.host, error.step = machine.name, STEP
    return error


def _no_answer(machine: SSHHost, interpreter: Interpreter, lines: RemoteLines) -> HostStepError:
    said = tuple(lines.err.decode(errors="replace").strip().splitlines()[-_LAST_LINES:])
    if lines.status in _CANNOT_RUN:
        msg = f"{machine.name}: {interpreter.path} cannot be run there: {said[-1] if said else 'no reason given'}"
        hint = "name another Python or environment of that host in cluster.yaml"
    else:
        printed = "".join(f"\n    {one}" for one in said)
        msg = f"{machine.name}: the installer exited without a result (exit status {lines.status}):{printed}"
        hint = "fix the cause above, and run the same command again"
    return HostStepError(msg, hint=hint, host=machine.name, step=STEP, exit_status=lines.status, tail=said)
