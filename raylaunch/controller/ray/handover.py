"""Checkpoints and outputs of a job's previous attempt, copied from the store to the node of the next attempt.

If the previous attempt ran on the same node nothing is copied: its files there are as new as the store's, or newer.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

from raylaunch.agent.attempt_files import LINK, kept_files
from raylaunch.agent.job_dir import StoredFile
from raylaunch.contract import ATTEMPT, CLAIM, COLLECTED
from raylaunch.controller.ray.replica import PRESENT, REPLICATED
from raylaunch.controller.ray.replication import AgentCall
from raylaunch.errors import TransferError

_PIECE = 8 * 1024 * 1024
_CALL_S = 120.0


class EarlierAttempt(NamedTuple):
    """What the store has of the latest attempt that ran before another one."""

    n: int
    folder: Path
    files: dict[str, StoredFile]
    job_dir: str
    """Path of the job's folder on its node; empty if unknown."""
    collected: list[str]
    """Its outputs that were found in the working directory, as far as its attempts have reported them."""


def before(store: Path, attempt: str) -> EarlierAttempt | None:
    """Return what the previous attempt has left in the store; None if there is none. Reads the disk."""
    job, _, number = attempt.rpartition("-")
    for n in range(int(number) - 1, 0, -1):
        folder = Path(os.path.realpath(store / "jobs" / job / f"attempt-{n}"))
        if (folder / CLAIM).is_file():
            spec = _json(folder / ATTEMPT)
            job_dir = spec.get("job_dir", "") if isinstance(spec, dict) else ""
            return EarlierAttempt(n, folder, dict(_files(folder)), str(job_dir), _collected(store / "jobs" / job, n))
    return None


async def bring(call: AgentCall, store: Path, attempt: str, tag: str) -> str:
    """Copy what an attempt's node lacks of the previous attempt. Return where that one's job folder was.

    Args:
        call: calls the node's agent.
        store: the store's folder.
        attempt: the one that is about to start.
        tag: its value of `raylaunch.contract.VAR_ATTEMPT`.

    Raises:
        ClusterError: the node does not respond.
        ConflictError: the node has a newer attempt of the job.
        TransferError: a file of the store cannot be read, or arrived damaged.
    """
    found = await asyncio.to_thread(before, store, attempt)
    if found is None:
        return ""
    if cast("int", await call("job_has", attempt, timeout_s=_CALL_S)) < found.n:
        wanted = cast("list[str]", await call("begin_bringing", attempt, tag, found.files, timeout_s=_CALL_S))
        for path in wanted:
            await _bring(call, attempt, path, found)
        await call("end_bringing", attempt, found.n, found.collected, timeout_s=_CALL_S)
    return found.job_dir


async def _bring(call: AgentCall, attempt: str, path: str, found: EarlierAttempt) -> None:
    wanted = found.files[path]
    offset, last = 0, None
    try:
        with (found.folder / path).open("rb") as file:
            while last is None:
                data = await asyncio.to_thread(file.read, _PIECE)
                last = wanted if offset + len(data) >= wanted.size or not data else None
                await call("bring", attempt, path, offset, data, last, timeout_s=_CALL_S)
                offset += len(data)
    except OSError as error:
        msg = f"{path} of attempt {found.n} cannot be read from the store: {error.strerror}"
        raise TransferError(msg) from error


def _files(folder: Path) -> Iterator[tuple[str, StoredFile]]:
    """Yield the checkpoints and outputs in the store, without those that the program had deleted when it ended."""
    known, listed = _json(folder / REPLICATED), _json(folder / PRESENT)
    present = set(listed) if isinstance(listed, list) else None
    for path, stat in kept_files(folder):
        if present is not None and path not in present:
            continue
        entry = known.get(path) if isinstance(known, dict) else None
        if stat.link:
            yield path, StoredFile(stat.size, 0, LINK + stat.link)
        elif isinstance(entry, list) and entry[0] == stat.size:
            yield path, StoredFile(stat.size, int(entry[1]), str(entry[2]))
        elif not path.endswith(".raylaunch-part"):
            yield path, StoredFile(stat.size, 0, "")


def _collected(job: Path, n: int) -> list[str]:
    """Return the list of the latest attempt that has one: each continues its predecessor's."""
    lists = (_json(job / f"attempt-{number}" / COLLECTED) for number in range(n, 0, -1))
    found = next((each for each in lists if isinstance(each, list)), [])
    return [path for path in found if isinstance(path, str)]


def _json(path: Path) -> dict[str, object] | list[object] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None
