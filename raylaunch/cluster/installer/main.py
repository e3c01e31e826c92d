"""The installer as a program: one request, its answers, an exit status."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from raylaunch.cluster.installer.folders import storage_problem
from raylaunch.cluster.installer.protocol import InstallerProblem, Request, say

_MODULES = {"look": "environment", "make": "environment", "add_beside": "environment", "unpack": "folders"}


def main(body: str) -> int:
    """Do what the request asks for; return the exit status."""
    os.umask(0o077)
    request = Request.read(body)
    try:
        # What the verb does not need is not imported: starting is most of what a look takes.
        module = importlib.import_module(f"raylaunch.cluster.installer.{_MODULES[request.verb]}")
        result = getattr(module, request.verb)(request)
    except InstallerProblem as problem:
        return _refuse(problem)
    except OSError as error:
        return _refuse(storage_problem(error, Path(str(error.filename or request.root))))
    say("result", result)
    return 0


def _refuse(problem: InstallerProblem) -> int:
    say("error", {"code": problem.code, "message": problem.message, "hint": problem.hint})
    return 1
