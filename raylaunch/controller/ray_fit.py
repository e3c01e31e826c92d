"""``launcher: ray`` at submit: a job whose environment cannot join the cluster's Ray is refused before it waits."""

from __future__ import annotations

import asyncio
import tarfile
from pathlib import Path
from typing import cast

from raylaunch.controller.link import Link
from raylaunch.controller.packages import PackageStore
from raylaunch.controller.queue import why_never
from raylaunch.controller.rooms import ask_for, rooms_of
from raylaunch.controller.settings import Settings
from raylaunch.controller.sight import Sight
from raylaunch.errors import NotFoundError, RaylaunchError, SpecError
from raylaunch.spec import Environment, JobSpec
from raylaunch.state import SubmitRequest

_ASK_S = 30.0
_LARGEST = 32 * 1024 * 1024
_OF_UV = ("uv.lock", ".python-version")


class RayFit:
    """Asks a node that could run the job. What cannot be known now is found by the runner, before the training."""

    def __init__(self, *, settings: Settings, packages: PackageStore, sight: Sight, link: Link) -> None:
        self._settings = settings
        self._packages = packages
        self._sight = sight
        self._link = link

    async def check(self, request: SubmitRequest) -> None:
        """Look at the environment of a Ray driver.

        Raises:
            SpecError: its Ray or its Python is not the cluster's; the text has the command that mends it.
        """
        spec = request.spec
        environment = self._settings.environment_of(spec)
        if spec.launcher != "ray" or environment.kind in {"default", "ray"}:
            return
        node_id = self._node_for(spec)
        if not node_id:
            return
        question = {
            "environment": {**environment.model_dump(mode="json"), "requirements": list(environment.requirements)},
            "env": {**self._settings.env, **spec.env},
            "files": await asyncio.to_thread(self._files, request.package, environment),
        }
        try:
            params = {"node_id": node_id, "question": question}
            what, mend = cast("list[str]", await self._link.ask("ray_fit", params, timeout_s=_ASK_S))
        except RaylaunchError:
            return
        if what:
            raise SpecError(what, hint=mend, field="environment")

    def _node_for(self, spec: JobSpec) -> str:
        """Return a node that could run it."""
        able = [room for room in rooms_of(self._sight.nodes) if not why_never(ask_for(spec), [room])]
        return able[0].node_id if able else ""

    def _files(self, package: str, environment: Environment) -> dict[str, str]:
        """Return what the package says about the environment, as far as it has arrived."""
        names = _OF_UV if environment.kind == "uv" else (environment.value,)
        if not package or environment.kind not in {"uv", "pip"}:
            return {}
        try:
            return _texts(self._packages.path(package), names)
        except (NotFoundError, OSError, tarfile.TarError):
            return {}


def _texts(archive: Path, names: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if name in names and member.isfile() and member.size <= _LARGEST:
                file = tar.extractfile(member)
                found[name] = file.read().decode("utf-8", "replace") if file is not None else ""
    return found
