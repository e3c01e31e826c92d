"""Pre-flight check: which nodes cannot reach a package index, so that a job needs wheels for its environment."""

from __future__ import annotations

import asyncio
import logging
from typing import cast

from raylaunch.controller.ray.bridge import RayBridge
from raylaunch.controller.scheduler.observed import ObservedState
from raylaunch.controller.scheduler.queue import node_capacities, unsatisfiable_reason
from raylaunch.controller.settings import Settings
from raylaunch.controller.store.backlog import request_for
from raylaunch.controller.store.packages import ClusterWheels
from raylaunch.errors import RaylaunchError, WheelsNeededError
from raylaunch.models.fields import OF_THE_CLUSTER
from raylaunch.models.job import BuildPlatform, SubmitRequest, WheelSet
from raylaunch.models.job_spec import JobSpec

_log = logging.getLogger(__name__)

_ASK_S = 20.0
_MADE_THERE = frozenset({"uv", "pip"})


class WheelPreflight:
    """Queries the nodes that could run a job. A node that does not respond in time counts as one with an index."""

    def __init__(self, *, settings: Settings, observed: ObservedState, bridge: RayBridge, kept: ClusterWheels) -> None:
        self._settings = settings
        self._observed = observed
        self._bridge = bridge
        self.kept = kept

    async def of(self, spec: JobSpec) -> tuple[BuildPlatform, ...]:
        """Return the platforms for which wheels must be sent, without those that the cluster has."""
        own = self._settings.environment_of(spec)
        kind = own.kind
        if kind not in _MADE_THERE and not spec.packages:
            return ()
        ask = request_for(spec)
        able = [room.node_id for room in node_capacities(self._observed.nodes) if not unsatisfiable_reason(ask, [room])]
        question = (
            {**self._settings.env, **spec.env},
            "uv" if kind == "uv" else "pip",
            {"kind": kind, "value": own.value},
        )
        found = await asyncio.gather(*(self._of_node(node_id, question) for node_id in able))
        have = () if spec.packages else self.there(spec)
        return tuple(dict.fromkeys(platform for platform in found if platform and platform not in have))

    def there(self, spec: JobSpec) -> tuple[BuildPlatform, ...]:
        """Return the platforms for which the cluster has the wheels of its own environment, if the job uses that."""
        return tuple(one.platform for one in self.kept.sets) if spec.environment.kind in OF_THE_CLUSTER else ()

    def complete(self, request: SubmitRequest) -> SubmitRequest:
        """Return a request with the cluster's wheels added, if its job uses the cluster's environment.

        Wheels that were sent for a platform take precedence, unless all are for packages that the job adds. If it adds
        packages and no wheels were sent for them, its nodes can reach an index and use that.
        """
        if request.spec.environment.kind not in OF_THE_CLUSTER:
            return request
        sent = {one.platform: one.wheels for one in request.wheels}
        for one in self.kept.sets:
            with_it = sent.get(one.platform, ())
            if all(wheel.added for wheel in with_it) and bool(with_it) == bool(request.spec.packages):
                sent[one.platform] = (*one.wheels, *with_it)
        sets = tuple(WheelSet(platform=platform, wheels=wheels) for platform, wheels in sent.items())
        return request.model_copy(update={"wheels": sets})

    async def check(self, request: SubmitRequest) -> None:
        """Refuse a request without wheels if its nodes need them.

        Raises:
            WheelsNeededError: wheels are needed, and the client did not look for any.
        """
        spec = request.spec
        if request.wheels_sought:
            return
        if platforms := await self.of(spec):
            own, where = self._settings.environment_of(spec), ", ".join(map(str, platforms))
            msg = (
                f"the environment of {spec.display_name} ({own}) needs wheels: nodes with {where} cannot reach an index"
            )
            raise WheelsNeededError(msg, hint="submit it with this version of raylaunch, which sends the wheels")

    async def _of_node(self, node_id: str, question: tuple[object, ...]) -> BuildPlatform | None:
        try:
            answer = await self._bridge.call_agent(node_id, "index_look", *question, timeout_s=_ASK_S)
        except RaylaunchError:
            return None
        facts = cast("dict[str, object]", answer)
        return None if facts.pop("index") else BuildPlatform.model_validate(facts)
