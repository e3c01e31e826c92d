"""``doctor``: facts about the cluster's hosts, and their problems with fixes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from raylaunch.cli.connect import as_json, ask_person, finish
from raylaunch.cli.console import count, note, say_json, say_lines, size, styled, table
from raylaunch.cluster.doctor.examine import Findings, examine, keep_problems
from raylaunch.cluster.doctor.problem import Problem
from raylaunch.cluster.probe.facts import HostFacts
from raylaunch.config.load import load_cluster_file
from raylaunch.ssh.target import PendingStep

_MARKS = {"blocking": ("✗", "red"), "warning": ("!", "yellow")}
_STATES = {"ready": "green", "blocked": "red"}


@click.command(epilog="Example:  raylaunch doctor --json | jq '.problems[] | select(.level == \"blocking\")'")
@as_json
@click.pass_obj
def doctor(cluster_file: Path | None, *, as_json: bool) -> int:
    """Check every host and report problems with fixes. Changes nothing.

    The exit status is 1 if a problem blocks 'raylaunch up' on a host.
    """
    file = load_cluster_file(cluster_file)
    for line in file.notes:
        note(line)
    found = finish(examine(file.spec, on_prompt=ask_person, on_wait=_show_wait))
    keep_problems(file.spec, found.problems)
    if as_json:
        say_json(found)
    else:
        say_lines(doctor_lines(found))
    return 1 if found.blocking else 0


def _show_wait(wait: PendingStep) -> None:
    note(str(wait))


def doctor_lines(found: Findings) -> Iterator[str]:
    """Yield the findings for people: a table of the hosts, then each problem with its fix, blocking ones first."""
    warnings = len(found.problems) - len(found.blocking)
    verdict = ", ".join(
        [
            count(len(found.hosts), "host"),
            count(len(found.blocking), "blocking problem") if found.blocking else "nothing blocking",
            *([count(warnings, "warning")] if warnings else []),
        ]
    )
    yield f"cluster {found.cluster}: {verdict}"
    yield ""
    yield from _host_table(found)
    if found.problems:
        yield ""
    for problem in found.problems:
        yield from _problem_lines(problem)


def _host_table(found: Findings) -> Iterator[str]:
    rows = [_row(name, found) for name in found.hosts]
    header, *lines = table(("HOST", "", "SYSTEM", "GPUS", "MEMORY", "FREE DISK", "PYTHON"), rows)
    yield header
    for row, line in zip(rows, lines, strict=True):
        yield line.replace(row[1], styled(row[1], _STATES[row[1]]), 1) if row[1] in _STATES else line


def _row(name: str, found: Findings) -> tuple[str, ...]:
    blocked = any(one.level == "blocking" for one in found.of(name))
    state = "blocked" if blocked else "ready"
    facts = found.facts.get(name)
    if facts is None:
        return (name, state, "not checked", "", "", "", "")
    disk = facts.disks.get("root")
    system = ", ".join(word for word in (_format_system(facts), facts.arch) if word)
    free = size(disk.free) if disk is not None and disk.free is not None else "?"
    return (name, state, system, format_gpus(facts), _format_memory(facts), free, _format_pythons(facts))


def _format_system(facts: HostFacts) -> str:
    return f"DGX OS {facts.system.dgx}" if facts.system.dgx else facts.system.name or facts.system.kind


def format_gpus(facts: HostFacts) -> str:
    """Return a host's GPUs in short: ``8 NVIDIA H100 80GB HBM3 (driver 550.54)``."""
    kinds: dict[str, int] = {}
    for gpu in facts.gpus.gpus:
        kinds[gpu.name] = kinds.get(gpu.name, 0) + 1
    words = " + ".join(f"{number} {name}" for name, number in kinds.items())
    if not words:
        return "?" if facts.gpus.problem else "none"
    return f"{words} (driver {facts.gpus.driver})" if facts.gpus.driver else words


def _format_memory(facts: HostFacts) -> str:
    usable = facts.memory.usable
    shared = " unified" if facts.memory.unified else ""
    return f"{size(usable)}{shared}" if usable is not None else "?"


def _format_pythons(facts: HostFacts) -> str:
    minors = sorted({one.minor for one in facts.pythons if one.minor >= (3, 10)})
    return ", ".join(f"{major}.{minor}" for major, minor in minors) or "none"


def _problem_lines(problem: Problem) -> Iterator[str]:
    mark, colour = _MARKS[problem.level]
    where = f"{problem.host}: " if problem.host else ""
    yield f"{styled(mark, colour)} {where}{problem.message} [{problem.code}]"
    if problem.mend:
        yield f"    → {problem.mend}"
