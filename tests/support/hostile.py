"""Values of any model with hostile text in every text field."""

from __future__ import annotations

import enum
import types
import typing
import unicodedata
from typing import get_args, get_origin

from pydantic import BaseModel

from raylaunch.models.fields import Environment, Spec
from raylaunch.models.job import BuildPlatform
from raylaunch.models.job_spec import JobSpec

HOSTILE = "a\x1b[8mb\x9b2Jc\u202ed\U000e0041e\x07\x7f\nFAKE line\rf\u2028g\U000e0101h\u200bi\x1b]0;t\x07"


def hostile(kind: object) -> object:  # noqa: C901, PLR0911, PLR0912 -- one line a kind of type
    """Return a value of a type, as JSON has it, with hostile text wherever text may be."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        return hostile(args[0])
    if origin is typing.Literal:
        return args[0]
    if origin in {typing.Union, types.UnionType}:
        return hostile(next(arg for arg in args if arg is not type(None)))
    if origin is dict:
        return {str(hostile(args[0])): hostile(args[1])}
    if origin in {tuple, list, frozenset}:
        return [hostile(arg) for arg in args if arg is not ...]
    if not isinstance(kind, type):
        return None
    if issubclass(kind, enum.Enum):
        return list(kind)[-1].value
    if issubclass(kind, bool):
        return True
    if issubclass(kind, int | float):
        return 1
    if issubclass(kind, JobSpec):
        return {
            "entrypoint": HOSTILE,
            "tags": [HOSTILE],
            "outputs": [HOSTILE],
            "env": {"A": HOSTILE},
            "where": {"hosts": [HOSTILE], "labels": {HOSTILE: HOSTILE}, "gpu_type": HOSTILE},
            "resources": {"gpus": 1, "custom": {HOSTILE: 1}},
            "tracking": {"project": HOSTILE, "entity": HOSTILE, "group": HOSTILE, "job_type": HOSTILE},
        }
    if issubclass(kind, BuildPlatform):
        return {"python": "3.11", "glibc": "2.35", "arch": "x86_64"}
    if issubclass(kind, Environment):
        return {"kind": "conda", "value": HOSTILE}
    if issubclass(kind, Spec):
        return {}
    if issubclass(kind, BaseModel):
        return {name: hostile(field) for name, field in typing.get_type_hints(kind, include_extras=True).items()}
    return HOSTILE


_Model = typing.TypeVar("_Model", bound=BaseModel)


def model(kind: type[_Model], **facts: object) -> _Model:
    """Return a model with hostile text in each field that has text, but for those that are given."""
    fields = {name: hostile(field.annotation) for name, field in kind.model_fields.items()}
    return kind.model_validate({**fields, **facts})


def bad_in(text: str) -> set[str]:
    """Return what of printed text acts on a terminal, is not seen, or changes the direction of reading."""
    return {
        char
        for char in text
        if (unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} and char not in "\n\t")
        or 0xE0100 <= ord(char) <= 0xE01EF
    }
