"""The version of raylaunch, and of the protocol between client and controller."""

from __future__ import annotations

__version__ = "0.2.0"

API = 1
"""Grows when a client and a controller of different numbers could misunderstand each other."""
