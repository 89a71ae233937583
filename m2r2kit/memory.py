"""The most memory that a process has had, as the system says it and not as we count it."""

import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Of this process since its program began: all resident pages, libraries and Python included.

    Linux's VmHWM, as `ru_maxrss` there also counts the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
