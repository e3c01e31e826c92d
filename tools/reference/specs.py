"""The job file and the cluster file, field by field, from the models that read them."""

from __future__ import annotations

import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefinedType

from raylaunch.cli.run import flag_of
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.fields import ENVIRONMENTS, KEYS, Environment, Spec, Words, seconds, size_bytes
from raylaunch.models.job_spec import JobSpec
from tools.reference import markdown, source

_EXAMPLE = re.compile(r"\s*Example: `(.+)`$")
_SOURCE = "the models in raylaunch/models/job_spec.py and raylaunch/models/cluster_spec.py"
_JOB = """\
A job file is YAML. Only [`entrypoint`](#entrypoint) is required. The same fields are the flags of
[`raylaunch run`](cli.md#raylaunch-run) and the keywords of [`cluster.submit`](python.md#clustersubmit). An unknown
field or a value that cannot be is refused with file, line, and the nearest known field. What the fields are for:
[Jobs](../jobs.md)."""
_CLUSTER = """\
A cluster file is YAML: the one that `--cluster-file` names, else `$RAYLAUNCH_CLUSTER_FILE`, else `cluster.yaml` in the
current folder. No field is required; without a file it is the embedded cluster `local`. What the fields are for:
[The cluster](../cluster.md)."""
_WHOLE = "That is every field, each with its example; their meaning follows."
_KINDS: dict[object, str] = {
    seconds: "a duration: a number of seconds, or text as `90s`, `15m`, `6h`, `1h30m`, `2d`",
    size_bytes: "a size: a number of bytes, or text as `512MiB`, `8GiB`, `16G`",
    get_args(Words)[1].func: "text, or a list of text",
}
"""What is read by a function, in words."""


_PLAIN: dict[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "`true` or `false`"}
_BESIDE: dict[str, dict[str, object]] = {
    "processes": {"launcher": "torchrun"},
    "kind": {"hosts": ["dgx-1"]},
    "bind": {"hosts": ["dgx-1"]},
}
"""What an example needs in addition to be valid."""
_ITEM: dict[str, object] = {"host": "dgx-1"}
_LIST = "[]"


class Described(NamedTuple):
    """One field of a spec, as it is described."""

    path: tuple[str, ...]
    """Names from the outside in; one that ends with ``[]`` is a list of mappings."""
    info: FieldInfo
    hint: object
    means: str
    example: object
    """As YAML reads it; None where there is none."""

    @property
    def title(self) -> str:
        """The field's name, dotted."""
        return ".".join(self.path)

    def as_written(self) -> str:
        """Return the example at its place in a file, with what it needs in addition."""
        *outer, name = self.path
        in_list = bool(outer) and outer[-1].endswith(_LIST)
        text = _yaml({**(_ITEM if in_list else {}), **_BESIDE.get(self.title, {}), name: self.example}).rstrip()
        for around in reversed(outer):
            inner = "- " + text.replace("\n", "\n  ") if around.endswith(_LIST) else text
            text = f"{around.removesuffix(_LIST)}:\n{textwrap.indent(inner, '  ')}"
        return text


def described(kind: type[Spec], path: tuple[str, ...] = ()) -> Iterator[Described]:
    """Yield the fields of a spec, and of the specs within it, in the order in which they are written down."""
    hints = get_type_hints(kind, include_extras=True)
    for field in source.fields(kind):
        found = _EXAMPLE.search(field.text)
        example = yaml.safe_load(found[1]) if found else None
        info = kind.model_fields[field.name]
        yield Described(
            (*path, KEYS.get(field.name, field.name)), info, hints[field.name], _EXAMPLE.sub("", field.text), example
        )
        inner, mark = _within(info.annotation)
        if inner:
            yield from described(inner, (*path, field.name + mark))


def _within(annotation: object) -> tuple[type[Spec] | None, str]:
    """Return the spec that is a field's value, or is each value of its list."""
    mark = _LIST if get_origin(annotation) is tuple else ""
    inner: object = get_args(annotation)[0] if mark else annotation
    if isinstance(inner, type) and issubclass(inner, Spec) and inner is not Environment:
        return inner, mark
    return None, mark


_FIELDS = {key: field for field, key in KEYS.items()}
OF_EXISTING = frozenset({"address", "gcs", "ray_token_file", "ray_tls"})
"""Fields of a cluster that are for one kind alone, and cannot be combined with hosts."""


def whole(kind: type[Spec]) -> dict[str, object]:
    """Return a file with every field of a spec, made of their examples; without those of one kind alone."""
    fields = (one for one in described(kind) if len(one.path) == 1)
    return {one.path[0]: one.example for one in fields if kind is JobSpec or one.path[0] not in OF_EXISTING}


def job_page() -> str:
    """Return the reference of job.yaml."""
    lines = [_JOB, *markdown.fence("yaml", _yaml(whole(JobSpec))), _WHOLE]
    return markdown.page("The job file", _SOURCE, [*lines, *_fields(JobSpec, flags=True), *_environments()])


def cluster_page() -> str:
    """Return the reference of cluster.yaml."""
    lines = [_CLUSTER, *markdown.fence("yaml", _yaml(whole(ClusterSpec))), _WHOLE]
    return markdown.page("The cluster file", _SOURCE, [*lines, *_fields(ClusterSpec, flags=False)])


def _fields(kind: type[Spec], *, flags: bool) -> Iterator[str]:
    for one in described(kind):
        yield from markdown.heading(1 + min(len(one.path), 2), markdown.code(one.title))
        yield markdown.sentence(one.means)
        yield ""
        yield " ".join(markdown.sentence(part) for part in _facts(one, flags=flags))
        yield from markdown.fence("yaml", one.as_written())


def _facts(one: Described, *, flags: bool) -> Iterator[str]:
    yield f"It is {kind_words(one.hint)}"
    if one.info.is_required():
        yield "required"
    elif (default := one.info.default) and not isinstance(default, Spec | PydanticUndefinedType):
        yield f"By default {markdown.code(f'{default:g}' if isinstance(default, float) else str(default))}"
    if flags and (flag := flag_of(tuple(_FIELDS.get(name, name) for name in one.path))):
        yield f"On the command line: {markdown.code(flag)}"


def kind_words(hint: object) -> str:  # noqa: PLR0911 -- one sentence a kind
    """Return a type in plain words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _annotated(arguments[0], arguments[1:])
    if origin in {Union, types.UnionType}:
        return _any_of([kind_words(one) for one in arguments if one is not types.NoneType])
    if origin is Literal:
        return _any_of([markdown.code(str(one)) for one in arguments if one != ""])
    if origin is tuple:
        return "a list of text" if arguments[0] is str else "a list, with the fields below in each"
    if origin is dict:
        return "a mapping of names to " + ("numbers" if arguments[1] is float else "text")
    if hint is Environment:
        return "one of the [environments](job-file.md#environments)"
    if isinstance(hint, type) and issubclass(hint, Spec):
        return "a mapping, with the fields below"
    for plain, words in _PLAIN.items():
        if hint is plain:
            return words
    msg = f"tools/reference/specs.py has no words for the type {hint}"
    raise TypeError(msg)


def _annotated(hint: object, metadata: Sequence[object]) -> str:
    readers = [one.func for one in metadata if isinstance(one, BeforeValidator)]
    words = next((_KINDS[one] for one in readers if one in _KINDS), "") or kind_words(hint)
    bounds = [bound for one in metadata if isinstance(one, FieldInfo) for bound in one.metadata]
    return ", ".join(word for word in (words, _range(bounds)) if word)


def _range(bounds: Sequence[object]) -> str:
    low = [f"{bound.ge} or more" for bound in bounds if isinstance(bound, Ge)]
    low += [f"more than {bound.gt}" for bound in bounds if isinstance(bound, Gt)]
    high = [f"{bound.le}" for bound in bounds if isinstance(bound, Le)]
    if low and high:
        return f"from {low[0].removesuffix(' or more')} to {high[0]}"
    return "".join([*low, *(f"{bound} at most" for bound in high)])


def _any_of(words: Sequence[str]) -> str:
    return " or ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} or {words[-1]}"  # noqa: PLR2004 -- a, b


def _environments() -> Iterator[str]:
    yield from markdown.heading(2, "Environments")
    yield "The environment is checked on the node before the training starts."
    rows = [(markdown.code(_yaml({"environment": value}).strip()), words) for value, words in ENVIRONMENTS]
    yield from markdown.table(("written", "is"), rows)


def _yaml(values: Mapping[str, object]) -> str:
    return "".join(f"{name}: {_flow(value)}\n" for name, value in values.items())


def _flow(value: object) -> str:
    text = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("...\n").strip()
