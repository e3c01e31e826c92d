"""The folder of one attempt on its node, as `raylaunch.contract` describes it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from raylaunch.contract import CLAIM, FENCED, HEARTBEAT, SECRETS, STOP, Claim, StopWish
from raylaunch.errors import NotFoundError
from raylaunch.files import create_exclusive, write_atomic
from raylaunch.runner.processes import boot_id

_ATTEMPT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}-[0-9]{1,6}")
_LARGEST_JSON = 16 * 1024 * 1024
_LARGEST_NUMBER = 1 << 53
_HALF_WRITTEN_S = 1.0


def attempt_folder(root: Path, attempt: str) -> Path:
    """Return where an attempt's folder is below a node root, or would be.

    Raises:
        NotFoundError: `attempt` is not an attempt's id.
    """
    if not _ATTEMPT_ID.fullmatch(attempt):
        msg = f"{attempt!r} is not an attempt's id"
        raise NotFoundError(msg)
    return root / "attempts" / attempt


def attempts_in(root: Path) -> list[str]:
    """Return the ids of the attempts that have a folder below a node root."""
    try:
        names = os.listdir(root / "attempts")  # noqa: PTH208 -- called many times a second
    except FileNotFoundError:
        return []
    return sorted(name for name in names if _ATTEMPT_ID.fullmatch(name))


def request_stop(root: Path, attempt: str, wish: StopWish) -> None:
    """Write a stop request for an attempt; a later one replaces it. Nothing happens when it has no folder."""
    folder = attempt_folder(root, attempt)
    if folder.is_dir():
        write_json(folder / STOP, wish)


def close(root: Path, attempt: str) -> Claim:
    """Make sure that no runner can start this attempt any more, and return its claim.

    When no runner has claimed it, the claim is taken with the epoch `FENCED`. Its secrets are deleted.

    Raises:
        OSError: The disk is full.
    """
    folder = attempt_folder(root, attempt)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fenced = Claim(epoch=FENCED, pid=0, started_ticks=0, boot_id=boot_id(), at=time.time())
    claimed = not create_exclusive(folder / CLAIM, json.dumps(fenced).encode())
    claim = (_wait_for_claim(folder) if claimed else None) or fenced
    (folder / SECRETS).unlink(missing_ok=True)
    return claim


def beat_at(folder: Path) -> float | None:
    """Return the time of the runner's latest heartbeat; None if there was none."""
    try:
        return (folder / HEARTBEAT).stat().st_mtime
    except OSError:
        return None


def read_json(path: Path) -> dict[str, object] | None:
    """Return a JSON object, or None when there is no file or it is incomplete. A link is not followed."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            value = json.loads(file.read(_LARGEST_JSON))
    except (OSError, ValueError, RecursionError):  # jobs can write there too
        return None
    return cast("dict[str, object]", sanitize(value)) if isinstance(value, dict) else None


def sanitize(value: object) -> object:
    """Return JSON data that every reader accepts: no lone surrogates, and only finite numbers of limited size."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case bool():
            return value
        case int() | float():
            return value if abs(value) <= _LARGEST_NUMBER else 0  # false for NaN too
        case dict():
            return {sanitize(key): sanitize(item) for key, item in value.items()}
        case list():
            return [sanitize(item) for item in value]
        case _:
            return value


def read_claim(folder: Path) -> Claim | None:
    """Return the claim of an attempt; None when there is none, or it is not complete yet."""
    value = read_json(folder / CLAIM)
    if value is None or not Claim.__required_keys__ <= value.keys():
        return None
    return cast("Claim", value)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object atomically, 0600."""
    write_file(path, json.dumps(value).encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, 0600."""
    write_atomic(path, data, durable=False, only_writer=True)


def _wait_for_claim(folder: Path) -> Claim | None:
    """Read a claim that a runner may be writing at this moment."""
    deadline = time.monotonic() + _HALF_WRITTEN_S
    while (claim := read_claim(folder)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return claim
