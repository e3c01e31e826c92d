"""A bridge to Ray where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raylaunch.controller.ray.bridge import RayBridge
from raylaunch.controller.ray.protocol import BridgeEvent


class UnconnectedBridge(RayBridge):
    """A bridge that is never up."""

    def __init__(self, folder: Path, *, on_event: Callable[[BridgeEvent], None] = lambda _event: None) -> None:
        """Configure it; its store and log would be in `folder`."""
        super().__init__(
            gcs_address="127.0.0.1:9",
            ray_token_path=folder / "none",
            store=folder,
            on_event=on_event,
            log_path=folder / "link.log",
        )
