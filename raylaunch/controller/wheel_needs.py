"""Which nodes cannot make a job's environment themselves: they reach no package index, and wheels must go along."""

from __future__ import annotations

import asyncio
from typing import cast

from raylaunch.controller.link import Link
from raylaunch.controller.queue import why_never
from raylaunch.controller.rooms import ask_for, rooms_of
from raylaunch.controller.settings import Settings
from raylaunch.controller.sight import Sight
from raylaunch.errors import RaylaunchError, WheelsNeededError
from raylaunch.spec import JobSpec
from raylaunch.state import SubmitRequest
from raylaunch.wheel_sets import BuildPlatform

_ASK_S = 20.0
_MADE_THERE = frozenset({"uv", "pip"})


class WheelNeeds:
    """Asks the nodes that could run a job. What is not answered in time counts as an index that is reached."""

    def __init__(self, *, settings: Settings, sight: Sight, link: Link) -> None:
        self._settings = settings
        self._sight = sight
        self._link = link

    async def of(self, spec: JobSpec) -> tuple[BuildPlatform, ...]:
        """Return the platforms for which wheels have to go along, each once."""
        kind = self._settings.environment_of(spec).kind
        if kind not in _MADE_THERE and not spec.packages:
            return ()
        ask = ask_for(spec)
        able = [room.node_id for room in rooms_of(self._sight.nodes) if not why_never(ask, [room])]
        question: dict[str, object] = {
            "env": {**self._settings.env, **spec.env},
            "kind": "uv" if kind == "uv" else "pip",
        }
        found = await asyncio.gather(*(self._of_node(node_id, question) for node_id in able))
        return tuple(dict.fromkeys(platform for platform in found if platform))

    async def check(self, request: SubmitRequest) -> None:
        """See to it that wheels were looked for where they have to go along.

        Raises:
            WheelsNeededError: they were not.
        """
        spec = request.spec
        if request.wheels_sought:
            return
        if platforms := await self.of(spec):
            own, where = self._settings.environment_of(spec), ", ".join(map(str, platforms))
            msg = f"the environment of {spec.display_name} ({own}) needs wheels: nodes with {where} reach no index"
            raise WheelsNeededError(msg, hint="submit it with this version of raylaunch, which sends the wheels along")

    async def _of_node(self, node_id: str, question: dict[str, object]) -> BuildPlatform | None:
        try:
            answer = await self._link.ask("index_look", {"node_id": node_id, **question}, timeout_s=_ASK_S)
        except RaylaunchError:
            return None
        facts = cast("dict[str, object]", answer)
        return None if facts.pop("index") else BuildPlatform.model_validate(facts)
