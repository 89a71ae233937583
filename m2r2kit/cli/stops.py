"""SIGTERM and SIGHUP end a command as Ctrl-C does: children end, temporary files go, progress is saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by SIGTERM or SIGHUP; `number` is the signal's number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The shell's exit code of a program that a signal stopped: 130 for Ctrl-C."""
    return 128 + getattr(interrupt, "number", signal.SIGINT)


@contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise `Stopped`, unless they are ignored (`nohup`) or handled already."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise Stopped(number)

    ours = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) == signal.SIG_DFL]
    for s in ours:
        signal.signal(s, stop)
    try:
        yield
    finally:
        for s in ours:
            signal.signal(s, signal.SIG_DFL)
