"""Routes about the cluster: hosts, pauses, status, Ray's own access, secrets, disk usage, tokens and invitations."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Request, Response
from pydantic import Field

from raylaunch.controller.api.dependencies import App, AppState, CurrentCaller, GuardedRoute, RequestBody, requires
from raylaunch.controller.api.responses import json_response, model_response
from raylaunch.controller.settings import Settings
from raylaunch.controller.store.access import Role
from raylaunch.models.cluster import (
    Admission,
    ClusterPython,
    ControllerStatus,
    EnvironmentWheels,
    HostJobs,
    Invitation,
    Quiet,
    RayAccess,
    TokenView,
)
from raylaunch.models.fields import Moment
from raylaunch.models.job import UsagePage

SECRET_BYTES = 1024 * 1024
WHEELS_BYTES = 4 * 1024 * 1024
_DAY_S = 86400.0
router = APIRouter(route_class=GuardedRoute)


class DrainRequest(RequestBody):
    """End of the drain (seconds since the epoch; null for none), and whether running jobs are stopped."""

    until: Moment | None = None
    stop: bool = False


class QuietRequest(RequestBody):
    """Longest duration (seconds), and whether running jobs are stopped and queued again."""

    limit_s: float = Field(default=600.0, gt=0, le=7 * _DAY_S, allow_inf_nan=False)
    stop: bool = False


class SecretValue(RequestBody):
    """The value of a secret, and the people whose jobs get it: empty for all, null to leave that unchanged."""

    value: str = Field(repr=False)
    people: tuple[str, ...] | None = Field(default=None, max_length=100)


class InviteRequest(RequestBody):
    """Person and role; validity of the code in seconds, and when the token expires (null: never)."""

    person: str
    role: Role
    valid_s: float = Field(default=_DAY_S, gt=0, le=30 * _DAY_S, allow_inf_nan=False)
    token_expires_at: Moment | None = None


class TakeRequest(RequestBody):
    """The SHA-256 of a token that never leaves its owner's machine."""

    sha256: str


@router.get("/hosts/{host}", response_model=HostJobs)
async def jobs(host: str, app: App) -> Response:
    """Return what is running on a host."""
    return model_response(await app.hosts.jobs(host))


@router.post("/hosts/{host}/drain", response_model=HostJobs)
@requires(Role.OPERATOR, "drain hosts")
async def drain(
    host: str, request: Request, app: App, caller: CurrentCaller, body: DrainRequest | None = None
) -> Response:
    """Start no new attempts on a host."""
    request.state.about = host
    body = body or DrainRequest()
    return model_response(await app.hosts.drain(host, until=body.until, stop=body.stop, person=caller.person))


@router.delete("/hosts/{host}/drain", response_model=HostJobs)
@requires(Role.OPERATOR, "let drained hosts take jobs")
async def undrain(host: str, request: Request, app: App) -> Response:
    """Let a host take jobs again."""
    request.state.about = host
    return model_response(await app.hosts.undrain(host))


@router.get("/quiet", response_model=Quiet)
async def is_quiet(app: App) -> Response:
    """Return whether new attempts are paused, and what is running."""
    return model_response(app.hosts.pause_state())


@router.post("/quiet", response_model=Quiet)
@requires(Role.OPERATOR, "pause the start of jobs")
async def quiet(app: App, caller: CurrentCaller, body: QuietRequest | None = None) -> Response:
    """Pause the start of attempts for a while."""
    body = body or QuietRequest()
    return model_response(app.hosts.pause(limit_s=body.limit_s, stop=body.stop, person=caller.person))


@router.delete("/quiet", response_model=Quiet)
@requires(Role.OPERATOR, "resume the start of jobs")
async def loud(app: App) -> Response:
    """Resume the start of attempts."""
    return model_response(app.hosts.resume())


@router.get("/health")
async def health() -> Response:
    """Confirm that the controller responds."""
    return json_response({})


@router.get("/status", response_model=ControllerStatus)
async def status(app: App, caller: CurrentCaller) -> Response:
    """Return the state of the controller, Ray and the nodes."""
    return model_response(await app.jobs.status(caller.person, caller.role.value))


@router.get("/ray", response_model=RayAccess)
@requires(Role.OPERATOR, "use Ray's own tools")
async def ray(request: Request, app: App) -> Response:
    """Return what Ray's own tools need. The response contains Ray's token, so it is in the audit log."""
    request.state.audited = True
    return model_response(app.jobs.ray_access())


@router.get("/python", response_model=ClusterPython)
async def python(app: App) -> Response:
    """Return the default Python of jobs, and the one that runs Ray."""
    return model_response(python_of(app.settings))


@router.put("/python/wheels")
@requires(Role.OPERATOR, "send wheels of the cluster's environment", body_bytes=WHEELS_BYTES)
async def keep_wheels(body: EnvironmentWheels, app: App) -> Response:
    """Store which wheels make the environment in cluster.yaml, for nodes that cannot reach a package index."""
    await app.jobs.keep_wheels(body)
    return json_response({})


@router.get("/secrets", response_model=list[str])
@requires(Role.OPERATOR, "see the names of secrets")
async def secret_names(app: App) -> Response:
    """Return the names of the cluster's secrets."""
    return json_response(list(await anyio.to_thread.run_sync(app.secrets.names)))


@router.put("/secrets/{name}")
@requires(Role.OPERATOR, "set secrets", body_bytes=SECRET_BYTES)
async def set_secret(name: str, body: SecretValue, request: Request, app: App) -> Response:
    """Set a secret."""
    request.state.about = name
    await anyio.to_thread.run_sync(app.secrets.put, name, body.value, body.people)
    return json_response({})


@router.delete("/secrets/{name}")
@requires(Role.OPERATOR, "delete secrets")
async def remove_secret(name: str, request: Request, app: App) -> Response:
    """Delete a secret."""
    request.state.about = name
    await anyio.to_thread.run_sync(app.secrets.remove, name)
    return json_response({})


@router.get("/usage", response_model=UsagePage)
async def usage(app: App) -> Response:
    """Return the disk usage of the store, largest job first, and of the nodes."""
    page = await anyio.to_thread.run_sync(_usage, app)
    return model_response(page.model_copy(update={"nodes": await app.jobs.node_usage()}))


@router.get("/tokens", response_model=list[TokenView])
@requires(Role.ADMIN, "list tokens")
async def tokens(app: App, caller: CurrentCaller) -> Response:
    """Return all tokens and open invitations."""
    return model_response(list(app.invitations.views(caller.token)))


@router.post("/tokens", response_model=Invitation)
@requires(Role.ADMIN, "invite people")
async def invite(body: InviteRequest, request: Request, app: App, caller: CurrentCaller) -> Response:
    """Invite a person."""
    request.state.about = body.person
    code, expires_at = app.invitations.invite(
        body.person, body.role, by=caller.person, valid_s=body.valid_s, token_expires_at=body.token_expires_at
    )
    settings = app.settings
    invitation = Invitation(
        code=code,
        person=body.person,
        role=body.role.value,
        expires_at=expires_at,
        token_expires_at=body.token_expires_at,
        cluster=settings.cluster,
        port=settings.port,
    )
    return model_response(invitation)


@router.delete("/tokens/{who}")
@requires(Role.ADMIN, "revoke tokens")
async def revoke(who: str, request: Request, app: App, caller: CurrentCaller) -> Response:
    """Revoke tokens and invitations."""
    request.state.about = who
    return json_response({"revoked": app.invitations.revoke(who, mine=caller.token)})


@router.post("/join", response_model=Admission)
async def take(
    body: TakeRequest,
    request: Request,
    app: App,
    caller: CurrentCaller,
    authorization: Annotated[str, Header()],
) -> Response:
    """Accept an invitation: its code is the request's bearer token."""
    request.state.about = caller.person
    token = app.invitations.accept(authorization.partition(" ")[2], body.sha256)
    settings = app.settings
    admission = Admission(
        person=token.person,
        role=token.role.value,
        made_by=token.made_by,
        cluster=settings.cluster,
        cluster_id=settings.cluster_id,
        expires_at=token.expires_at,
    )
    return model_response(admission)


def python_of(settings: Settings) -> ClusterPython:
    """Return the default Python of jobs. The controller runs under Ray's, unless another user runs Ray."""
    if settings.carries_stewards:
        return ClusterPython(environment=settings.default_environment)
    return ClusterPython(
        environment=settings.default_environment,
        version=platform.python_version(),
        prefix=sys.prefix,
        ray=importlib.metadata.version("ray"),
    )


def _usage(app: AppState) -> UsagePage:
    jobs = app.records.names()
    found = [app.artifacts.usage(job, name=name, state=state) for job, name, state in jobs]
    packages = app.packages.bytes()
    return UsagePage(
        jobs=tuple(sorted(found, key=lambda usage: usage.bytes, reverse=True)),
        packages=packages,
        total=packages + sum(usage.bytes for usage in found),
        free=app.artifacts.free_bytes(),
    )
