"""``python -m raylaunch.cluster.ray_start start …``: Ray's own ``ray start``, patient with a busy machine.

The name is a contract: units, cron lines and processes of other versions bear it.
"""

from __future__ import annotations

from raylaunch.cluster.local.ray_start import main

if __name__ == "__main__":
    main()
