"""Links or copies every W&B run that an attempt opens into the attempt's own folder, whatever `dir` its program uses.

`wandb.init(dir=…)`, `Settings(root_dir=…)` and Lightning's ``WandbLogger(save_dir=".")`` take precedence over
WANDB_DIR. A run's file is linked into `contract.WANDB` (so it grows there too) or, from another file system, copied as
it grows; what W&B keeps next to it follows at the end. Runs are found through the notes of `wandb_runs`, the files that
the attempt's ``wandb-core`` processes hold open, and, at the end, the working directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from raylaunch import contract
from raylaunch.files import link_or_copy
from raylaunch.runner.processes import open_wandb_files
from raylaunch.tracking import wandb_runs

_GROW_S = 0.25
_SCAN_S = 1.0
_PROC_S = 2.0
_FILES = "files"
_RUN_FILE = re.compile(r"run-(?P<id>[^/]+)\.wandb")
_MANY_FOLDERS = 100_000


class RunFollower:
    """The W&B runs of one attempt.

    `poll` is called repeatedly, `finish` when no process of the attempt is left.
    """

    def __init__(self, folder: Path, tag: str) -> None:
        """Follow the runs of the attempt in `folder`, whose processes carry `tag`."""
        self._home = folder / contract.WANDB / "wandb"
        self._code = folder / contract.CODE
        self._folder = os.path.realpath(str(folder))
        self._notes = folder / contract.WANDB_RUNS / wandb_runs.PLACES
        self._tag = tag
        self._since = time.time()
        self._next = {self._copy_growth: 0.0, self._scan: 0.0, self._check_cores: 0.0}
        self._linked: dict[Path, Path] = {}
        """The file in this attempt's folder, by the file that W&B writes."""
        self._copied: set[Path] = set()
        """Files of `_linked` that are copies."""
        self.ids: list[str] = []
        """Of all runs that were found, in the order of their start."""

    def poll(self) -> None:
        """Link or copy what is new; each step at its own interval."""
        now = time.monotonic()
        pauses = {self._copy_growth: _GROW_S, self._scan: _SCAN_S, self._check_cores: _PROC_S}
        for step, at in self._next.items():
            if now >= at:
                step()
                spent = time.monotonic() - now
                self._next[step] = now + max(pauses[step], 20 * spent)
                now += spent

    def finish(self) -> None:
        """Link or copy everything that was written, with what W&B keeps next to the runs' files."""
        self._check_cores()
        for place in self._run_folders_in_code():
            self._scan_folder(place, None)
        self._scan()
        self._copy_growth()
        for source, target in self._linked.items():
            self._copy_files(source.parent / _FILES, target.parent / _FILES)

    def _check_cores(self) -> None:
        for name in open_wandb_files(self._tag):
            path = Path(name)
            if _RUN_FILE.fullmatch(path.name):
                self._link_run(path)

    def _scan(self) -> None:
        self._scan_folder(self._code / "wandb", None)
        for place, ids in self._read_notes().items():
            self._scan_folder(Path(place), ids)
        files = sorted(self._home.glob("*run-*/run-*.wandb"), key=_started)
        self.ids = list(dict.fromkeys(path.stem[len("run-") :] for path in files))

    def _read_notes(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        with contextlib.suppress(OSError):
            for line in self._notes.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # a job can write there too
                    note = json.loads(line)
                    found.setdefault(note["place"], set()).add(note["id"])
        return found

    def _run_folders_in_code(self) -> Iterator[Path]:
        for count, (folder, names, _) in enumerate(os.walk(str(self._code))):
            if count >= _MANY_FOLDERS:
                return
            if any("run-" in name for name in names):
                yield Path(folder)

    def _scan_folder(self, place: Path, ids: set[str] | None) -> None:
        """Link runs with these ids (None: all) from a folder that wandb made; older ones belong to other jobs."""
        if place.is_symlink() and ids is None:
            return
        with contextlib.suppress(OSError):
            for folder in os.scandir(str(place)):
                if "run-" not in folder.name or folder.is_symlink():
                    continue
                for path in Path(folder.path).glob("run-*.wandb"):
                    matched = _RUN_FILE.fullmatch(path.name)
                    wanted = matched is not None and (ids is None or matched.group("id") in ids)
                    if wanted and path.stat().st_mtime >= self._since:
                        self._link_run(path)

    def _link_run(self, source: Path) -> None:
        source = Path(os.path.realpath(str(source)))
        if source in self._linked or source.parent.parent == Path(os.path.realpath(str(self._home))):
            return
        target = self._free_folder(source.parent.name) / source.name
        try:
            target.parent.mkdir(mode=0o700, parents=True)
            try:
                os.link(str(source), str(target))
            except OSError:
                self._copied.add(source)
        except OSError:
            return  # for example, a full disk: the next round retries
        self._linked[source] = target

    def _free_folder(self, name: str) -> Path:
        number, folder = 0, self._home / name
        while folder.exists():
            number += 1
            folder = self._home / f"{name}-{number}"
        return folder

    def _copy_growth(self) -> None:
        for source in self._copied:
            with contextlib.suppress(OSError), source.open("rb") as reader, self._linked[source].open("ab") as writer:
                if reader.seek(0, os.SEEK_END) < writer.tell():  # it was replaced
                    writer.truncate(0)
                reader.seek(writer.seek(0, os.SEEK_END))
                shutil.copyfileobj(reader, writer, 1 << 20)

    def _copy_files(self, source: Path, target: Path) -> None:
        for folder, _, names in os.walk(str(source)):
            for name in names:
                path = Path(os.path.realpath(os.path.join(folder, name)))  # noqa: PTH118 -- `run.save` makes links
                if not path.is_file() or os.path.commonpath([str(path), self._folder]) != self._folder:
                    continue
                copy = target / os.path.relpath(folder, str(source)) / name
                with contextlib.suppress(OSError):
                    copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    link_or_copy(path, copy)


def _started(path: Path) -> tuple[str, str]:
    """Order runs by the time in their folder's name."""
    return path.parent.name.replace("offline-run-", "run-", 1), path.name
