"""Print lines with the time when they were written, at uneven intervals."""

import random
import sys
import time

lines = int(sys.argv[1])
dice = random.Random(0)  # noqa: S311 -- uneven is all that is wanted
for _ in range(lines):
    time.sleep(dice.uniform(0.1, 0.4))
    print(f"written:{time.time()}", flush=True)
