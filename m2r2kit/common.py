"""What every room needs: how bad input is reported, where files lie, and how much memory was used."""

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the project's folder, with `data/` and `notebooks/` in it


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, and what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """


@dataclass(frozen=True)
class Entry:
    """One line of a registry: something that is asked for by name.

    A registry is a dict from names to entries. It imports nothing heavy, because the command line reads its
    choices and help texts from it before it knows which command will run.

    Attributes:
        about: what it is, in one sentence without a final stop.
        needs: the command that makes what it needs, such as `train drafter`; empty if it needs nothing.
        source: the paper, as author and year; empty for controls and for what is ours.
    """

    name: str
    about: str
    needs: str = ""
    source: str = ""

    def __str__(self) -> str:
        return f"{self.about}: {self.source}" if self.source else self.about


def registry(*entries: Entry) -> dict[str, Entry]:
    """Entries by their names, in the order in which they are shown."""
    return {entry.name: entry for entry in entries}


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
