"""``python -m raylaunch`` is the command ``raylaunch``."""

from __future__ import annotations

from raylaunch.cli.app import main

if __name__ == "__main__":
    main()
