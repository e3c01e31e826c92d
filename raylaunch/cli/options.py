"""Options that many commands share."""

from __future__ import annotations

import time
from datetime import datetime, timezone

import click

from raylaunch.errors import SpecError
from raylaunch.units import point_in_time, seconds

as_json = click.option("--json", "as_json", is_flag=True, help="Print the state as JSON.")
job_argument = click.argument("job", default="last")
attempt_option = click.option(
    "--attempt", type=click.IntRange(1), metavar="N", help="The N-th attempt; by default the latest."
)
rank_option = click.option("--rank", type=click.IntRange(0), default=0, metavar="R", help="The rank; by default 0.")


def duration(text: str | None, *, option: str) -> float | None:
    """Return a duration that a person wrote, in seconds; None where nobody wrote one.

    Raises:
        SpecError: it is none.
    """
    if text is None:
        return None
    try:
        return float(str(seconds(text)))
    except ValueError as error:
        msg = f"{option}: {error}"
        raise SpecError(msg) from None


def to_come(text: str | None, *, option: str) -> float | None:
    """Return a time to come that a person wrote, in seconds since the epoch; None where she wrote none.

    Raises:
        SpecError: it is no time, or is over.
    """
    if text is None:
        return None
    now = datetime.fromtimestamp(time.time(), timezone.utc).astimezone()
    try:
        return point_in_time(text, now=now).timestamp()
    except ValueError as error:
        raise SpecError(str(error), field=option) from None
