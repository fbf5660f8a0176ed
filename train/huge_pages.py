"""Huge pages for what is computed on a processor.

XLA:CPU asks for the memory of a step in every step anew, and Linux maps and clears it by pages of 4 kB when they are
first touched: 321,000 page faults a training step of res2net50_14w_8s at batch 8. With pages of 2 MB it took 2.07 s
instead of 2.45, inference 518 ms instead of 555.
"""

import os
import sys
from pathlib import Path

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb"


def use_huge_pages(module: str) -> None:
    """Starts the program again with glibc asking for huge pages, if the kernel gives them to those who ask alone.

    glibc looks only when a program starts. To be called before the imports, or they are made twice. Where
    GLIBC_TUNABLES says something about it already, or a debugger looks on, nothing happens.

    Args:
        module: The name after ``python -m``. Started in any other way (a notebook, pytest), this does nothing, for
            ``os.execv`` would replace that program.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    ours = ("-m", module) in zip(sys.orig_argv, sys.orig_argv[1:])
    if not ours or TUNABLE in tunables or sys.gettrace() or not _given_to_those_who_ask():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, f"{TUNABLE}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _given_to_those_who_ask():
    try:
        return "[madvise]" in ENABLED.read_text()
    except OSError:  # not Linux
        return False
