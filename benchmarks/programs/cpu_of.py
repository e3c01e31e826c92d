"""Run a program, and write the CPU seconds that it and all its descendants took into a file, once all have ended.

Descendants that outlive their parents come to this process (Linux: PR_SET_CHILD_SUBREAPER), so none is missed.
"""

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
    sys.exit("this kernel cannot give orphans to another process than init")
target, *command = sys.argv[1:]
child = subprocess.Popen(command)
status = 0
while True:
    try:
        pid, found = os.wait()
    except ChildProcessError:
        break
    if pid == child.pid:
        status = os.waitstatus_to_exitcode(found)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
Path(target).write_text(str(used.ru_utime + used.ru_stime), encoding="utf-8")
sys.exit(abs(status))
