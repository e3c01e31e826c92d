"""raylaunch 0.1.0 as it was released, in an environment of its own, and jobs that run while it is upgraded."""

from __future__ import annotations

import sysconfig
import venv
import zipfile
from pathlib import Path

from uv import find_uv_bin

VERSION = "0.1.0"
WHEEL = Path(__file__).parents[1] / "data" / f"raylaunch-{VERSION}-py3-none-any.whl"

STEPS = 40
HALF = 20
LOSSES = [1 / (step + 1) for step in range(STEPS)]
TRAINS = f"""\
import os, pathlib, sys, time
import raylaunch, wandb

saved = pathlib.Path(os.environ["RAYLAUNCH_CHECKPOINT_DIR"], "step")
start = int(saved.read_text()) if saved.exists() else 0
print("starts at", start, flush=True)
run = wandb.init(project="digits")
for step in range(start, {STEPS}):
    if step == {HALF} and start == 0:
        print("halfway", flush=True)
        while not os.path.exists(os.environ["GO_ON"]):
            time.sleep(0.1)
        if "FAILS" in os.environ:
            sys.exit(3)
    run.log({{"loss": 1 / (step + 1)}})
    raylaunch.report({{"accuracy": step / {STEPS}}}, step=step, total={STEPS})
    print("step", step, flush=True)
    saved.write_text(str(step + 1))
pathlib.Path(os.environ["RAYLAUNCH_OUTPUT_DIR"], "model.txt").write_text("trained")
print("trained", flush=True)
"""
"""Logs to W&B, reports, and saves; halfway it waits for a file, and fails then where it is told to."""


def install(folder: Path) -> Path:
    """Make an environment with raylaunch 0.1.0 that has everything else from the one of the tests; return its Python.

    A path in a ``.pth`` file comes after the environment's own packages, and its own ``.pth`` files are not read: the
    raylaunch under test is not in it.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(packages)
    (packages / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    (folder / "bin" / "uv").symlink_to(find_uv_bin())
    return folder / "bin" / "python"


def lines(first: int, *, trained: bool = True) -> list[str]:
    """Return what `TRAINS` prints from a step on, to its end or to where it waits."""
    end = STEPS if trained else HALF
    steps = [f"step {step}" for step in range(first, end)]
    if first == 0:
        steps.insert(HALF, "halfway")
    return [f"starts at {first}", *steps, *(["trained"] if trained else [])]


def output(log: str) -> list[str]:
    """Return the lines of a log that `TRAINS` printed, without those of W&B."""
    ours = ("starts", "step", "halfway", "trained")
    return [line for line in log.splitlines() if line.startswith(ours)]
