"""Requests to the host program (`raylaunch.cluster.on_host`) on a host, over its SSH connection."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from raylaunch.cluster.client_record import HeadProgram
from raylaunch.cluster.hosts.host_program import (
    DownRequest,
    HeadUpRequest,
    HostDownResult,
    HostState,
    JoinRequest,
)
from raylaunch.cluster.types import Step
from raylaunch.errors import ClusterStartError, RaylaunchError, VersionError, from_wire
from raylaunch.ssh.host import SSHHost

_Answer = TypeVar("_Answer", bound=BaseModel)

UP_S = 600.0
DOWN_S = 120.0


async def bring_up(
    machine: SSHHost, program: HeadProgram, request: HeadUpRequest | JoinRequest, *, tell: Callable[[Step], None]
) -> HostState:
    """Start the host's part of a cluster; steps are reported as they come.

    Raises:
        RaylaunchError: the error of the host program, or of the connection.
    """
    return await _request(machine, program, request, HostState, tell=tell, limit_s=UP_S, step=request.verb)


async def down(machine: SSHHost, program: HeadProgram, *, name: str, worker: str = "") -> HostDownResult:
    """End every part of the cluster on the host."""
    return await _request(
        machine, program, DownRequest(name=name, host=worker), HostDownResult, tell=_ignore, limit_s=DOWN_S, step="down"
    )


def _ignore(_step: Step) -> None:
    pass


async def _request(  # noqa: PLR0913 -- private, keyword arguments
    machine: SSHHost,
    program: HeadProgram,
    request: BaseModel,
    answer: type[_Answer],
    *,
    tell: Callable[[Step], None],
    limit_s: float,
    step: str,
) -> _Answer:
    argv = [program.python, "-I", "-m", "raylaunch.cluster.on_host"]
    body = request.model_dump_json().encode()
    env = {"RAYLAUNCH_HOME": program.root}
    result: object = None
    async with machine.lines(argv, input=body, limit_s=limit_s, env=env, step=step) as lines:
        async for line in lines:
            kind, value = _read(line)
            if kind == "step" and isinstance(value, dict):
                tell(Step(**value))
            elif kind == "error" and isinstance(value, dict):
                raise _error(machine, value)
            elif kind == "result":
                result = value
    if result is None:
        msg = f"{machine.name}: the host program ended without an answer (exit status {lines.status})"
        said = lines.err.decode(errors="replace").strip().splitlines()[-5:]
        raise ClusterStartError(msg + "".join(f"\n    {one}" for one in said), hint="run raylaunch up again")
    try:
        return answer.model_validate(result)
    except ValidationError as error:
        msg = f"{machine.name}: the host program has another version: {error}"
        raise VersionError(msg, hint="run raylaunch up, which installs this version") from None


def _read(line: bytes) -> tuple[str, object]:
    """Parse one response; other lines come from the host's shell and are ignored."""
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return "", None
    return next(iter(read.items())) if isinstance(read, dict) and len(read) == 1 else ("", None)


def _error(machine: SSHHost, value: dict[str, object]) -> RaylaunchError:
    message, hint = str(value.get("message", "")), str(value.get("hint", ""))
    return from_wire(str(value.get("code", "")), f"{machine.name}: {message}", hint)
