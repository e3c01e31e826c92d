"""One attempt from its admission to its end: send, follow, finish.

Every step may run twice: a controller that was killed starts again at the first step and finds what is done already.
What is irreversible is guarded elsewhere: Ray refuses a known submission id, and a runner claims its attempt first.
"""

from __future__ import annotations

from raylaunch.controller.finishing import Finisher
from raylaunch.controller.following import Follower
from raylaunch.controller.means import Means
from raylaunch.controller.sending import Sender


class Driver:
    """Drives attempts. One `drive` runs for each job whose state is active."""

    def __init__(self, means: Means) -> None:
        self._records = means.records
        self._sender = Sender(means)
        self._follower = Follower(means)
        self._finisher = Finisher(means)

    async def drive(self, job: str) -> None:
        """Drive the job's latest attempt until the job has ended or waits again."""
        refused = ""
        if not self._records.light(job).submitted_to_ray:
            refused = await self._sender.send(job)
        if not refused:
            await self._follower.until_over(job)
        await self._finisher.finish(job, refused)
