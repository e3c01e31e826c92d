"""Routes about hosts: what runs on one, and whether it takes jobs."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from raylaunch.cluster_state import HostJobs, Quiet
from raylaunch.controller.answers import answer
from raylaunch.controller.asking import Has, Who
from raylaunch.controller.auth import Role
from raylaunch.controller.guarded import GuardedRoute, needs
from raylaunch.spec_parts import Moment

router = APIRouter(route_class=GuardedRoute)


class DrainRequest(BaseModel):
    """Until when (seconds since the epoch; null for no end), and whether what runs there is stopped."""

    model_config = ConfigDict(extra="forbid")

    until: Moment | None = None
    stop: bool = False


class QuietRequest(BaseModel):
    """For how long at most (seconds), and whether what runs is stopped and queued again."""

    model_config = ConfigDict(extra="forbid")

    limit_s: float = Field(default=600.0, gt=0, le=7 * 86400, allow_inf_nan=False)
    stop: bool = False


@router.get("/hosts/{host}", response_model=HostJobs)
async def jobs(host: str, services: Has) -> Response:
    """Say what runs on a host."""
    return answer(services.hosts.jobs(host))


@router.post("/hosts/{host}/drain", response_model=HostJobs)
@needs(Role.OPERATOR, "drain hosts")
async def drain(host: str, request: Request, services: Has, caller: Who, asked: DrainRequest | None = None) -> Response:
    """Let no attempt begin on a host."""
    request.state.about = host
    asked = asked or DrainRequest()
    return answer(services.hosts.drain(host, until=asked.until, stop=asked.stop, person=caller.person))


@router.delete("/hosts/{host}/drain", response_model=HostJobs)
@needs(Role.OPERATOR, "let drained hosts take jobs")
async def undrain(host: str, request: Request, services: Has) -> Response:
    """Let a host take jobs again."""
    request.state.about = host
    return answer(services.hosts.undrain(host))


@router.get("/quiet", response_model=Quiet)
async def is_quiet(services: Has) -> Response:
    """Say whether attempts begin, and what runs."""
    return answer(services.hosts.is_quiet())


@router.post("/quiet", response_model=Quiet)
@needs(Role.OPERATOR, "let no job begin")
async def quiet(services: Has, caller: Who, asked: QuietRequest | None = None) -> Response:
    """Let no attempt begin for a while."""
    asked = asked or QuietRequest()
    return answer(services.hosts.quiet(limit_s=asked.limit_s, stop=asked.stop, person=caller.person))


@router.delete("/quiet", response_model=Quiet)
@needs(Role.OPERATOR, "let jobs begin again")
async def loud(services: Has) -> Response:
    """Let attempts begin again."""
    return answer(services.hosts.loud())
