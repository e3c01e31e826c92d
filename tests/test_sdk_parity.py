"""The blocking SDK is the asynchronous one, verb by verb."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

import raylaunch

TWINS = ((raylaunch.AsyncCluster, raylaunch.Cluster), (raylaunch.AsyncJob, raylaunch.Job))


class Pair(NamedTuple):
    name: str
    truth: object
    twin: object


def public(kind: type) -> dict[str, object]:
    return {name: item for name, item in vars(kind).items() if not name.startswith("_")}


def pairs() -> Iterator[Pair]:
    for truth, twin in TWINS:
        for name, item in public(truth).items():
            yield Pair(f"{twin.__name__}.{name}", item, public(twin).get(name))


def bare(item: object) -> Callable[..., object]:
    """Return the function behind a property or a class method."""
    if isinstance(item, property):
        assert item.fget is not None
        return item.fget
    function = item.__func__ if isinstance(item, classmethod) else item
    assert inspect.isfunction(function)
    return function


def in_blocking_words(text: str) -> str:
    text = re.sub(r"AsyncGenerator\[(.+), None\]", r"Generator[\1, None, None]", text)
    for asynchronous, blocking in (
        ("An async context manager", "A context manager"),
        ("async with", "with"),
        ("await ", ""),
        ("Async", ""),
    ):
        text = text.replace(asynchronous, blocking)
    return text


PAIRS = list(pairs())
EACH = pytest.mark.parametrize("pair", PAIRS, ids=[pair.name for pair in PAIRS])


@pytest.mark.parametrize(("truth", "twin"), TWINS, ids=["Cluster", "Job"])
def test_both_have_the_same_verbs(truth: type, twin: type) -> None:
    assert list(public(truth)) == list(public(twin))


@EACH
def test_both_take_and_return_the_same(pair: Pair) -> None:
    truth, twin = inspect.signature(bare(pair.truth)), inspect.signature(bare(pair.twin))
    assert list(twin.parameters.values()) == list(truth.parameters.values())
    assert twin.return_annotation == in_blocking_words(str(truth.return_annotation))


@EACH
def test_both_say_the_same(pair: Pair) -> None:
    said = inspect.getdoc(bare(pair.truth))
    assert said
    assert inspect.getdoc(bare(pair.twin)) == in_blocking_words(said)


@EACH
def test_only_one_of_them_has_to_be_awaited(pair: Pair) -> None:
    twin = bare(pair.twin)
    assert not inspect.iscoroutinefunction(twin)
    assert not inspect.isasyncgenfunction(twin)
    assert type(pair.twin) is type(pair.truth)


@EACH
def test_every_parameter_is_named(pair: Pair) -> None:
    kinds = {parameter.kind for parameter in inspect.signature(bare(pair.truth)).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


@EACH
def test_every_parameter_is_described(pair: Pair) -> None:
    names = [name for name in inspect.signature(bare(pair.truth)).parameters if name not in {"self", "cls"}]
    said = inspect.getdoc(bare(pair.truth)) or ""
    assert not [name for name in names if f"    {name}: " not in said]


def test_the_package_gives_both() -> None:
    assert raylaunch.connect == raylaunch.Cluster.connect
    assert raylaunch.aconnect == raylaunch.AsyncCluster.connect
