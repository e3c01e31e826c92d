"""raylaunch beside an environment that the user names, which stays as it is.

A virtual environment of one package, through whose ``.pth`` file all of the named one is seen. So its interpreter needs
no ``PYTHONPATH``, which Ray, jobs and isolated interpreters would each have to be given.
"""

from __future__ import annotations

import os
import site
import sys
import zipfile
from pathlib import Path

from raylaunch.cluster.installer.make import complete, making
from raylaunch.cluster.installer.named import check_named
from raylaunch.cluster.installer.words import Request

_PROGRAM = 0o755
_CONSOLE = '#!/bin/sh\nexec "$(dirname -- "$0")/python" -m raylaunch "$@"\n'


def add_beside(request: Request) -> dict[str, object]:
    """Make an environment that holds raylaunch alone and sees all of the one that runs this.

    Raises:
        Problem: the named one does not fit, or it cannot be made.
    """
    check_named(request)
    with making(request) as (places, needed):
        if needed and request.own:
            _make(places.making, places.wheel(request.own))
            complete(request, places)
    return {"python": str(places.python)}


def _make(folder: Path, own: Path) -> None:
    packages = folder / "lib" / "python{}.{}".format(*sys.version_info[:2]) / "site-packages"
    packages.mkdir(parents=True)
    base = Path(str(getattr(sys, "_base_executable", "") or sys.executable))
    lines = [f"home = {base.parent}", f"include-system-site-packages = {str(_sees_base()).lower()}"]
    (folder / "pyvenv.cfg").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    added = "".join(f"import site; site.addsitedir({path!r})\n" for path in _own_packages())
    (packages / "named_environment.pth").write_text(added, encoding="utf-8")
    with zipfile.ZipFile(own) as archive:
        archive.extractall(packages)
    _make_programs(folder / "bin", base)


def _is_virtual() -> bool:
    return sys.prefix != sys.base_prefix


def _own_packages() -> list[str]:
    """Return where a named virtual environment keeps its packages; those of a base Python are seen anyway."""
    return [path for path in site.getsitepackages() if path.startswith(sys.prefix)] if _is_virtual() else []


def _sees_base() -> bool:
    """Say whether the packages of the base Python are to be seen."""
    config = Path(sys.prefix, "pyvenv.cfg")
    if not _is_virtual() or not config.is_file():
        return True
    words = config.read_text(encoding="utf-8").lower().replace(" ", "")
    return "include-system-site-packages=true" in words


def _make_programs(folder: Path, base: Path) -> None:
    """Put the named environment's programs (``torchrun`` and such) where jobs find them, and ours beside."""
    folder.mkdir()
    (folder / "python").symlink_to(base)
    (folder / "python3").symlink_to("python")
    (folder / "raylaunch").write_text(_CONSOLE, encoding="ascii")
    (folder / "raylaunch").chmod(_PROGRAM)
    for program in sorted(Path(sys.prefix, "bin").iterdir()) if _is_virtual() else ():
        ours = program.name.startswith("python") or (folder / program.name).exists()
        if not ours and os.access(program, os.X_OK):
            (folder / program.name).symlink_to(program)
