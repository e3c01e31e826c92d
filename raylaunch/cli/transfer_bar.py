"""A progress bar for bytes that travel: on a terminal, and only when there is something to wait for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from raylaunch.cli.console import is_terminal, shown_text
from raylaunch.client import OnProgress

_WORTH_SHOWING = 1024 * 1024


@contextlib.contextmanager
def transfer_bar() -> Iterator[OnProgress]:
    """Yield what is to be told of progress; it draws on stderr, or nothing where nobody looks."""
    if not is_terminal(sys.stderr):
        yield lambda _what, _done, _total: None
        return
    from rich.console import Console  # noqa: PLC0415 -- only where a person looks
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    bar = Progress(*columns, console=Console(stderr=True), transient=True)

    def told(what: str, done: int, total: int) -> None:
        if total < _WORTH_SHOWING:
            return
        if what not in tasks:
            bar.start()  # not earlier: a person may be asked something first
            tasks[what] = bar.add_task(shown_text(what).replace("[", r"\["), total=total)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield told
    finally:
        bar.stop()
