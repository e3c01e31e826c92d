"""The installer as a program: one request, its answers, an exit status."""

from __future__ import annotations

import os
from pathlib import Path

from raylaunch.cluster.installer.beside import add_beside
from raylaunch.cluster.installer.look import look
from raylaunch.cluster.installer.make import make
from raylaunch.cluster.installer.places import storage_problem
from raylaunch.cluster.installer.receive import receive
from raylaunch.cluster.installer.words import Problem, Request, say

_VERBS = {"look": look, "make": make, "add_beside": add_beside, "receive": receive}


def main(body: str) -> int:
    """Do what the request asks for; return the exit status."""
    os.umask(0o077)
    request = Request.read(body)
    try:
        result = _VERBS[request.verb](request)
    except Problem as problem:
        return _refuse(problem)
    except OSError as error:
        return _refuse(storage_problem(error, Path(str(error.filename or request.root))))
    say("result", result)
    return 0


def _refuse(problem: Problem) -> int:
    say("error", {"code": problem.code, "message": problem.message, "hint": problem.hint})
    return 1
