"""The blocking SDK is generated from the asynchronous one, verb by verb."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

import raylaunch
from tools.blocking_sdk import COMMAND, in_blocking_words, modules

TWINS = ((raylaunch.AsyncCluster, raylaunch.Cluster), (raylaunch.AsyncJob, raylaunch.Job))


def public(kind: type) -> dict[str, object]:
    return {name: item for name, item in vars(kind).items() if not name.startswith("_")}


def bare(item: object) -> Callable[..., object]:
    """Return the function behind a property or a class method."""
    function = item.fget if isinstance(item, property) else getattr(item, "__func__", item)
    assert inspect.isfunction(function)
    return function


VERBS = [
    pytest.param(item, public(blocking).get(name), id=f"{blocking.__name__}.{name}")
    for asynchronous, blocking in TWINS
    for name, item in public(asynchronous).items()
]


@pytest.mark.parametrize(("path", "text"), modules().items(), ids=[path.name for path in modules()])
def test_blocking_modules_are_up_to_date(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, COMMAND


@pytest.mark.parametrize(("asynchronous", "blocking"), TWINS, ids=["Cluster", "Job"])
def test_both_have_the_same_verbs(asynchronous: type, blocking: type) -> None:
    assert list(public(asynchronous)) == list(public(blocking))


@pytest.mark.parametrize(("asynchronous", "blocking"), VERBS)
def test_a_blocking_verb_has_the_same_signature_and_description(asynchronous: object, blocking: object) -> None:
    one, other = bare(asynchronous), bare(blocking)
    assert type(blocking) is type(asynchronous)
    assert not inspect.iscoroutinefunction(other)
    assert not inspect.isasyncgenfunction(other)
    expected, actual = inspect.signature(one), inspect.signature(other)
    assert list(actual.parameters.values()) == list(expected.parameters.values())
    assert actual.return_annotation == in_blocking_words(str(expected.return_annotation))
    description = inspect.getdoc(other)
    assert description == in_blocking_words(inspect.getdoc(one) or "")
    assert "await" not in description
    assert "Async" not in f"{description}{actual.return_annotation}"


@pytest.mark.parametrize(("asynchronous", "blocking"), VERBS)
def test_every_parameter_is_named_and_described(asynchronous: object, blocking: object) -> None:
    description = inspect.getdoc(bare(asynchronous))
    assert description
    for name, parameter in inspect.signature(bare(blocking)).parameters.items():
        assert parameter.kind not in {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
        assert name in {"self", "cls"} or f"    {name}: " in description


def test_the_package_gives_both() -> None:
    assert raylaunch.connect == raylaunch.Cluster.connect
    assert raylaunch.aconnect == raylaunch.AsyncCluster.connect
