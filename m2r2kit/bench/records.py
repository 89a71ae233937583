"""Measured records: one JSON line each, one file per subject, under `data/results/` (in the cache folder if
only the package is installed).

No other module accesses that folder. A record holds the command, the settings, the machine and the results;
all tables and figures of this kit are drawn from records. The machine is described by its hardware: no host
name, user or absolute path.
"""

import fcntl
import json
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..common import IN_PROJECT, ROOT, UserError, cache_dir, parse_json

# an installed package has no project folder to write to
RESULTS = ROOT / "data" / "results" if IN_PROJECT else cache_dir() / "results"
LIBRARIES = ("mlx", "mlx-lm", "numpy")

# An absolute path, alone or after `=` or a quote, but not part of a URL.
ABSOLUTE_PATH = re.compile(r"""(?<![\w.~:/-])/(?:[^\s/'"=,:]+/)*([^\s/'"=,:]+)/?""")


# --- reading and writing ------------------------------------------------------------------


def path(subject: str) -> Path:
    """The file of a subject such as `speculation`."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", subject):
        raise UserError(
            f"'{subject}' cannot name a file of records; use lower-case letters, digits and hyphens"
        )
    return RESULTS / f"{subject}.jsonl"


def append(
    subject: str, *, command: str, settings: dict, figures: dict, prompts_sha256: str | None = None
) -> dict:
    """Append one record, whole or not at all, and return it.

    Args:
        command: reproduces the figures.
        settings: `latest` selects by them.

    Raises:
        UserError: the file is damaged or cannot be written.
    """
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "settings": settings,
        "prompts_sha256": prompts_sha256,
        "figures": figures,
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }
    # converts NumPy and MLX scalars; NaN and infinity are errors
    text = json.dumps(record, default=lambda scalar: scalar.item(), allow_nan=False)
    record = portable(json.loads(text))
    _write_line(path(subject), json.dumps(record))
    if not IN_PROJECT:
        print(f"The record is in {path(subject)}.", file=sys.stderr)
    return record


def read(subject: str) -> list[dict]:
    """All records of a subject, oldest first by date; empty if there is no file.

    Raises:
        UserError: the file is damaged.
    """
    file = path(subject)
    found = _parse(file, file.read_bytes()) if file.exists() else []
    return sorted(found, key=lambda record: datetime.fromisoformat(record["date"]))


def latest(subject: str, **settings) -> dict | None:
    """The newest record whose settings have all of these values, or None."""
    for record in reversed(read(subject)):
        if all(record["settings"].get(name) == value for name, value in settings.items()):
            return record
    return None


def _parse(file: Path, content: bytes) -> list[dict]:
    found = []
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            record = parse_json(line, parse_constant=_refuse)
            # fields that all readers rely on
            record["machine"]["chip"], record["machine"]["cores"]
            if not isinstance(record["settings"], dict) or not isinstance(record["figures"], dict):
                raise ValueError("settings or figures without names")
            if datetime.fromisoformat(record["date"]).tzinfo is None:
                raise ValueError("a date without its time zone")
        except (ValueError, KeyError, TypeError):
            whole = False
        else:
            whole = line.endswith(b"\n")
        if not whole:
            raise UserError(
                f"{portable(str(file))}, line {number}: not a complete record; repair or delete it"
            )
        found.append(record)
    return found


def _refuse(constant: str):
    """Reject `NaN` and `Infinity`, which are not JSON."""
    raise ValueError(f"{constant} is not a number")


def _write_line(file: Path, line: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+b", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # two benchmarks may finish at the same time
            stream.seek(0)
            _parse(file, stream.read())  # do not append to a damaged file
            size, data = stream.tell(), f"{line}\n".encode()
            try:
                if stream.write(data) != len(data):
                    raise OSError("the disk is full")
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(size)
                raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"the record cannot be written to {portable(str(file))}: {reason}") from None


# --- machine and software --------------------------------------------------------------


def portable(value):
    """The value without absolute paths: relative inside the project, only the last name elsewhere."""
    if isinstance(value, dict):
        return {portable(key): portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item) for item in value]
    if isinstance(value, str):
        return ABSOLUTE_PATH.sub(r"\1", value.replace(f"{ROOT}/", ""))
    return value


def _output(*command: str) -> str | None:
    """Output of a program, or None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """The project's commit, with `-dirty` if files differ from it; None outside git."""
    git = ("git", "-C", str(ROOT))
    top = _output(*git, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return None  # no git, or installed inside another repository
    head = _output(*git, "rev-parse", "HEAD")
    if head is None:
        return None
    # ignore the records: otherwise the second of two would always be dirty
    changes = _output(*git, "status", "--porcelain", "--", ".", ":!data/results")
    return head if changes == "" else f"{head}-dirty"


def versions() -> dict:
    """Versions of Python and of `LIBRARIES`."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict:
    """This machine: chip, cores, memory in GiB, system, C library, device and BLAS of MLX."""
    from ..model.cpu import threads as runtime

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    system = {"Darwin": f"macOS {platform.mac_ver()[0]}"}.get(platform.system(), platform.system())
    return {
        "chip": chip(),
        "cores": cores,
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{system} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "device": device(),
        "blas": runtime.prepare().kind,
    }


def about() -> str:
    """Two lines for the top of a notebook: versions, then the device and chip."""
    found = "".join(f" | {name} {version}" for name, version in versions().items())
    return f"m2r2kit {__version__}{found}\ndevice: {device()} on {chip()}"


def device() -> str:
    """MLX's default device: `cpu`, or `gpu: NAME`."""
    import mlx.core as mx

    kind = mx.default_device().type.name
    name = mx.device_info().get("device_name") if kind == "gpu" else None
    return f"{kind}: {name}" if name else kind


def chip() -> str:
    """The processor's model name."""
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string")
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        name = next(iter(re.findall(r"^model name\s*: (.+)$", info, re.M)), None)
    return name or platform.processor() or platform.machine()
