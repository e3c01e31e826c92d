"""The version of raylaunch, and of the protocol between client and controller."""

from __future__ import annotations

__version__ = "0.2.0"

API = 1
"""Grows when a client and a controller of different numbers could misunderstand each other."""

OTHERS_JOB, OTHERS_OWNER = "X-Raylaunch-Others-Job", "X-Raylaunch-Others-Owner"
"""Headers of an answer about a job that a name meant and that is somebody else's: its id and owner, percent-encoded."""
