"""What the pages say can be done: links lead somewhere, commands parse, files validate, programs type-check."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import pytest
import yaml
from support import pages
from support.cluster import ROOT

from raylaunch.cli.app import raylaunch
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.job_spec import JobSpec

WALKS = {"A job": 25, "A line of a log": 12, "A host": 25}
"""The walks of docs/architecture.md, and how many files each may have."""
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]*)\)")
OF_A_CLUSTER = frozenset({"kind", "hosts", "defaults", "bind"})
PAGES = pages.pages()
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=pages.name)


def problem_of(group: click.Group, command: pages.Command) -> str:
    """Return what click would say of a command, without running it."""
    try:
        parse(group, list(command.words))
    except click.exceptions.Exit:
        return ""  # --help and --version
    except click.exceptions.NoSuchOption as error:
        return error.format_message()
    except (click.BadParameter, click.BadOptionUsage) as error:
        return error.format_message() if command.whole else ""
    except click.UsageError as error:
        return error.format_message()
    return ""


def parse(group: click.Group, words: list[str]) -> None:
    """Let click parse a command and all its words."""
    ctx = click.Context(group, info_name=words[0])
    _, rest, _ = group.make_parser(ctx).parse_args(words[1:])
    if not rest:
        return
    command = group.get_command(ctx, rest[0])
    if command is None:
        ctx.fail(f"no such command {rest[0]!r}")
    if isinstance(command, click.Group):
        parse(command, rest)
    else:
        command.make_context(rest[0], rest[1:], parent=ctx)


def spec_of(page: Path, data: dict[str, object]) -> type[JobSpec | ClusterSpec]:
    """Return what a block of YAML describes."""
    is_cluster = bool(OF_A_CLUSTER & data.keys()) or "cluster" in page.name
    return ClusterSpec if is_cluster and "entrypoint" not in data else JobSpec


@EACH_PAGE
def test_every_link_leads_to_a_heading_that_is_there(page: Path) -> None:
    missing = []
    for link in LINK.findall(pages.FENCE.sub("", page.read_text(encoding="utf-8"))):
        target, mark, anchor = link.partition("#")
        other = (page.parent / target).resolve() if target else page
        if mark and other.suffix == ".md" and anchor not in pages.anchors(other):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize(
    "command", [command for page in PAGES for command in pages.commands(page, "raylaunch")], ids=str
)
def test_every_command_of_raylaunch_is_one(command: pages.Command) -> None:
    assert isinstance(raylaunch, click.Group)
    assert not problem_of(raylaunch, command)


def test_every_command_of_rays_own_is_one() -> None:
    from ray.scripts.scripts import cli as ray  # noqa: PLC0415 -- takes a second, and only this test needs it

    found = [command for page in PAGES for command in pages.commands(page, "ray")]
    assert found
    problems = {str(command): problem_of(ray, command) for command in found}
    assert not {command: problem for command, problem in problems.items() if problem}


def test_every_target_of_make_is_one() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {word for page in PAGES for command in pages.commands(page, "make") for word in command.words[1:]}
    assert {word for word in named if re.fullmatch(r"[a-z-]+", word)} <= targets


@EACH_PAGE
def test_every_file_shown_in_the_docs_is_accepted(page: Path) -> None:
    for block in pages.blocks(page, "yaml"):
        data = yaml.safe_load(block.text)
        kind = spec_of(page, data)
        kind.model_validate({**_beside(kind, data), **data})


def _beside(kind: type[JobSpec | ClusterSpec], data: Mapping[str, object]) -> dict[str, object]:
    """What must stand beside a field that is shown alone."""
    if kind is JobSpec:
        return {"entrypoint": "python train.py"}
    of_existing = data.keys() & {"address", "gcs", "ray_token_file", "ray_tls"}
    return {"name": "theirs", "kind": "existing", "address": "http://ray.example.org:8265"} if of_existing else {}


def test_every_program_that_is_shown_passes_the_type_checker(tmp_path: Path) -> None:
    programs = []
    for page in PAGES:
        code = "\n".join(block.text for block in pages.blocks(page, "python"))
        if code:
            programs.append(tmp_path / f"{re.sub(r'[^a-z]', '_', pages.name(page).lower())}.py")
            programs[-1].write_text(f"# mypy: allow-untyped-globals\n{code}", encoding="utf-8")
    assert programs
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", ".mypy_cache/docs", *map(str, programs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("walk", WALKS)
def test_the_files_of_a_walk_exist_and_none_is_visited_twice(walk: str) -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    paragraph = page.partition(f"\n**{walk}")[2].partition("\n\n")[0]
    files = re.findall(r"`([\w/]+\.py)`", paragraph)
    assert 1 < len(files) <= WALKS[walk]
    assert len(set(files)) == len(files)
    gone = [file for file in files if not (ROOT / "raylaunch" / file).is_file()]
    assert not gone, f"name in {walk!r} of docs/architecture.md the files that these have become"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_source_file_that_is_named_exists(name: str) -> None:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    known = {f"/{file}" for file in done.stdout.splitlines()}
    named = set(re.findall(r"`([\w/]+\.(?:py|sh))`", (ROOT / name).read_text(encoding="utf-8")))
    gone = sorted(file for file in named if not any(one.endswith(f"/{file}") for one in known))
    assert not gone, f"name in {name} the files that these have become"


def test_the_picture_in_the_readme_has_no_local_paths_and_loads_nothing() -> None:
    picture = (ROOT / "docs/_static/terminal.svg").read_text(encoding="utf-8")
    assert not re.findall(r"@font-face|url\(\W*http|href=\W*http|/(?:tmp|root|home|work)/[^<]*", picture)
