"""Training on several cores: processes that each take a share of every batch and average gradients.

MLX computes on a CPU in one thread. Two processes with a core each train this kit's models
nearly twice as fast as one, and nothing in the result depends on it: a step sees the same
batch, only its sum is taken in another order. They talk through MLX's own ring over loopback.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

PATIENCE = 5.0  # seconds that the others get to save and leave once one process has ended


def group() -> mx.distributed.Group:
    """The processes that train together; of size 1 unless `launch` started this one."""
    return mx.distributed.init(backend="ring" if "MLX_HOSTFILE" in os.environ else "any")


def any_of(yes: bool) -> bool:
    """Whether any process says yes; all of them must ask, at the same place."""
    if group().size() == 1:
        return yes
    return mx.distributed.all_sum(mx.array(float(yes)), group=group(), stream=mx.cpu).item() > 0


def largest(value: float) -> float:
    """The largest of the processes' values; all of them must ask, at the same place."""
    if group().size() == 1:
        return value
    return mx.distributed.all_max(mx.array(float(value)), group=group(), stream=mx.cpu).item()


def started() -> bool:
    """Whether `launch` started this process."""
    return "MLX_HOSTFILE" in os.environ


def launch(processes: int, arguments: list[str]) -> int:
    """Run `m2r2kit ARGUMENTS` in several processes that train together; only the first one speaks.

    Returns:
        The exit code of the first process, or of whichever failed.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    with tempfile.TemporaryDirectory(prefix="m2r2kit-") as folder:
        hosts = Path(folder, "hosts.json")
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(processes)]))
        environment = {**os.environ, "MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1"}
        children = []
        for rank in range(processes):
            # a core each: two busy processes that are moved about lose a third of their speed
            pin = {cores[rank % len(cores)]} if processes <= len(cores) else None
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "m2r2kit", *arguments],
                    env={**environment, "MLX_RANK": str(rank)},
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    stderr=None if rank == 0 else Path(folder, f"{rank}.log").open("w"),
                    preexec_fn=(lambda pin=pin: os.sched_setaffinity(0, pin)) if pin else None,
                )
            )
        previous = {
            s: signal.signal(s, lambda number, _: [c.send_signal(number) for c in children])
            for s in (signal.SIGTERM,)
        }
        # Ctrl-C reaches the children by itself, and they save; this process waits for them
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            return _wait(children, folder)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
            for s, handler in previous.items():
                signal.signal(s, handler)


def _wait(children: list[subprocess.Popen], folder: str) -> int:
    first_end, code = None, 0
    while any(c.poll() is None for c in children):
        time.sleep(0.2)
        ended = [c.returncode for c in children if c.returncode is not None]
        if any(ended):  # one failed; the others wait for it in vain
            first_end = first_end or time.monotonic()
            if time.monotonic() - first_end > PATIENCE:
                for c in children:
                    c.kill()
    code = next((c.returncode for c in children if c.returncode), 0)
    if code and children[0].returncode in (0, -signal.SIGKILL):
        for log in sorted(Path(folder).glob("*.log")):
            sys.stderr.write(log.read_text()[-2000:])
    return code if code >= 0 else 1


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for s in held:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports
