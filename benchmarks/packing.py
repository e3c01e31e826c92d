"""Packing a working directory, compared with what ``ray job submit --working-dir`` does before it sends anything."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Result, compared, in_turns, seconds
from benchmarks.workshop import Workshop
from raylaunch.client.packing import pack

_FILES, _FEW_FILES = 1000, 50
_ROUNDS = 5
_WORDS = ("tensor", "batch", "layer", "loss", "return", "self", "def", "import", "for", "in", "range", "(", ")", "\n  ")


def run(shop: Workshop) -> Iterator[Result]:
    """Measure hashing and archiving together, since each side needs both to name its package."""
    from ray._private.runtime_env.packaging import create_package, get_uri_for_directory  # noqa: PLC0415 -- slow to import

    files = _FEW_FILES if shop.quick else _FILES
    with tempfile.TemporaryDirectory(dir=shop.folder) as temp:
        project, target = Path(temp, "project"), Path(temp, "ray.zip")
        _write_project(project, files)
        sizes = {"ours": 0, "theirs": 0}

        def ours() -> None:
            with pack(project) as packed:
                sizes["ours"] = packed.bytes

        def theirs() -> None:
            get_uri_for_directory(str(project), include_gitignore=True)
            target.unlink(missing_ok=True)
            create_package(str(project), target, include_gitignore=True)
            sizes["theirs"] = target.stat().st_size

        pairs = in_turns(lambda: seconds(ours), lambda: seconds(theirs), rounds=shop.rounds(_ROUNDS))
    peer = "Ray's own packaging"
    how = f"Time to hash and pack a project of {files} text files. Ray's archive is not compressed."
    yield compared("pack_time", pairs, unit="s", peer=peer, how=how)
    how = f"Bytes that are sent for a project of {files} text files."
    yield Result("pack_size", sizes["ours"] / 1e6, "MB", how, peer=peer, peer_figure=sizes["theirs"] / 1e6)


def _write_project(folder: Path, files: int) -> None:
    """Write a project's worth of text: many small files and a few large ones, the same each time."""
    chance = random.Random(0)  # noqa: S311 -- the same text each time is what is wanted
    for n in range(files):
        file = folder / f"part{n % 20}" / f"module{n}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        words = 60_000 if n % 100 == 0 else 600
        file.write_text(" ".join(chance.choices(_WORDS, k=words)), encoding="utf-8")
