"""What makes the environment of a raylaunch version on a host. Sent there as text, run by the host's own Python.

Standard library only, for Python 3.10 and newer: nothing of ours is there yet. `raylaunch.cluster.install.environment`
sends it with one request, and reads its JSON lines: steps as they go, then one result or one error.

An environment counts when it bears its name: it is made beside under another, checked, written to the disk, then
renamed. One process makes it and others wait; the kernel frees the lock of one that dies. What uv has unpacked stays in
its cache, so that the next attempt, and the next version, are made in about a second and share their files.
"""
