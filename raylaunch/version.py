"""The version of raylaunch, and of the protocol between client and controller."""

from __future__ import annotations

__version__ = "0.2.0"

API = 1
"""Grows when a client and a controller of different numbers could misunderstand each other."""

OTHERS_JOB, OTHERS_OWNER = "X-Raylaunch-Others-Job", "X-Raylaunch-Others-Owner"
"""Headers of an answer about a job that a name meant and that is somebody else's: its id and owner, percent-encoded."""


def is_older(one: str, other: str = __version__) -> bool:
    """Return whether version `one` came before `other`; one that is not known (empty) came before all."""
    return _numbers(one) < _numbers(other)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
