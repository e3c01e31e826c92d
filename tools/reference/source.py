"""The documentation of a class or a function in the source: fields with their text, signatures, parts of docstrings."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns):\n((?:    .*\n?|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^(\*{0,2}\w+): ", re.MULTILINE)

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Field(NamedTuple):
    """One field of a class, or one member of an enumeration."""

    name: str
    annotation: str
    default: str
    text: str
    """The string beneath it."""


class Doc(NamedTuple):
    """A docstring in parts."""

    text: str
    """All that is before the sections, as Markdown."""
    sections: dict[str, dict[str, str]]
    """``Args``, ``Attributes`` and ``Raises``: name → text."""
    returns: str
    """What stands under ``Returns``."""

    def of(self, section: str) -> dict[str, str]:
        """Return a section, empty where there is none."""
        return self.sections.get(section, {})


@functools.cache
def class_node(kind: type) -> ast.ClassDef:
    """Return a class as it is written."""
    node = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(node, ast.ClassDef)  # noqa: S101 -- what `getsource` returns of a class
    return node


@functools.cache
def function_node(function: Callable[..., object]) -> Function:
    """Return a function as it is written."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)  # noqa: S101 -- as above, of a function
    return node


def fields(kind: type) -> Iterator[Field]:
    """Yield the public fields of a class, each with the string beneath it."""
    body = class_node(kind).body
    for node, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                words, default = ast.unparse(annotation), ast.unparse(value) if value else ""
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                words, default = "", ast.unparse(value)
            case _:
                continue
        if not name.startswith("_") and name != "model_config" and not words.startswith("ClassVar"):
            yield Field(name, words, default, _string(after))


def alias(module: ModuleType, name: str) -> Field:
    """Return a name that a module gives to a type, with the string beneath it."""
    body = ast.parse(inspect.getsource(module)).body
    for node, after in itertools.pairwise(body):
        match node:
            case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                return Field(name, ast.unparse(value), "", _string(after))
            case _:
                pass
    msg = f"{module.__name__} has no {name}"
    raise LookupError(msg)


def functions(kind: type) -> Iterator[Function]:
    """Yield the public methods and properties of a class, as they are written."""
    for node in class_node(kind).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node


def is_property(node: Function) -> bool:
    """Whether a method is a property."""
    return _decorated(node, "property")


def is_of_the_class(node: Function) -> bool:
    """Whether a method is called on the class."""
    return _decorated(node, "classmethod")


def _decorated(node: Function, name: str) -> bool:
    return any(isinstance(one, ast.Name) and one.id == name for one in node.decorator_list)


def parameters(node: Function) -> list[str]:
    """Return the names of what a caller gives."""
    given = node.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [one.arg for one in (given.vararg, given.kwarg) if one]
    return [name for name in names if name not in {"self", "cls"}]


def signature(node: Function, call: str, *, width: int = 88) -> str:
    """Return how a function is called, on one line where that fits."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    parts = list(_arguments(node.args))
    whole = f"{call}({', '.join(parts)}){returns}"
    if len(whole) <= width:
        return whole
    lines = "".join(f"    {part},\n" for part in parts)
    return f"{call}(\n{lines}){returns}"


def _arguments(given: ast.arguments) -> Iterator[str]:
    positional = [*given.posonlyargs, *given.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    for index, (one, default) in enumerate(zip(positional, [*missing, *given.defaults], strict=True), start=1):
        if one.arg not in {"self", "cls"}:
            yield _argument(one, default)
            if index == len(given.posonlyargs):
                yield "/"
    if given.vararg:
        yield f"*{_argument(given.vararg)}"
    elif given.kwonlyargs:
        yield "*"
    for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        yield _argument(one, default)
    if given.kwarg:
        yield f"**{_argument(given.kwarg)}"


def _argument(one: ast.arg, default: ast.expr | None = None) -> str:
    annotation = f": {ast.unparse(one.annotation)}" if one.annotation else ""
    return f"{one.arg}{annotation}" + (f" = {ast.unparse(default)}" if default else "")


def doc(text: str | None) -> Doc:
    """Take a docstring in Google's style apart."""
    clean = inspect.cleandoc(text or "") + "\n"
    found = {match[1]: textwrap.dedent(match[2]) for match in _SECTION.finditer(clean)}
    returns = " ".join(found.pop("Returns", "").split())
    sections = {section: _entries(inner) for section, inner in found.items()}
    return Doc(_markdown(_SECTION.sub("", clean)), sections, returns)


def _entries(text: str) -> dict[str, str]:
    parts = _ENTRY.split(text)
    return {name.strip("*"): " ".join(said.split()) for name, said in zip(parts[1::2], parts[2::2], strict=True)}


def _markdown(text: str) -> str:
    """Code after a ``::`` becomes a fenced block."""
    out: list[str] = []
    for block in re.split(r"\n{2,}", text.strip()):
        if block == "::":
            continue
        if block.startswith("    "):
            out.append(f"```python\n{textwrap.dedent(block)}\n```")
        else:
            out.append(re.sub(r"::$", ":", block))
    return "\n\n".join(out)


def _string(node: ast.stmt) -> str:
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return " ".join(inspect.cleandoc(text).split())
        case _:
            return ""
