"""Print many numbered lines of a hundred bytes."""

import sys

lines = int(sys.argv[1])
BLOCK = 10_000
for begin in range(0, lines, BLOCK):
    numbers = range(begin, min(begin + BLOCK, lines))
    sys.stdout.write("".join(f"{n:09} {'.' * 89}\n" for n in numbers))
