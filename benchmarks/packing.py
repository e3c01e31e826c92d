"""Packing a working directory: ours beside what ``ray job submit --working-dir`` does before it sends anything."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Result, medians
from raylaunch.packing import pack

_FILES = 1000
_WORDS = (
    "tensor",
    "batch",
    "layer",
    "loss",
    "return",
    "self",
    "def",
    "import",
    "for",
    "in",
    "range",
    "(",
    ")",
    "\n    ",
)


def _project(folder: Path) -> None:
    """Write a project's worth of text: many small files and a few large ones, the same each time."""
    chance = random.Random(0)  # noqa: S311 -- the same text each time is what is wanted
    for n in range(_FILES):
        file = folder / f"part{n % 20}" / f"module{n}.py"
        file.parent.mkdir(exist_ok=True)
        words = 60_000 if n % 100 == 0 else 600
        file.write_text(" ".join(chance.choices(_WORDS, k=words)), encoding="utf-8")


def run() -> Iterator[Result]:
    """Measure hashing and archiving together, since each side needs both to name its package."""
    from ray._private.runtime_env.packaging import create_package, get_uri_for_directory  # noqa: PLC0415 -- slow to import

    with tempfile.TemporaryDirectory() as temp:
        project, target = Path(temp, "project"), Path(temp, "ray.zip")
        project.mkdir()
        _project(project)

        sizes: dict[str, int] = {}

        def ours() -> None:
            with pack(project) as packed:
                sizes["ours"] = packed.bytes

        def theirs() -> None:
            get_uri_for_directory(str(project), include_gitignore=True)
            target.unlink(missing_ok=True)
            create_package(str(project), target, include_gitignore=True)
            sizes["theirs"] = target.stat().st_size

        figure, peer = medians(ours, theirs, rounds=5)
    peers = "Ray's own packaging"
    yield Result(f"time to pack {_FILES} files", figure, "s", peers, peer, bar=1.5)  # Ray's does not compress
    yield Result(f"bytes to send of {_FILES} files", sizes["ours"] / 1e6, "MB", peers, sizes["theirs"] / 1e6, bar=0.5)
