"""What a job needs from its working directory, checked before it is submitted: the same in every interface."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from raylaunch.errors import SpecError
from raylaunch.packing import Contents, Packed, checked_working_dir, packed_apart
from raylaunch.runner.entrypoint import script_of, started_itself
from raylaunch.runner.training import line_ends_of, nearest_file
from raylaunch.sensitive import Allowed
from raylaunch.spec import JobSpec


class _Needed(NamedTuple):
    """A file that a job cannot do without, relative to its working directory; what needs it, and what to do."""

    path: str
    by: str
    field: str
    hint: str


async def packed_job(spec: JobSpec, allow: Allowed) -> Packed | None:
    """Pack the code of a job, which is checked as far as can be done here; None when it has none.

    Raises:
        SpecError: as `check_here`, `raylaunch.packing.pack` and `check_sent`.
    """
    await asyncio.to_thread(check_here, spec)
    if not spec.working_dir:
        return None
    packed = await packed_apart(Path(spec.working_dir), allow)
    try:
        check_sent(spec, packed.contents)
    except SpecError:
        packed.file.close()
        raise
    return packed


def check_here(spec: JobSpec) -> None:
    """Check what can be known without packing: the working directory, the script, the files of the environment.

    Raises:
        SpecError: something is not there.
    """
    folder = checked_working_dir(spec.working_dir) if spec.working_dir else None
    for need in _needed(spec):
        if folder is None:
            msg = f"{need.by} needs {need.path}, and the job has no working directory"
            raise SpecError(
                msg, field=need.field, hint="name the folder that it is in: --working-dir DIR, or working_dir"
            )
        if need.path.startswith("../"):
            msg = f"{need.by} needs {need.path}, which is outside the working directory {folder} and is not sent"
            raise SpecError(msg, field=need.field, hint="submit from the folder above, or name it with --working-dir")
        if not os.path.lexists(folder / need.path) and not _behind_link(folder, need.path):
            near = nearest_file(need.path, folder) if need.field == "entrypoint" else ""
            msg = f"{need.by} needs {need.path}, which is not in {folder}{near}"
            raise SpecError(msg, field=need.field, hint=need.hint)
    script = script_of(spec.entrypoint)
    if folder and started_itself(spec.entrypoint, script) and (windows := line_ends_of(folder / script, folder)):
        raise SpecError(windows, field="entrypoint")


def check_sent(spec: JobSpec, contents: Contents) -> None:
    """Check that what the job needs is in its package.

    Raises:
        SpecError: nothing is, or a rule leaves out what it needs.
    """
    folder = Path(spec.working_dir)
    if not contents.paths:
        rules = sorted(set(contents.left_out.values()))
        why = f"all that is in it is left out ({'; '.join(rules)})" if rules else "it is empty"
        msg = f"the working directory {folder} has nothing to send: {why}"
        hint = "submit from the project, or name it: --working-dir PROJECT; --working-dir '' sends no files"
        raise SpecError(msg, field="working_dir", hint=hint)
    for need in _needed(spec):
        if need.path not in contents.paths and (rule := _rule_against(need.path, contents)):
            msg = f"{need.by} needs {need.path}, which is not sent: {rule}"
            raise SpecError(msg, field=need.field, hint=f"send it with a line in .raylaunchignore: !{need.path}")


def _needed(spec: JobSpec) -> Iterator[_Needed]:
    kind, value = spec.environment.kind, spec.environment.value
    if kind == "uv":
        for name, hint in (("pyproject.toml", "make it with: uv init"), ("uv.lock", "make it with: uv lock")):
            yield _Needed(name, "environment: uv", "environment", hint)
    if kind == "pip" and value and not os.path.isabs(value):  # noqa: PTH117 -- text, as it was given
        hint = "name a requirements file in the working directory: environment: pip:FILE"
        yield _Needed(os.path.normpath(value), f"environment: pip:{value}", "environment", hint)
    script = script_of(spec.entrypoint)
    if script:
        hint = "check the name, and that this is the folder that is meant (--working-dir)"
        yield _Needed(os.path.normpath(script), "the command", "entrypoint", hint)


def _behind_link(folder: Path, path: str) -> bool:
    """Whether a path leads through a link, which may lead to something on the node only."""
    return any((folder / parent).is_symlink() for parent in Path(path).parents)


def _rule_against(path: str, contents: Contents) -> str:
    return next(
        (contents.left_out[str(one)] for one in (Path(path), *Path(path).parents) if str(one) in contents.left_out), ""
    )
