"""A bring-up as a stream of steps, and what keeps a cluster from being taken down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from raylaunch.cluster.plan import Step
from raylaunch.errors import ConflictError
from raylaunch.place import Place
from raylaunch.spec import ClusterSpec
from raylaunch.state import JobView

_NAMED = 3
"""Jobs that a refusal names."""


async def steps_of_up(spec: ClusterSpec, *, on_notice: Callable[[str], None]) -> AsyncGenerator[Step, None]:
    """Bring a cluster up and yield each step. When the generator is closed before its end, the bring-up is cancelled.

    Raises:
        ClusterStartError: something is missing at the end.
    """
    steps: asyncio.Queue[Step | None] = asyncio.Queue()
    work = asyncio.ensure_future(Place(spec, on_notice=on_notice, on_step=steps.put_nowait).up())
    work.add_done_callback(lambda _: steps.put_nowait(None))
    try:
        while (step := await steps.get()) is not None:
            yield step
        await work
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def refuse_while_jobs_run(jobs: Sequence[JobView], cluster: str) -> None:
    """Refuse to take a cluster down while jobs of ours run.

    Raises:
        ConflictError: some do.
    """
    if jobs:
        names = ", ".join(job.id for job in jobs[:_NAMED]) + (" and others" if len(jobs) > _NAMED else "")
        msg = f"{len(jobs)} job{' runs' if len(jobs) == 1 else 's run'} on cluster {cluster}: {names}"
        hint = "stop them first, with job.stop(); or down(…, force=True): the next up tries them again"
        raise ConflictError(msg, hint=hint)
