"""``python -m raylaunch.cluster.revive NAME``: start Ray again.

The controller runs it when it finds Ray dead.
The name is a contract: units, cron lines and processes of other versions bear it.
"""

from __future__ import annotations

import sys

from raylaunch.cluster.local.watchdog import revive

if __name__ == "__main__":
    sys.exit(revive(sys.argv[1:]))
