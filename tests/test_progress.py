"""Steps that take long are reported again, finished ones are not."""

from __future__ import annotations

import anyio
import pytest

from raylaunch.cluster.progress import ProgressReporter, reporting_progress
from raylaunch.cluster.types import Step

pytestmark = pytest.mark.anyio
QUIET_S = 0.05


async def reported(steps: list[Step], count: int) -> list[str]:
    """Wait until `count` pending steps were reported, and return them."""
    with anyio.fail_after(60):
        while len(found := [str(step) for step in steps if step.state == "waits"]) < count:  # noqa: ASYNC110 -- reported by a callback
            await anyio.sleep(0.01)
    return found


async def test_the_latest_unfinished_step_is_reported_repeatedly() -> None:
    steps: list[Step] = []
    with reporting_progress(steps.append, quiet_s=QUIET_S) as report:
        report(Step("dgx-1: probe", "begins", "looks"))
        report(Step("dgx-1: wheels", "begins", "gathers wheels"))
        lines = await reported(steps, 2)
    assert {line.rpartition(" (")[0] for line in lines} == {"dgx-1: wheels: gathers wheels"}


async def test_finished_steps_are_not_reported() -> None:
    steps: list[Step] = []
    with reporting_progress(steps.append, quiet_s=QUIET_S) as report:
        for name in ("dgx-1: ray", "dgx-2: ray", "dgx-3: ray"):
            report(Step(name, "begins", "starts"))
        report(Step("dgx-3: ray", "done", "started"))
        report(Step("dgx-2", "note", "it failed"))
        assert (await reported(steps, 1))[0].startswith("dgx-1: ray")


async def test_quick_steps_are_reported_only_when_slow() -> None:
    steps: list[Step] = []
    with reporting_progress(steps.append, quiet_s=QUIET_S) as report:
        with report.during("lock", "somebody else is at work"):
            assert (await reported(steps, 1))[0].startswith("lock: somebody else is at work")
        before = len(steps)
        await anyio.sleep(3 * QUIET_S)
        assert len(steps) == before


async def test_nothing_is_reported_after_the_end() -> None:
    steps: list[Step] = []
    with reporting_progress(steps.append, quiet_s=QUIET_S) as report:
        assert isinstance(report, ProgressReporter)
        report(Step("ray", "begins", "starts"))
    before = len(steps)
    await anyio.sleep(3 * QUIET_S)
    assert len(steps) == before
