"""Strikes at random moments, and the ledger by which jobs themselves say what ran and how often."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

KILLS = 10
LEDGER = (
    "import os\n"
    "line = os.environ['RAYLAUNCH_JOB_ID'] + ' ' + os.environ['RAYLAUNCH_ATTEMPT'] + '\\n'\n"
    "file = os.open(os.environ['LEDGER'], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)\n"
    "os.write(file, line.encode())\n"
)
"""Each attempt writes one line with its job's id and its number: what ran, and how often."""
TALKS = LEDGER + (
    "import itertools, pathlib, time\n"
    "for n in itertools.count():\n"
    "    print(n, 'x' * 200, flush=True)\n"
    "    if n > 20000 or pathlib.Path(os.environ['ENOUGH']).exists(): break\n"
    "    time.sleep(0.005)\n"
)


class Book:
    """What ran, as the jobs themselves wrote it down."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.env = ("--env", f"LEDGER={path}", "--tracking", "disabled")

    def runs(self) -> Counter[str]:
        """Return how often each attempt ran, by job and number."""
        return Counter(self.path.read_text().splitlines() if self.path.exists() else [])


@contextmanager
def at_random_moments(
    strike: Callable[[], object], seed: int, longest_s: float, times: int = KILLS
) -> Iterator[list[int]]:
    """Strike so many times in the background; the list that is yielded grows with each strike."""
    chance, done, leave = random.Random(seed), list[int](), threading.Event()  # noqa: S311 -- no secret

    def strikes() -> None:
        while len(done) < times and not leave.wait(chance.uniform(0, longest_s)):
            strike()
            done.append(len(done))

    with ThreadPoolExecutor(1) as pool:
        striking = pool.submit(strikes)
        try:
            yield done
        finally:
            leave.set()
            striking.result(60)
