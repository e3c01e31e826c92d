"""The runner as one file: a zip that any Python from 3.8 on can run."""

from __future__ import annotations

import importlib.util
import io
import marshal
import struct
import zipfile
from functools import lru_cache
from pathlib import Path

from raylaunch.contract import STARTUP

_PACKAGE = Path(__file__).resolve().parents[1]
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MAIN = """import sys

if sys.argv[1:2] == ["--rank"]:
    from raylaunch.runner.launchers.rank import main
elif sys.argv[1:2] == ["--together"]:
    from raylaunch.runner.netcheck import main
else:
    from raylaunch.runner.main import main

sys.exit(main(sys.argv[1:]))
"""
_JOB_MODULES = (
    "__init__.py",
    "job.py",
    "version.py",
    "errors.py",
    "contract.py",
    "files.py",
    "entrypoint.py",
    "tracking/__init__.py",
    "tracking/frames.py",
    "tracking/protobuf.py",
    "tracking/wandb_runs.py",
    "tracking/train_callback.py",
    "tracking/train_writer.py",
)
"""What a job's own code may import (`raylaunch.context`, `raylaunch.report`), what tracks Ray Train, and what
reads W&B's files, where no raylaunch is installed."""
_UNCHECKED_HASH = 1
"""The flag of PEP 552 for bytecode that is used without checking its source: both are in the same archive."""


@lru_cache(maxsize=1)
def runner_zip() -> bytes:
    """Return the archive that ``python -I runner.pyz FOLDER`` runs for the attempt in FOLDER.

    Each module comes with its bytecode for this Python, which is mostly the nodes' too: that makes the start 40 ms
    shorter. Another Python ignores it and compiles the source.

    The archive is also a place to import `raylaunch.job` from: it is put at the end of PYTHONPATH when the job's
    environment has no raylaunch.
    """
    files = {"__main__.py": _MAIN.encode()}
    for name in _JOB_MODULES:
        files[f"raylaunch/{name}"] = (_PACKAGE / name).read_bytes()
    for path in sorted((_PACKAGE / "runner").rglob("*.py")):
        if STARTUP not in path.parts:
            files[path.relative_to(_PACKAGE.parent).as_posix()] = path.read_bytes()
    for path in (_PACKAGE / "runner" / STARTUP).glob("*.py"):
        files[f"{STARTUP}/{path.name}"] = path.read_bytes()
    files[f"{STARTUP}/raylaunch_runs.py"] = files["raylaunch/tracking/wandb_runs.py"]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            for member, content in ((name, files[name]), (f"{name}c", _bytecode(name, files[name]))):
                info = zipfile.ZipInfo(member, _EPOCH)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = 0o644 << 16
                archive.writestr(info, content)
    return buffer.getvalue()


def _bytecode(name: str, source: bytes) -> bytes:
    """Return what a ``.pyc`` file holds: https://peps.python.org/pep-0552/."""
    code = compile(source, name, "exec", dont_inherit=True)
    flags = struct.pack("<I", _UNCHECKED_HASH)
    return importlib.util.MAGIC_NUMBER + flags + importlib.util.source_hash(source) + marshal.dumps(code)
