"""The version of raylaunch, and of the protocol between client and controller."""

from __future__ import annotations

__version__ = "0.2.0"

API = 1
"""Increased when clients and controllers with different numbers are incompatible."""

OTHERS_JOB, OTHERS_OWNER = "X-Raylaunch-Others-Job", "X-Raylaunch-Others-Owner"
"""Response headers for a name that means somebody else's job: its id and owner, percent-encoded."""


def is_older(one: str, other: str = __version__) -> bool:
    """Return whether version `one` is older than `other`; an unknown one (empty) is older than all."""
    return _numbers(one) < _numbers(other)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
