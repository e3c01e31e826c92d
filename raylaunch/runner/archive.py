"""The runner as one file: a zip that any Python from 3.8 on can run, the same bytes each time it is made."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from raylaunch.runner.contract import STARTUP

_PACKAGE = Path(__file__).resolve().parent.parent
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MAIN = """import sys

if sys.argv[1:2] == ["--rank"]:
    from raylaunch.runner.rank import main
elif sys.argv[1:2] == ["--fit"]:
    from raylaunch.runner.ray_fit import main
else:
    from raylaunch.runner.main import main

sys.exit(main(sys.argv[1:]))
"""
_JOB_MODULES = (
    "__init__.py",
    "job.py",
    "version.py",
    "tracking/__init__.py",
    "tracking/train_callback.py",
    "tracking/train_writer.py",
)
"""What a job's own code may import (`raylaunch.context`, `raylaunch.report`), and what tracks Ray Train, where no
raylaunch is installed."""


def runner_zip() -> bytes:
    """Return the archive that ``python -I runner.pyz FOLDER`` runs for the attempt in FOLDER.

    The archive is also a place to import `raylaunch.job` from: it is put at the end of PYTHONPATH when the job's
    environment has no raylaunch.
    """
    files = {"__main__.py": _MAIN.encode()}
    for name in _JOB_MODULES:
        files[f"raylaunch/{name}"] = (_PACKAGE / name).read_bytes()
    for path in sorted((_PACKAGE / "runner").glob("*.py")):
        files[f"raylaunch/runner/{path.name}"] = path.read_bytes()
    for path in (_PACKAGE / "runner" / STARTUP).glob("*.py"):
        files[f"{STARTUP}/{path.name}"] = path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, files[name])
    return buffer.getvalue()
