"""What a Python program may use of raylaunch, from signatures and docstrings."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from functools import cache
from typing import Annotated, get_args, get_origin

import raylaunch.models.cluster
import raylaunch.models.job
from raylaunch import errors, job, sdk
from raylaunch.client import downloads, submission, transport
from raylaunch.cluster import types
from raylaunch.errors import RaylaunchError
from raylaunch.models import fields
from raylaunch.sdk import arguments, async_cluster, display
from tools.reference import markdown, source

TWINS: dict[type, type] = {sdk.Cluster: sdk.AsyncCluster, sdk.Job: sdk.AsyncJob}
_HOMES = (raylaunch.models.job, raylaunch.models.cluster, display, downloads, submission, transport, types)
_ALIASES = {"Asked": arguments, "Which": arguments, "Notice": async_cluster, "OnStep": display, "OnProgress": transport}
_SPECS = ("JobSpec", "Resources", "Where", "Tracking", "Environment")
_ELSEWHERE = {
    **dict.fromkeys(_SPECS, "job-file.md"),
    **dict.fromkeys(_ALIASES, "#words-in-signatures"),
    "ClusterSpec": "cluster-file.md",
    "JobState": "reasons.md#states",
    "Reason": "reasons.md",
    "TimeoutError": "#errors",
}
_INTRODUCTION = """\
How it is used: [From Python](../python.md). What comes as an answer is under [What is seen](#what-is-seen).

```python
import raylaunch
```
"""
_ASYNCHRONOUS = """\
`AsyncCluster` and `AsyncJob` have the same verbs with the same arguments; a test holds both equal. What blocks there
is awaited here, and what is looped over is looped over with `async for`. `raylaunch.aconnect` is awaited too, and
takes what [`raylaunch.connect`](#raylaunchconnect) takes."""
_IN_A_JOB = """\
What training code may import, in any environment: where raylaunch is not installed, the runner offers this much."""
_ERRORS = """\
`RaylaunchError` and `JobFailedError` are had from `raylaunch`, the others from `raylaunch.errors`. Each has `message`
(what failed, on what, why) and `hint` (what to do next). A time limit of yours that is over raises Python's own
`TimeoutError`."""
_SEEN = """\
Immutable. Most are `--json` and the HTTP answers as well. Times are seconds since the epoch (UTC), sizes bytes,
durations seconds."""
_NAME = re.compile(r"\b[A-Z]\w+")


def page() -> str:
    """Return the Python reference."""
    lines = [
        *_introduction(),
        *_cluster(),
        *_class(sdk.Job, "job"),
        *_asynchronous(),
        *_in_a_job(),
        *_errors(),
        *_seen(),
        *_words(),
    ]
    return markdown.page("Python reference", "the docstrings in raylaunch", lines)


def functions() -> Iterator[tuple[str, Callable[..., object]]]:
    """Yield every function, method and property that the page describes, with its name."""
    yield "raylaunch.context", job.context
    yield "raylaunch.report", job.report
    for kind in (*TWINS, *TWINS.values(), *shown()):
        for node in source.functions(kind):
            yield f"{kind.__name__}.{node.name}", _function_of(vars(kind)[node.name])


def classes() -> Iterator[type]:
    """Yield every class that the page describes."""
    yield from (*TWINS, *TWINS.values(), job.Context, *_tree(RaylaunchError), *shown())


@cache
def shown() -> tuple[type, ...]:
    """Return the classes of what the verbs return and take, and of what those hold, in order of appearance."""
    found: list[type] = []
    texts = [ast.unparse(part) for kind in TWINS for node in source.functions(kind) for part in _annotations(node)]
    while texts:
        for name in _NAME.findall(texts.pop(0)):
            kind = _of_ours(name)
            if kind and kind not in found and name not in _ELSEWHERE:
                found.append(kind)
                texts += [field.annotation for field in source.fields(kind)]
                texts += [ast.unparse(part) for node in source.functions(kind) for part in _annotations(node)]
    return tuple(found)


def _of_ours(name: str) -> type | None:
    found = next((getattr(home, name) for home in _HOMES if hasattr(home, name)), None)
    return found if isinstance(found, type) and found.__module__.startswith("raylaunch.") else None


def _annotations(node: source.Function) -> Iterator[ast.expr]:
    given = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    yield from (one.annotation for one in given if one.annotation)
    if node.returns:
        yield node.returns


def _function_of(item: object) -> Callable[..., object]:
    function = item.fget if isinstance(item, property) else getattr(item, "__func__", item)
    assert callable(function)  # noqa: S101 -- what a class's body defines with `def`
    return function


def _tree(root: type[RaylaunchError]) -> Iterator[type[RaylaunchError]]:
    """Yield the errors of `raylaunch.errors`, each before those below it."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _tree(child)


def _introduction() -> Iterator[str]:
    yield _INTRODUCTION
    rows = [
        ("[`raylaunch.connect`](#raylaunchconnect)", "a cluster"),
        ("[`Cluster`](#cluster), [`Job`](#job)", "the verbs, blocking"),
        ("[`AsyncCluster`, `AsyncJob`, `raylaunch.aconnect`](#asynchronous)", "the same verbs, to be awaited"),
        ("[`raylaunch.context`, `raylaunch.report`](#in-a-job)", "for the training itself"),
        ("[`RaylaunchError`, `JobFailedError`](#errors)", "what is raised on purpose"),
        (
            "[`JobSpec`](job-file.md)",
            "the job file as an object; its parts are `raylaunch.Resources`, `Where`, `Tracking`, `Environment`",
        ),
        ("[`ClusterSpec`](cluster-file.md)", "the cluster file as an object"),
        ("[`JobState`](reasons.md#states)", "where a job stands"),
    ]
    yield from markdown.table(("name", "is"), rows)


def _cluster() -> Iterator[str]:
    yield from markdown.heading(2, "raylaunch.connect")
    connect = source.function_node(_function_of(vars(sdk.Cluster)["connect"]))
    yield from _function(_naming(connect, sdk.Cluster), "raylaunch.connect")
    yield from _class(sdk.Cluster, "cluster", without={"connect"})


def _class(kind: type, name: str, *, without: AbstractSet[str] = frozenset()) -> Iterator[str]:
    yield from markdown.heading(2, kind.__name__)
    yield source.doc(kind.__doc__).text
    yield from _properties(kind, f"{name}.")
    for node in source.functions(kind):
        if not source.is_property(node) and node.name not in without:
            verb = _verb(kind, node, name)
            yield from markdown.heading(3, verb)
            yield from _function(_naming(node, kind), verb)


def _verb(kind: type, node: source.Function, name: str) -> str:
    """Return how a method is called: on an object of that name, or on the class."""
    return f"{kind.__name__ if source.is_of_the_class(node) else name}.{node.name}"


def _naming(node: source.Function, kind: type) -> source.Function:
    """Return a method whose class stands by its name where it is written `Self`."""
    if _returned(node) == "Self":
        node.returns = ast.Name(kind.__name__)
    return node


def _properties(kind: type, prefix: str = "") -> list[str]:
    rows = [(field.name, field.annotation, field.text) for field in source.fields(kind)]
    rows += [
        (node.name, _returned(node), source.doc(ast.get_docstring(node)).text)
        for node in source.functions(kind)
        if source.is_property(node)
    ]
    cells = [(markdown.code(prefix + name), _linked(_unbounded(words)), _plain(text)) for name, words, text in rows]
    return markdown.table(("name", "is", "means"), cells)


def _unbounded(words: str) -> str:
    """Write a number with bounds as the number that it is."""
    return _NAME.sub(lambda found: _number(getattr(fields, found[0], None)) or found[0], words)


def _number(alias: object) -> str:
    kind = next(iter(get_args(alias)), None) if get_origin(alias) is Annotated else None
    return kind.__name__ if kind in {int, float} and isinstance(kind, type) else ""


def _function(node: source.Function, call: str) -> Iterator[str]:
    doc = source.doc(ast.get_docstring(node))
    yield from markdown.fence("py", source.signature(node, call))  # ``python`` is what could be run as it stands
    yield doc.text
    rows = [(markdown.code(name), markdown.sentence(text)) for name, text in doc.of("Args").items()]
    yield from markdown.table(("argument", "is"), rows)
    if _returned(node) not in {"", "None"}:
        yield from ("", f"Returns {_linked(_returned(node))}" + (f": {doc.returns}" if doc.returns else "."), "")
    raised = [(_linked(name), markdown.sentence(text)) for name, text in doc.of("Raises").items()]
    yield from markdown.table(("raises", "when"), raised)


def _asynchronous() -> Iterator[str]:
    yield from markdown.heading(2, "Asynchronous")
    yield _ASYNCHRONOUS
    rows = []
    for twin, truth in TWINS.items():
        for node in source.functions(truth):
            if not source.is_property(node) and node.name != "connect":
                verb = _verb(twin, node, twin.__name__.lower())
                awaited = _verb(truth, node, twin.__name__.lower())
                loops = _returned(node).startswith("AsyncGenerator")
                call = f"async for … in {awaited}(…)" if loops else f"await {awaited}(…)"
                rows.append((markdown.code(call), f"[`{verb}`](#{markdown.anchor(verb)})"))
    yield from markdown.table(("asynchronous", "is"), rows)


def _in_a_job() -> Iterator[str]:
    yield from markdown.heading(2, "In a job")
    yield _IN_A_JOB
    for function in (job.context, job.report):
        yield from markdown.heading(3, f"raylaunch.{function.__name__}")
        yield from _function(source.function_node(function), f"raylaunch.{function.__name__}")
    yield from _described(job.Context)


def _errors() -> Iterator[str]:
    yield from markdown.heading(2, "Errors")
    drawing = (errors.__doc__ or "").split("::\n")[1].split("\n\nA ")[0]
    yield _ERRORS
    yield from markdown.fence("text", textwrap.dedent(drawing))
    rows = [
        (markdown.code(kind.__name__), source.doc(kind.__doc__).text, markdown.code(kind.code), str(kind.status))
        for kind in _tree(RaylaunchError)
    ]
    yield from markdown.table(("error", "is", "code", "over HTTP"), rows)


def _seen() -> Iterator[str]:
    yield from markdown.heading(2, "What is seen")
    yield _SEEN
    for kind in shown():
        yield from _described(kind)


def _described(kind: type) -> Iterator[str]:
    yield from markdown.heading(3, kind.__name__)
    doc = source.doc(kind.__doc__)
    yield doc.text
    yield from _properties(kind)
    for node in source.functions(kind):
        if not source.is_property(node):
            yield from _function(node, f"{kind.__name__.lower()}.{node.name}")


def _words() -> Iterator[str]:
    yield from markdown.heading(2, "Words in signatures")
    aliases = [source.alias(module, name) for name, module in _ALIASES.items()]
    rows = [(markdown.code(one.name), markdown.code(one.annotation), _plain(one.text)) for one in aliases]
    yield from markdown.table(("word", "is", "means"), rows)


def _returned(node: source.Function) -> str:
    return ast.unparse(node.returns) if node.returns else ""


def _linked(words: str) -> str:
    """Return a type with its names as links, where there is something to lead to."""
    known = {**{kind.__name__: f"#{kind.__name__.lower()}" for kind in (*TWINS, *shown())}, **_ELSEWHERE}
    known |= {kind.__name__: "#errors" for kind in _tree(RaylaunchError)}
    known["ClusterStatus"] = "#clusterstatus-1"  # `cluster.status` has the same anchor, and comes first
    parts = re.split(r"\b([A-Z]\w+)\b", words)
    linked = [f"[`{part}`]({known[part]})" if part in known else _escaped(part) for part in parts]
    return "".join(linked) if any(part in known for part in parts) else markdown.code(words)


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]*_])", r"\\\1", text)


def _plain(text: str) -> str:
    return markdown.sentence(text.replace("\n", " ")) if text else ""
