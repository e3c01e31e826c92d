"""The references are what the code says now, and the code says enough: every name, argument and error is described."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from support.cluster import ROOT

import raylaunch
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.fields import ENVIRONMENTS, KEYS, Environment
from raylaunch.models.job_spec import JobSpec
from raylaunch.models.states import Reason
from tools.reference import source, specs
from tools.reference.pages import UPDATE, pages
from tools.reference.python import classes, functions, shown

FIELDS = [(kind, field) for kind in (JobSpec, ClusterSpec) for field in specs.described(kind)]
EACH_FIELD = pytest.mark.parametrize(
    ("kind", "field"), FIELDS, ids=[f"{kind.__name__}.{field.title}" for kind, field in FIELDS]
)
FUNCTIONS = list(functions())
PAGES = pages()
EACH_FUNCTION = pytest.mark.parametrize("function", [one for _, one in FUNCTIONS], ids=[name for name, _ in FUNCTIONS])
BASE: dict[type, dict[str, object]] = {JobSpec: {"entrypoint": "python train.py"}, ClusterSpec: {}}


def raised(function: Callable[..., object]) -> Iterator[str]:
    """Yield the names of the errors that a function raises itself."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name))) | ast.Raise(exc=ast.Name(id=name)):
                if not name.startswith("_"):
                    yield name
            case _:
                pass


@pytest.mark.parametrize("path", sorted(PAGES), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_page_is_as_it_would_be_written_now(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path], f"update it with: {UPDATE}"


@EACH_FIELD
def test_every_field_is_described(kind: type[JobSpec | ClusterSpec], field: specs.Described) -> None:
    assert field.means, f"say it in a string beneath {kind.__name__}'s {field.title}"


@EACH_FIELD
def test_every_field_has_a_valid_example(kind: type[JobSpec | ClusterSpec], field: specs.Described) -> None:
    assert field.example is not None, f"end the string beneath {field.title} with: Example: `…`"
    alone = {"name": "theirs", "kind": "existing", "address": "http://ray.example.org:8265"}
    base = alone if kind is ClusterSpec and field.path[0] in specs.OF_EXISTING else BASE[kind]
    kind.model_validate({**base, **yaml.safe_load(field.as_written())})


@EACH_FIELD
def test_no_key_that_people_write_ends_with_a_unit(kind: type[JobSpec | ClusterSpec], field: specs.Described) -> None:
    assert not field.title.endswith(("_s", "_ms", "_bytes", "_gib", "_mib")), kind


@pytest.mark.parametrize("kind", [JobSpec, ClusterSpec])
def test_the_file_with_every_field_is_valid(kind: type[JobSpec | ClusterSpec]) -> None:
    of_one_kind = specs.OF_EXISTING if kind is ClusterSpec else frozenset()
    assert set(specs.whole(kind)) == {KEYS.get(name, name) for name in kind.model_fields} - of_one_kind
    kind.model_validate(specs.whole(kind))


@pytest.mark.parametrize("written", [value for value, _ in ENVIRONMENTS], ids=str)
def test_every_environment_that_is_listed_is_one(written: object) -> None:
    Environment.model_validate(written)


def test_every_kind_of_environment_is_listed() -> None:
    kinds = {Environment.model_validate(value).kind for value, _ in ENVIRONMENTS}
    assert kinds == {"auto", "default", "ray", "python", "conda", "venv", "uv", "pip"}


@EACH_FUNCTION
def test_every_function_is_described(function: Callable[..., object]) -> None:
    assert source.doc(function.__doc__).text


@EACH_FUNCTION
def test_every_argument_is_described(function: Callable[..., object]) -> None:
    described = source.doc(function.__doc__).of("Args")
    assert list(described) == source.parameters(source.function_node(function))


@EACH_FUNCTION
def test_every_return_value_is_described(function: Callable[..., object]) -> None:
    node, doc = source.function_node(function), source.doc(function.__doc__)
    if not source.is_property(node) and node.returns and ast.unparse(node.returns) != "None":
        assert doc.returns or re.search(r"^(Return|Yield) |; return ", doc.text)


@EACH_FUNCTION
def test_every_error_that_a_function_raises_is_described(function: Callable[..., object]) -> None:
    assert set(raised(function)) <= set(source.doc(function.__doc__).of("Raises"))


@pytest.mark.parametrize("kind", list(classes()), ids=lambda kind: kind.__name__)
def test_every_class_is_described(kind: type) -> None:
    assert source.doc(vars(kind).get("__doc__")).text


@pytest.mark.parametrize("name", sorted(set(raylaunch.__all__) - {"__version__"}))
def test_every_public_name_is_in_the_reference(name: str) -> None:
    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page or f"`raylaunch.{name}`" in page


def test_the_reference_describes_all_response_models() -> None:
    assert {"JobView", "Artifact", "Event", "ControllerStatus", "Metrics"} <= {kind.__name__ for kind in shown()}


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.value)
def test_every_reason_has_advice(reason: Reason) -> None:
    assert reason.advice
