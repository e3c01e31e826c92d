"""Pydantic's errors about a spec as one `SpecError`, with file, line and nearest known key."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from raylaunch.config.yaml_file import KeyPath
from raylaunch.errors import SpecError
from raylaunch.models.fields import KEYS, PlacedError
from raylaunch.models.states import JobState

Locate = Callable[[KeyPath], str]
"""Returns where a value came from: ``job.yaml:7``, ``--gpus``, or empty."""

_FIELDS = {key: field for field, key in KEYS.items()}
_EXPECTED = {
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}
_PRIVATE = frozenset({"env", "secrets"})
"""Fields whose values are not repeated."""
_BOUNDS = {
    "greater_than": ("gt", "is not greater than"),
    "greater_than_equal": ("ge", "is less than"),
    "less_than": ("lt", "is not less than"),
    "less_than_equal": ("le", "is more than"),
}


class SpecProblem(NamedTuple):
    """One error: its path, a sentence, and what was expected (empty if only the sentence has it)."""

    path: KeyPath
    message: str
    expected: str = ""

    @property
    def field(self) -> str:
        """The dotted field, for example ``resources.gpus``."""
        return ".".join(str(part) for part in self.path)


def spec_error(
    error: ValidationError, model: type[BaseModel], data: object, locate: Locate, *, quoted: bool = True
) -> SpecError:
    """Return one error with everything that pydantic found, each with its place.

    Without `quoted` it repeats neither keys nor values of `data`: only places, known keys, and what was expected.
    """
    found = list(_problems(error, model, data))
    if not quoted:
        found = [problem._replace(message=_unquoted(problem, model)) for problem in found]
    first, *others = [_named(locate(problem.path), problem) for problem in found]
    lines = [
        first[1].message,
        *(f"{where}: {problem.message}" if where else problem.message for where, problem in others),
    ]
    return SpecError("\n".join(lines), where=first[0], field=first[1].field)


def _named(where: str, problem: SpecProblem) -> tuple[str, SpecProblem]:
    """Leave out the field in the message about an option, whose name says it."""
    if where.startswith("--"):
        head, colon, tail = problem.message.partition(": ")
        if colon and problem.field.startswith(head):
            return where, problem._replace(message=tail)
    return where, problem


def _problems(error: ValidationError, model: type[BaseModel], data: object) -> Iterator[SpecProblem]:
    by_path: dict[KeyPath, list[ErrorDetails]] = {}
    for detail in error.errors():
        by_path.setdefault(_path_in(detail, data), []).append(detail)
    for path, details in by_path.items():
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in by_path)
        if deeper and all(detail["type"] in _EXPECTED for detail in details):
            continue  # another branch of a union; the deeper error is more useful
        yield _problem(path, details, model)


def _path_in(detail: ErrorDetails, data: object) -> KeyPath:
    """Return the error's place in `data`: pydantic's path without its names for branches of unions."""
    path: list[str | int] = []
    current = data
    for part in detail["loc"]:
        items = dict(enumerate(current)) if isinstance(current, list | tuple) else current
        part = KEYS.get(str(part), part) if isinstance(items, dict) and part not in items else part  # noqa: PLW2901
        if isinstance(items, dict) and part in items:
            current = items[part]
        elif detail["type"] != "missing" or part != detail["loc"][-1]:
            continue
        path.append(part)
    return tuple(path)


def _problem(path: KeyPath, details: list[ErrorDetails], model: type[BaseModel]) -> SpecProblem:
    dotted = ".".join(str(part) for part in path)
    words = next((detail for detail in details if detail["type"] == "value_error"), None)
    detail = words or details[0]
    kind = detail["type"]
    if kind == "extra_forbidden":
        return SpecProblem(path, _unknown_key(path, model))
    if kind == "missing":
        return SpecProblem(path, f"the key {dotted!r} is missing", "is missing")
    if words is not None:
        return _in_words(path, words)
    if kind in _BOUNDS:
        name, phrase = _BOUNDS[kind]
        bound = f"{phrase} {detail['ctx'][name]:g}"
        return SpecProblem(path, f"{dotted}: {_shown(detail['input'])} {bound}", bound)
    shown = _shown(detail["input"], private=bool(path) and path[0] in _PRIVATE)
    expected = [phrase for phrase in map(_expected, details) if phrase]
    if not expected:
        return SpecProblem(path, f"{dotted}: {shown}: {detail['msg'][:1].lower()}{detail['msg'][1:]}")
    quotes = expected == ["text"] and isinstance(detail["input"], int | float)
    ending = "; write it in quotes" if quotes else ""
    wanted = f"is not {_either(expected)}"
    return SpecProblem(path, f"{dotted}: {shown} {wanted}{ending}", wanted)


def _unquoted(problem: SpecProblem, model: type[BaseModel]) -> str:
    """Return the sentence without text from the file: an unknown key is not named."""
    known: list[str] = []
    holder: type[BaseModel] | None = model
    for part in problem.path:
        field = holder.model_fields.get(_FIELDS.get(str(part), str(part))) if holder else None
        if field is None:
            break
        known.append(str(part))
        holder = next(iter(_models_in(field.annotation)), None)
    if len(known) < len(problem.path) and holder is not None:
        inside = f" in {'.'.join(known)}" if known else ""
        return f"unknown key{inside} (known: {', '.join(KEYS.get(name, name) for name in holder.model_fields)})"
    return f"{'.'.join(known)} {problem.expected or 'is not valid'}" if known else "it is not valid"


def _in_words(path: KeyPath, detail: ErrorDetails) -> SpecProblem:
    error = detail["ctx"]["error"] if "ctx" in detail else None
    if isinstance(error, PlacedError):
        return SpecProblem((*path, *error.inside), str(error))
    return _inside(path, detail["input"], str(error) if error else detail["msg"])


def _inside(path: KeyPath, value: object, sentence: str) -> SpecProblem:
    """Return the place of the key or item that a sentence starts with, for the line number."""
    dotted = ".".join(str(part) for part in path)
    word = sentence.split(" ", 1)[0].strip("'")
    if isinstance(value, dict) and word in value:
        return SpecProblem((*path, word), f"{dotted}: {sentence}")
    if isinstance(value, list | tuple) and word in value:
        return SpecProblem((*path, value.index(word)), f"{dotted}: {sentence}")
    return SpecProblem(path, f"{dotted}: {sentence}" if dotted else sentence)


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] == "literal_error":
        words = [word for word in str(detail["ctx"]["expected"]).replace(" or ", ", ").split(", ") if word != "''"]
        return words[0] if len(words) == 1 else "one of " + ", ".join(word.strip("'") for word in words)
    return _EXPECTED.get(detail["type"], "")


def _either(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} or {phrases[-1]}"


def _shown(value: object, *, limit: int = 60, private: bool = False) -> str:
    """Return a value for a message, without the content of a mapping or list, which may be a secret."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None:
        return "nothing"
    if private:
        return "the value"
    text = repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _unknown_key(path: KeyPath, model: type[BaseModel]) -> str:
    key = str(path[-1])
    parents = [str(part) for part in path[:-1]]
    holder = _model_at(model, parents)
    inside = f" in {'.'.join(parents)}" if parents else ""
    return f"unknown key {key!r}{inside} ({_nearest(key, holder)})"


def _nearest(key: str, holder: type[BaseModel]) -> str:
    known = [KEYS.get(name, name) for name in holder.model_fields]
    nested = [
        f"{name}.{key}"
        for name, field in holder.model_fields.items()
        for child in _models_in(field.annotation)
        if _FIELDS.get(key, key) in child.model_fields
    ]
    close = nested or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"nearest: {close[0]}" if close else f"known: {', '.join(known)}"


def _model_at(model: type[BaseModel], parents: list[str]) -> type[BaseModel]:
    for name in parents:
        field = model.model_fields.get(name)
        children = _models_in(field.annotation) if field else []
        if children:
            model = children[0]
    return model


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _models_in(part)]


def job_states(words: Sequence[JobState | str]) -> tuple[JobState, ...]:
    """Return states of jobs by their names.

    Raises:
        SpecError: a word is not a state.
    """
    known = [state.value for state in JobState]
    for word in words:
        if word not in known:
            msg = f"{str(word)!r} is not a state"
            raise SpecError(msg, field="states", hint=f"known: {', '.join(known)}")
    return tuple(map(JobState, words))
