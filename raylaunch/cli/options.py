"""Options that many commands share."""

from __future__ import annotations

import click

as_json = click.option("--json", "as_json", is_flag=True, help="Print the state as JSON.")
job_argument = click.argument("job", default="last")
attempt_option = click.option(
    "--attempt", type=click.IntRange(1), metavar="N", help="The N-th attempt; by default the latest."
)
rank_option = click.option("--rank", type=click.IntRange(0), default=0, metavar="R", help="The rank; by default 0.")
