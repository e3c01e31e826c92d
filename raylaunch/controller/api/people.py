"""Routes about access: tokens, invitations, revoking; and accepting an invitation."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from raylaunch.controller.api.dependencies import CurrentCaller, GuardedRoute, Services, requires
from raylaunch.controller.api.responses import json_response, model_response
from raylaunch.controller.store.access import Role
from raylaunch.models.cluster import Admission, Invitation, TokenView
from raylaunch.models.fields import Moment

router = APIRouter(route_class=GuardedRoute)

JOIN_PATH = "/v1/join"
"""The only path that accepts an invitation's code."""
_DAY_S = 86400.0


class InviteRequest(BaseModel):
    """Person and role; validity of the code in seconds, and when the token expires (null: never)."""

    model_config = ConfigDict(extra="forbid")

    person: str
    role: Role
    valid_s: float = Field(default=_DAY_S, gt=0, le=30 * _DAY_S, allow_inf_nan=False)
    token_expires_at: Moment | None = None


class TakeRequest(BaseModel):
    """The SHA-256 of a token that never leaves its owner's machine."""

    model_config = ConfigDict(extra="forbid")

    sha256: str


@router.get("/tokens", response_model=list[TokenView])
@requires(Role.ADMIN, "list tokens")
async def tokens(services: Services, caller: CurrentCaller) -> Response:
    """Return all tokens and open invitations."""
    return model_response(list(services.invitations.views(caller.token)))


@router.post("/tokens", response_model=Invitation)
@requires(Role.ADMIN, "invite people")
async def invite(asked: InviteRequest, request: Request, services: Services, caller: CurrentCaller) -> Response:
    """Invite a person."""
    request.state.about = asked.person
    code, expires_at = services.invitations.invite(
        asked.person, asked.role, by=caller.person, valid_s=asked.valid_s, token_expires_at=asked.token_expires_at
    )
    settings = services.settings
    invitation = Invitation(
        code=code,
        person=asked.person,
        role=asked.role.value,
        expires_at=expires_at,
        token_expires_at=asked.token_expires_at,
        cluster=settings.cluster,
        port=settings.port,
    )
    return model_response(invitation)


@router.delete("/tokens/{who}")
@requires(Role.ADMIN, "revoke tokens")
async def revoke(who: str, request: Request, services: Services, caller: CurrentCaller) -> Response:
    """Revoke tokens and invitations."""
    request.state.about = who
    return json_response({"revoked": services.invitations.revoke(who, mine=caller.token)})


@router.post("/join", response_model=Admission)
async def take(
    asked: TakeRequest,
    request: Request,
    services: Services,
    caller: CurrentCaller,
    authorization: Annotated[str, Header()],
) -> Response:
    """Accept an invitation: its code is the request's bearer token."""
    request.state.about = caller.person
    token = services.invitations.accept(authorization.partition(" ")[2], asked.sha256)
    settings = services.settings
    admission = Admission(
        person=token.person,
        role=token.role.value,
        made_by=token.made_by,
        cluster=settings.cluster,
        cluster_id=settings.cluster_id,
        expires_at=token.expires_at,
    )
    return model_response(admission)
