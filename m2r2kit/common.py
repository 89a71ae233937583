"""What every room needs: how bad input is reported, where files lie, and how much memory was used."""

import os
import resource
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the project's folder, with `data/` and `notebooks/` in it


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, and what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """


def cache_dir() -> Path:
    """The cache folder, which may not exist yet; the variable `M2R2KIT_CACHE` names another one."""
    root = os.environ.get("M2R2KIT_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "m2r2kit"


def peak_bytes() -> int:
    """The largest memory of this process so far, as the system reports it (resident set, in bytes).

    Linux: VmHWM, because `ru_maxrss` there also counts the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
