"""A field of a job reaches every interface, the runner and the reference, or the table here says why it does not."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Literal

import pytest
import yaml
from support.api import settings_of
from support.cluster import ROOT

import raylaunch
from mcp_server.arguments import TrainJob
from raylaunch.cli.run import flag_of, run
from raylaunch.controller.scheduler.attempt_context import attempt_spec
from raylaunch.models.fields import KEYS, Spec
from raylaunch.models.job_spec import JobSpec
from tools.reference import specs

Place = Literal["cli", "sdk", "mcp", "runner"]

WHOLE = "a mapping: its fields are given one by one"
RARE = "rare: job.yaml, or a mapping in Python and in `more`"
IN_MORE = "a key of `more`: each argument of the tool costs a model tokens"
PLACED = "read by the scheduler before there is a runner"

EXCEPTIONS: dict[str, dict[Place, str]] = {
    "name": {},
    "entrypoint": {},
    "launcher": {},
    "processes": {"mcp": IN_MORE},
    "working_dir": {"runner": "sent as a package; the job runs in its copy"},
    "resources": {"cli": WHOLE, "mcp": IN_MORE},
    "resources.gpus": {},
    "resources.cpus": {"mcp": IN_MORE},
    "resources.memory": {"mcp": IN_MORE, "runner": PLACED},
    "resources.custom": {"mcp": IN_MORE, "runner": PLACED},
    "where": {"cli": WHOLE, "mcp": IN_MORE, "runner": PLACED},
    "where.hosts": {"mcp": IN_MORE, "runner": PLACED},
    "where.labels": {"mcp": IN_MORE, "runner": PLACED},
    "where.gpu_type": {"mcp": IN_MORE, "runner": PLACED},
    "where.arch": {"cli": RARE, "mcp": IN_MORE},
    "env": {},
    "secrets": {},
    "environment": {},
    "packages": {},
    "timeout": {},
    "grace": {"mcp": IN_MORE},
    "outputs": {},
    "outputs_size": {},
    "outputs_files": {},
    "tags": {"mcp": IN_MORE},
    "tracking": {"cli": WHOLE, "mcp": IN_MORE},
    "tracking.mode": {"mcp": IN_MORE},
    "tracking.project": {"mcp": IN_MORE},
    "tracking.entity": {"cli": RARE, "mcp": IN_MORE},
    "tracking.group": {"cli": RARE, "mcp": IN_MORE},
    "tracking.job_type": {"cli": RARE, "mcp": IN_MORE},
    "priority": {"mcp": IN_MORE, "runner": PLACED},
    "retries": {"runner": PLACED},
}
"""Every field, with the places where it does not appear and why."""

FIELDS = {field.title: field for field in specs.described(JobSpec)}
EACH = pytest.mark.parametrize("field", FIELDS.values(), ids=list(FIELDS))
FROM_KEY = {key: name for name, key in KEYS.items()}
SHORT = {"gpus": "resources.gpus", "job": "entrypoint"}
"""Arguments of `submit` with a name of their own."""
NOT_FIELDS = {"self", "request_id", "allow", "max_upload"}


def expected(field: specs.Described, place: Place) -> bool:
    assert field.title in EXCEPTIONS, f"add {field.title} to the places below, and to EXCEPTIONS"
    return place not in EXCEPTIONS[field.title]


def sent_to_runner(**given: object) -> dict[str, object]:
    spec = JobSpec.model_validate({"entrypoint": "python job.py", **given})
    return {**attempt_spec(spec, job="job-a", n=1, epoch="e", settings=settings_of(Path("/store"), 8470))}


def test_the_table_names_no_field_that_is_gone() -> None:
    assert EXCEPTIONS.keys() == FIELDS.keys()


@EACH
def test_the_command_line_has_an_option_for_it(field: specs.Described) -> None:
    flag = flag_of(tuple(FROM_KEY.get(name, name) for name in field.path))
    assert bool(flag) is expected(field, "cli"), "raylaunch/cli/run.py"
    assert not flag or flag in {option for parameter in run.params for option in parameter.opts}


@EACH
def test_python_takes_it(field: specs.Described) -> None:
    arguments = {SHORT.get(name, name) for name in inspect.signature(raylaunch.AsyncCluster.submit).parameters}
    name = FROM_KEY.get(field.path[0], field.path[0])
    assert bool({field.title, name} & arguments) is expected(field, "sdk"), "raylaunch/sdk/async_cluster.py"


def test_python_takes_nothing_else() -> None:
    arguments = set(inspect.signature(raylaunch.AsyncCluster.submit).parameters) - NOT_FIELDS - SHORT.keys()
    assert arguments == JobSpec.model_fields.keys() - {"entrypoint"}


@EACH
def test_the_tool_of_agents_takes_it(field: specs.Described) -> None:
    offered = {"resources.gpus" if name == "gpus" else name for name in TrainJob.model_fields}
    assert (field.title in offered) is expected(field, "mcp"), "mcp_server/arguments.py"


@EACH
def test_the_runner_is_told(field: specs.Described) -> None:
    given = yaml.safe_load(field.as_written())
    beside = {name: value for name, value in given.items() if name != field.path[0]}
    changed = sent_to_runner(**given) != sent_to_runner(**beside)
    assert changed is expected(field, "runner"), "raylaunch/contract.py, controller/scheduler/attempt_context.py"


@EACH
def test_the_reference_describes_it(field: specs.Described) -> None:
    page = (ROOT / "docs/reference/job-file.md").read_text(encoding="utf-8")
    assert f"# `{field.title}`\n" in page, "make docs-reference"


def test_a_mapping_has_its_fields_in_the_table() -> None:
    inner = {name for name, field in JobSpec.model_fields.items() if isinstance(field.default, Spec)}
    assert inner - {"environment"} == {name.partition(".")[0] for name in FIELDS if "." in name}
