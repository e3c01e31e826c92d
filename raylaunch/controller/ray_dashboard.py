"""All that Ray's dashboard address alone can do: its Jobs API, and what its other routes say of nodes and take in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from raylaunch.controller.nodes import RayNode
from raylaunch.controller.ray_jobs import RayJobs
from raylaunch.controller.ray_upload import Upload

_UPLOAD_S = 600.0
_COUNTED = ("CPU", "GPU", "memory")


class RayDashboard(RayJobs):
    """The dashboard of one Ray cluster. Raises as `RayJobs`."""

    def __init__(self, dashboard_url: str, token: str) -> None:
        super().__init__(dashboard_url, token)
        self._hostnames: dict[str, str] = {}

    async def upload(self, upload: Upload) -> None:
        """Give Ray a package; one that it has is not sent again."""
        path = f"/api/packages/gcs/{upload.name}"
        async with self._asking("for a package"):
            have = await self._http.get(path)
        if have.is_success:
            return
        async with self._asking("to take a package"):
            answer = await self._http.put(path, content=upload.data, timeout=_UPLOAD_S)
            answer.raise_for_status()

    async def nodes(self) -> list[RayNode]:
        """Return the nodes that Ray lists. What of them is free it says some seconds late."""
        async with self._asking("for its nodes"):
            answer = await self._http.get("/api/v0/nodes", params={"detail": "true", "limit": 1000})
            answer.raise_for_status()
            usage = await self._http.get("/api/cluster_status")
        rows = _inside(answer.json(), "data", "result").get("result") or []
        if any(row["node_id"] not in self._hostnames for row in rows):
            await self._learn_hostnames()
        status = usage.json() if usage.is_success else {}
        used = _inside(status, "data", "clusterStatus", "loadMetricsReport", "usageByNode")
        return [node_of(row, used.get(row["node_id"]) or {}, self._hostnames) for row in rows]

    async def _learn_hostnames(self) -> None:
        async with self._asking("for the names of its nodes"):
            answer = await self._http.get("/nodes", params={"view": "summary"})
            answer.raise_for_status()
        for each in _inside(answer.json(), "data").get("summary") or []:
            self._hostnames[_inside(each, "raylet").get("nodeId", "")] = each.get("hostname", "")


def node_of(row: Mapping[str, object], used: Mapping[str, list[float]], hostnames: Mapping[str, str]) -> RayNode:
    """Return what Ray's state API says of a node, less what is used of it. Pure."""
    total = cast("dict[str, float]", row.get("resources_total") or {})
    free = {name: total[name] - used.get(name, [0.0])[0] for name in _COUNTED if name in total}
    identity, address = str(row["node_id"]), str(row.get("node_ip") or "")
    return RayNode(
        id=identity,
        alive=row.get("state") == "ALIVE",
        hostname=hostnames.get(identity) or str(row.get("node_name") or address),
        address=address,
        total=total,
        free=free,
        labels=cast("dict[str, str]", row.get("labels") or {}),
        logs="",
    )


def _inside(value: Any, *names: str) -> dict[str, Any]:  # noqa: ANN401 -- JSON
    """Return an object within objects; an empty one where it is not there."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
