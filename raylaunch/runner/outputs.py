"""Files of the working directory that the spec names as outputs, kept beside what the program wrote there itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path


def collect(code: Path, outputs: Path, patterns: Sequence[str]) -> list[str]:
    """Keep the files of `code` that match, under their relative paths in `outputs`. Returns warnings in words."""
    warnings = []
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            warnings.append(f"outputs: {pattern!r} leads out of the working directory and was not kept")
            continue
        found = False
        for path in _files(code, pattern):
            found = True
            try:
                _keep(path, outputs / path.relative_to(code))
            except OSError as error:
                warnings.append(f"outputs: {path.relative_to(code)} could not be kept: {error.strerror or error}")
        if not found:
            warnings.append(f"outputs: nothing matches {pattern!r} in the working directory")
    return warnings


def _files(code: Path, pattern: str) -> Iterator[Path]:
    inside = code.resolve()
    for path in sorted(code.glob(pattern)):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and inside in file.resolve().parents:
                yield file


def _keep(source: Path, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(str(source.resolve()), str(target))
    except OSError:  # another file system, or one without hard links
        shutil.copy2(str(source), str(target))
