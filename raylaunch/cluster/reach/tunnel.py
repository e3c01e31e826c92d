"""``python -m raylaunch.cluster.reach.tunnel NAME``: the process that keeps a cluster reachable here.

The name is a contract: units, cron lines and processes of other versions bear it.
"""

from __future__ import annotations

import sys

from raylaunch.cluster.hosts.tunnel import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
