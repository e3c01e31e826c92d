"""Patches two modules in the programs of an attempt when they are imported: W&B's and Ray Train's.

Python imports a module of this name at its start. This one is first on PYTHONPATH, in the runner's archive; the
environment's own ``sitecustomize``, if there is one, is run first. It loads nothing that Python has not loaded by then.

- W&B runs get their ids from `raylaunch_runs` (`raylaunch.tracking.wandb_runs`): WANDB_RUN_ID would make all runs of
  all processes one run.
- Under ``launcher: ray`` results of Ray Train and Tune land in the job's folder for checkpoints, where a program names
  no storage. Ray keeps them in ``~/ray_results`` by a constant (ray/train/constants.py in Ray 2.60; the variables that
  once set it are errors by now), where two jobs with one run name would resume each other.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader
    from types import ModuleType


class _PatchingFinder:
    """Finds a module as usual, and has it patched when it is loaded."""

    def __init__(self, name: str, patch: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._patch = patch

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        if self in sys.meta_path:  # another thread may import it at the same moment
            sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader, self._patch)  # type: ignore[assignment]  # it loads as a Loader does
        return spec


class _PatchingLoader:
    """Loads a module by its own loader, then patches it."""

    def __init__(self, loader: Loader, patch: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._patch = patch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            self._patch(module)
        except Exception as error:  # noqa: BLE001 -- a program must not fail for what is changed here
            sys.stderr.write(f"raylaunch: {module.__name__} is left as it is ({type(error).__name__}: {error})\n")

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


def _store_results(constants: ModuleType) -> None:
    if hasattr(constants, "DEFAULT_STORAGE_PATH"):
        setattr(constants, "DEFAULT_STORAGE_PATH", os.environ["RAYLAUNCH_CHECKPOINT_DIR"])  # noqa: B010 -- Ray's own


def _name_runs(wandb_init: ModuleType) -> None:
    from importlib import import_module  # noqa: PLC0415 -- only in programs that use wandb

    import_module("raylaunch_runs").install(wandb_init)


def _run_hidden_sitecustomize() -> None:
    """Run the ``sitecustomize`` that this one hides."""
    here = os.path.dirname(__file__)  # noqa: PTH120 -- this runs at the start of every Python: nothing is loaded for it
    spec = PathFinder.find_spec("sitecustomize", [folder for folder in sys.path if folder != here])
    if spec is not None and spec.loader is not None:
        from importlib.util import module_from_spec  # noqa: PLC0415 -- as above

        spec.loader.exec_module(module_from_spec(spec))


_run_hidden_sitecustomize()
if os.environ.get("RAYLAUNCH_WANDB_RUNS"):
    sys.meta_path.insert(0, _PatchingFinder("wandb.sdk.wandb_init", _name_runs))
if os.environ.get("RAYLAUNCH_TRAIN_REPORTS") and os.environ.get("RAYLAUNCH_CHECKPOINT_DIR"):
    sys.meta_path.insert(0, _PatchingFinder("ray.train.constants", _store_results))
