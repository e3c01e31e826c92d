"""``python -m raylaunch.cluster.keep NAME``: the watchdog of a host.

The name is a contract: units, cron lines and processes of other versions bear it.
"""

from __future__ import annotations

import sys

from raylaunch.cluster.local.watchdog import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
