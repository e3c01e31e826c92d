"""Lets results of Ray Train and Tune land in the job's folder for checkpoints, where a program names no storage.

Python imports a module of this name at its start. Under ``launcher: ray`` this one lies first on PYTHONPATH, in the
runner's archive. Ray keeps results in ``~/ray_results`` by a constant (ray/train/constants.py in Ray 2.60; the
variables that once set it are errors by now), where two jobs with one run name would resume each other. The
environment's own ``sitecustomize``, if there is one, is run first.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType

_CONSTANTS = "ray.train.constants"
_CONSTANT = "DEFAULT_STORAGE_PATH"
_FOLDER = "RAYLAUNCH_CHECKPOINT_DIR"


class _Constants(importlib.abc.MetaPathFinder):
    """Finds Ray's constants as all others do, and changes one of them when they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _CONSTANTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Changing(spec.loader)
        return spec


class _Changing(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if hasattr(module, _CONSTANT):
            setattr(module, _CONSTANT, os.environ[_FOLDER])


def _run_the_other() -> None:
    """Run the ``sitecustomize`` that this one hides."""
    here = os.path.dirname(__file__)  # noqa: PTH120 -- this runs at the start of every Python: nothing is loaded for it
    others = [place for place in sys.path if place != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_run_the_other()
if os.environ.get(_FOLDER):
    sys.meta_path.insert(0, _Constants())
