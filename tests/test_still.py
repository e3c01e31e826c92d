"""Steps that take long are told again, and those that are over are not."""

from __future__ import annotations

import anyio
import pytest

from raylaunch.cluster.progress import ProgressReporter, telling_steps
from raylaunch.cluster.types import Step

pytestmark = pytest.mark.anyio
QUIET_S = 0.05


async def heard(told: list[Step], count: int) -> list[str]:
    """Wait until so many lines of waiting were told, and return them."""
    with anyio.fail_after(60):
        while len(found := [str(step) for step in told if step.state == "waits"]) < count:  # noqa: ASYNC110 -- told by what cannot set an event
            await anyio.sleep(0.01)
    return found


async def test_what_began_last_and_goes_on_is_told_again_and_again() -> None:
    told: list[Step] = []
    with telling_steps(told.append, quiet_s=QUIET_S) as tell:
        tell(Step("dgx-1: probe", "begins", "looks"))
        tell(Step("dgx-1: wheels", "begins", "gathers wheels"))
        lines = await heard(told, 2)
    assert {line.rpartition(": ")[0] for line in lines} == {"dgx-1: wheels: gathers wheels"}


async def test_of_steps_that_are_over_nothing_more_is_told() -> None:
    told: list[Step] = []
    with telling_steps(told.append, quiet_s=QUIET_S) as tell:
        for name in ("dgx-1: ray", "dgx-2: ray", "dgx-3: ray"):
            tell(Step(name, "begins", "starts"))
        tell(Step("dgx-3: ray", "done", "started"))
        tell(Step("dgx-2", "note", "it failed"))
        assert (await heard(told, 1))[0].startswith("dgx-1: ray")


async def test_what_is_usually_over_at_once_is_told_only_when_it_takes_long() -> None:
    told: list[Step] = []
    with telling_steps(told.append, quiet_s=QUIET_S) as tell:
        with tell.during("lock", "somebody else is at work"):
            assert (await heard(told, 1))[0].startswith("lock: somebody else is at work")
        said = len(told)
        await anyio.sleep(3 * QUIET_S)
        assert len(told) == said


async def test_when_all_is_over_nobody_is_left_who_tells() -> None:
    told: list[Step] = []
    with telling_steps(told.append, quiet_s=QUIET_S) as tell:
        assert isinstance(tell, ProgressReporter)
        tell(Step("ray", "begins", "starts"))
    said = len(told)
    await anyio.sleep(3 * QUIET_S)
    assert len(told) == said
