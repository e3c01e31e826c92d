"""``python -m raylaunch.cluster.on_host``: the host program, started over SSH.

The name is a contract: clients of other versions start it in this environment.
"""

from __future__ import annotations

import sys

from raylaunch.cluster.hosts.host_program import main

if __name__ == "__main__":
    sys.exit(main())
