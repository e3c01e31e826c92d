"""``python -m tools.blocking_sdk``: writes the blocking SDK from the asynchronous one.

`Cluster` and `Job` have the signatures and docstrings of `AsyncCluster` and `AsyncJob`; each verb runs on a loop in a
thread of its own. What a notebook and ``with`` need in addition is the text `_OWN` below.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

SDK = Path(__file__).resolve().parents[1] / "raylaunch" / "sdk"
COMMAND = "make docs-reference"
"""The command that brings both modules up to date."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef

_WORDS = (
    (r"AsyncGenerator\[(.+), None\]", r"Generator[\1, None, None]"),
    (r"\bAn async context manager\b", "A context manager"),
    (r"\basync (with|def)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsync(Cluster|Job)\b", r"\1"),
    (r"\braylaunch\.aconnect\b", "raylaunch.connect"),
)

_HEAD = '''"""A {0}, blocking: each verb is that of `Async{1}`, also inside a notebook's running loop.

Generated from async_{0}.py: change that, then run `{2}`.
"""

from __future__ import annotations

'''

_OWN = {
    "cluster": """
    def __init__(self, asynchronous: AsyncCluster, loop: LoopThread) -> None:
        self._async = asynchronous
        self._loop = loop

    @classmethod
    def _opened(cls, work: Coroutine[None, None, AsyncCluster]) -> Self:
        loop = shared_loop()
        asynchronous = loop.run(work)
        loop.keep(asynchronous)
        return cls(asynchronous, loop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._async).replace("<AsyncCluster", "<Cluster", 1)

    def _repr_html_(self) -> str:
        return self._async._repr_html_()
""",
    "job": """
    def __init__(self, asynchronous: AsyncJob, loop: LoopThread) -> None:
        self._async = asynchronous
        self._loop = loop

    def __repr__(self) -> str:
        return repr(self._async).replace("<AsyncJob", "<Job", 1)

    def _repr_html_(self) -> str:
        try:
            card = self._loop.run(asyncio.wait_for(self._async.card(), _DISPLAY_S))
        except (RaylaunchError, asyncio.TimeoutError):
            card = Card(self._async.view, note="last known state: the cluster does not respond")
        return card._repr_html_()
""",
}
_CONSTANTS = {"cluster": "", "job": "\n_DISPLAY_S = 3.0\n"}
_IMPORTS = """
from collections.abc import Coroutine, Generator
from raylaunch.errors import RaylaunchError
from raylaunch.sdk.async_cluster import AsyncCluster, Notice, log_notice
from raylaunch.sdk.async_job import AsyncJob, no_progress
from raylaunch.sdk.job import Job
from raylaunch.sdk.loop import LoopThread, shared_loop
"""


def modules() -> dict[Path, str]:
    """Return both modules as they should be."""
    paths = {noun: SDK / f"{noun}.py" for noun in ("cluster", "job")}
    return {path: _formatted(path, _module(noun)) for noun, path in paths.items()}


def in_blocking_words(text: str) -> str:
    """Return a signature or docstring of the asynchronous SDK as the blocking one has it."""
    for asynchronous, blocking in _WORDS:
        text = re.sub(asynchronous, blocking, text)
    return text


def _module(noun: str) -> str:
    name = noun.capitalize()
    source = (SDK / f"async_{noun}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    kind = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == f"Async{name}")
    methods = [node for node in kind.body if isinstance(node, _Function) and not node.name.startswith("_")]
    lines = source.splitlines(keepends=True)
    doc = in_blocking_words("".join(lines[kind.lineno : kind.body[0].end_lineno]))
    body = "".join(f"\n{_method(node, lines, name)}" for node in methods)
    code = f"{_CONSTANTS[noun]}\n\nclass {name}:\n{doc}{_OWN[noun]}{body}"
    return _HEAD.format(noun, name, COMMAND) + _imports(tree, own=name) + code


def _method(node: _Function, lines: list[str], kind: str) -> str:
    first = min((item.lineno for item in node.decorator_list), default=node.lineno) - 1
    text = in_blocking_words("".join(lines[first : node.body[0].end_lineno]))
    return f"{text}        {_statement(node, kind)}\n"


def _statement(node: _Function, kind: str) -> str:
    """Return what a verb does: by what the asynchronous one is and returns."""
    decorators = {ast.unparse(item) for item in node.decorator_list}
    if "property" in decorators:
        return f"return self._async.{node.name}"
    if node.name == "close":
        return "self._loop.close(self._async)"
    on_class = "classmethod" in decorators
    loop = "shared_loop()" if on_class else "self._loop"
    work = f"{f'Async{kind}' if on_class else 'self._async'}.{node.name}({_arguments(node.args)})"
    run = f"{loop}.run({work})"
    match ast.unparse(node.returns) if node.returns else "":
        case "Self":
            value = f"cls._opened({work})"
        case "AsyncJob":
            value = f"Job({run}, self._loop)"
        case "tuple[AsyncJob, ...]":
            value = f"tuple(Job(job, self._loop) for job in {run})"
        case returned:
            value = f"{loop}.each({work})" if returned.startswith("AsyncGenerator[") else run
    return f"return {value}"


def _arguments(given: ast.arguments) -> str:
    by_place = [item.arg for item in (*given.posonlyargs, *given.args)][1:]
    return ", ".join([*by_place, *(f"{item.arg}={item.arg}" for item in given.kwonlyargs)])


def _imports(tree: ast.Module, *, own: str) -> str:
    """Return all imports that the module may need, except of itself; ruff removes those that it does not."""
    added = [line for line in _IMPORTS.splitlines() if not line.endswith(f"import {own}")]
    plain = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for_types = [ast.unparse(node) for node in tree.body if isinstance(node, ast.If)]
    return "\n".join([*plain, *added, *for_types, ""])


def _formatted(path: Path, code: str) -> str:
    fix = ["check", "--fix-only"]
    for command in ([*fix, "--select=F401"], [*fix, "--select=I001"], ["format"]):
        line = [sys.executable, "-m", "ruff", *command, "--quiet", f"--stdin-filename={path}", "-"]
        code = subprocess.run(line, input=code, check=True, capture_output=True, encoding="utf-8", cwd=SDK).stdout  # noqa: S603 -- ruff, on our own text
    return code


if __name__ == "__main__":
    for path, text in modules().items():
        path.write_text(text, encoding="utf-8")
