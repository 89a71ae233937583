"""Data-parallel training on several cores: processes that each compute a share of every batch and average
their gradients.

MLX computes on a CPU in one thread. Two processes with a core each train this kit's models nearly twice as
fast as one. `train backbone` uses the same batches for any number of processes; only the order of summation
differs. In `train stream` each process has its own text. The processes communicate through MLX's ring backend
over loopback.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

PATIENCE = 5.0  # seconds for the other processes to exit after one has failed


class Alone:
    """The group of a process that trains alone."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def started() -> bool:
    """Whether `launch` started this process."""
    return "MLX_HOSTFILE" in os.environ


def group():
    """The group of processes that train together, with `size()` and `rank()`."""
    return mx.distributed.init(backend="ring") if started() else Alone()


def average(tree):
    """Average a tree of arrays over the processes; a collective call."""
    return nn.average_gradients(tree, group()) if started() else tree


def largest(value: float) -> float:
    """The maximum of the processes' values; a collective call."""
    if not started():
        return value
    return mx.distributed.all_max(mx.array(float(value)), group=group(), stream=mx.cpu).item()


def any_of(yes: bool) -> bool:
    """Whether the value is true in any process; a collective call."""
    return largest(yes) > 0


def launch(processes: int, arguments: list[str]) -> int:
    """Run `m2r2kit ARGUMENTS` in several processes that train together; only the first one prints.

    Returns:
        0, or the exit code of the process that failed first.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    with tempfile.TemporaryDirectory(prefix="m2r2kit-") as folder:
        hosts = Path(folder, "hosts.json")
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(processes)]))
        environment = {**os.environ, "MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1"}
        children: list[subprocess.Popen] = []

        def stop(*_):  # all processes must get the interrupt, on which the first one saves
            for child in children:
                child.send_signal(signal.SIGINT)

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            for rank in range(processes):
                # one core each if they fill the machine: migration would cost a third of the speed
                pin = {cores[rank]} if processes == len(cores) else set()
                with Path(folder, f"{rank}.log").open("w") as log:
                    children.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "m2r2kit", *arguments],
                            env={**environment, "MLX_RANK": str(rank)},
                            stdout=None if rank == 0 else subprocess.DEVNULL,
                            stderr=None if rank == 0 else log,
                            start_new_session=True,
                            preexec_fn=partial(_begin, pin),
                        )
                    )
            return _wait(children, Path(folder))
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
            for s, handler in previous.items():
                signal.signal(s, handler)


def _begin(pin: set[int]) -> None:
    """Before a child starts: pin it to cores, and let it stop when its parent ends."""
    if pin:
        os.sched_setaffinity(0, pin)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # sys/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _wait(children: list[subprocess.Popen], folder: Path) -> int:
    """Wait for all processes; after one has failed, kill the others, which would wait for it forever."""
    failed, since = None, 0.0
    while any(child.poll() is None for child in children):
        time.sleep(0.1)
        if failed is None:
            failed = next((rank for rank, child in enumerate(children) if child.poll()), None)
            since = time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            for child in children:
                child.kill()
    if failed is None:
        failed = next((rank for rank, child in enumerate(children) if child.returncode), None)
    if failed is None:
        return 0
    log = folder / f"{failed}.log"
    if children[0].returncode != 2:  # 2: bad input, which the first process has reported
        sys.stderr.write(log.read_text()[-2000:])
    return max(1, children[failed].returncode)


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for s in held:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports
