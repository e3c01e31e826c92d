"""``python -m raylaunch.cluster.revive NAME``: the controller runs this when it finds Ray dead."""

from __future__ import annotations

import logging
import sys

import anyio

from raylaunch.cluster.embedded import revive_ray
from raylaunch.cluster.plan import Step
from raylaunch.errors import ConflictError, RaylaunchError

_log = logging.getLogger("raylaunch.cluster.revive")


def main(argv: list[str]) -> int:
    """Start the Ray of the cluster that is named; return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    if len(argv) != 1:
        _log.error("usage: python -m raylaunch.cluster.revive CLUSTER")
        return 2

    async def revive() -> bool:
        return await revive_ray(argv[0], on_step=_tell)

    try:
        started = anyio.run(revive)
    except ConflictError as error:
        _log.info("left to another: %s", error.message)
        return 0
    except RaylaunchError as error:
        _log.error("%s", error)
        return 1
    _log.info("Ray runs again" if started else "nothing to do")
    return 0


def _tell(step: Step) -> None:
    _log.info("%s", step)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
