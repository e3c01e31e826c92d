"""Durations, times and sizes as people write them."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_WHOLE = re.compile(r"[0-9]{1,18}")
_MOST = 1e18
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(value: object) -> object:
    """Read a duration: a number of seconds, or ``"90s"``, ``"15m"``, ``"2h"``, ``"1.5d"``, ``"1h30m"``.

    Raises:
        ValueError: the text is not a duration.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    parts = list(_DURATION.finditer(text))
    if not parts or "".join(part.group(0) for part in parts).replace(" ", "") != text.replace(" ", ""):
        msg = f"{value!r} is not a duration; write seconds, or 90s, 15m, 2h, 1h30m, 2d"
        raise ValueError(msg)
    return sum(float(part.group(1)) * _SECONDS[part.group(2) or "s"] for part in parts)


def point_in_time(text: str, *, now: datetime) -> datetime:
    """Read a time to come: ``18:00`` (today, or tomorrow if that is over), ``2026-11-28T18:00``, or ``2h`` from now.

    Args:
        text: what a person wrote.
        now: the time now, in the zone that the person means.

    Raises:
        ValueError: it is none of these, or is over.
    """
    if clock := re.fullmatch(r"(\d{1,2}):(\d{2})", text.strip()):
        at = now.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        return at if at > now else at + timedelta(days=1)
    try:
        return now + timedelta(seconds=float(str(seconds(text))))
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        msg = f"{text!r} is not a time; write 18:00, 2026-11-28T18:00, or from now on: 90m, 2h, 3d"
        raise ValueError(msg) from None
    at = at if at.tzinfo else at.replace(tzinfo=now.tzinfo)
    if at <= now:
        msg = f"{text!r} is over already"
        raise ValueError(msg)
    return at


def whole(text: str) -> int | None:
    """Return a number that somebody else wrote in at most 18 digits; None for anything else.

    `int` itself reads digits of other scripts than `str.isdigit` knows, and fails for more than 4,300.
    """
    return int(text) if _WHOLE.fullmatch(text) else None


def size_bytes(value: object) -> object:
    """Read a size: a number of bytes, or ``"8GiB"``, ``"500MB"``, ``"16G"`` (powers of 1024, but of 1000 for KB to TB).

    Raises:
        ValueError: the text is not a size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        msg = f"{value!r} is not a size; write bytes, or 512MiB, 8GiB, 16G"
        raise ValueError(msg)
    number, unit = float(match.group(1)), (match.group(2) or "").lower()
    if number > _MOST:
        msg = f"{value[:40]!r} is more than any disk holds"
        raise ValueError(msg)
    if not unit:
        return int(number)
    decimal = value.strip().lower().endswith("b") and not unit.endswith("i")
    return int(number * (1000 if decimal else 1024) ** ("kmgt".index(unit[0]) + 1))
