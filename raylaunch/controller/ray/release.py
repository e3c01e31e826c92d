"""``python -m raylaunch.controller.ray.release``: ends the node agents on a Ray that raylaunch did not start."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from raylaunch.controller.ray.protocol import child_environment
from raylaunch.controller.settings import Settings


def main() -> int:
    """Connect, kill every actor in the cluster's own namespace, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the cluster's controller.json")
    settings = Settings.model_validate_json(parser.parse_args().config.read_bytes())
    if not settings.carries_stewards:
        return 0
    os.environ.update(child_environment(os.environ, settings.ray_token_path, settings.ray_env))
    from raylaunch.controller.ray.calls import release_agents  # noqa: PLC0415 -- Ray reads the environment at import

    sys.stdout.write(release_agents(settings.gcs_address, settings.namespace))
    return 0


if __name__ == "__main__":
    sys.exit(main())
