"""Whether two cores share a cache. Those of a virtual machine may be moved, to ones that do and to ones that do not.

It matters where threads take whatever work is next, as XLA:CPU's do: then one reads what the other has just written.
"""

import mmap
import os
import signal
import subprocess
import sys
import time

# Nanoseconds to the other core and back, Python's own about 90 among them: on an EPYC of family 26 it takes 150 to 190
# within a cache and 350 to 400 between two.
FAR = 270


def placement() -> str:
    """``near`` if this process's two cores are within :data:`FAR` of each other, as those that share a cache, or
    ``far``; empty of fewer or more cores, or where nothing can tell."""
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) != 2:
        return ""
    # In a process without threads, which may fork.
    answer = subprocess.run([sys.executable, "-I", __file__], capture_output=True, text=True)
    if answer.returncode:
        return ""
    return "near" if float(answer.stdout) < FAR else "far"


def _round_trip(first, second, trips=1000, repeats=8):
    """Nanoseconds from one core to the other and back, the least of ``repeats``."""
    flag = mmap.mmap(-1, mmap.PAGESIZE)
    child = os.fork()
    signal.alarm(10)  # ends either, should the other be gone
    os.sched_setaffinity(0, {first if child else second})
    if not child:
        for _ in range(trips * repeats):
            while not flag[0]:
                pass
            flag[0] = 0
        os._exit(0)
    durations = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        for _ in range(trips):
            flag[0] = 1
            while flag[0]:
                pass
        durations.append((time.perf_counter_ns() - start) / trips)
    os.waitpid(child, 0)
    return min(durations)


if __name__ == "__main__":
    print(_round_trip(*sorted(os.sched_getaffinity(0))[:2]))
