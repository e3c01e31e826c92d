"""The verbs as commands. All printing is in this folder; a command's module loads when it is used."""

from __future__ import annotations

from raylaunch.cli.app import main

__all__ = ["main"]
