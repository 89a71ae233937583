"""A papermill engine that runs this Python and collects every error of a kernel, not only those of cells.

An exception in a callback, thread or task does not fail its cell: it goes to an Output widget or to stderr,
where the next `clear_output` may delete it. The engine therefore reads all messages from the kernel, also
between cells and after the last one.
"""

import os
import re
import sys

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient.exceptions import CellExecutionComplete
from nbformat.v4 import new_code_cell
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from ..common import ROOT

# As Python prints it: this line, indented frames, the error. The word alone may be ordinary text.
TRACEBACK = re.compile(
    r"^[ |+]*(?:Exception Group )?Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)", re.M
)
# Runs after the last cell: waits for threads, and collects garbage, which may report more errors.
LAST = """\
def _wait():
    import gc, sys, threading, time
    end = time.monotonic() + {seconds}
    for thread in threading.enumerate():
        if not (thread.daemon or thread in (threading.main_thread(), threading.current_thread())):
            thread.join(max(0, end - time.monotonic()))
    gc.collect()
    sys.stderr.flush()
_wait()
"""
LAST_SECONDS = 10


class Errors:
    """Errors from a kernel besides the outputs of its cells, and the cell that is running."""

    def __init__(self):
        self.cell = 0  # as the kernel numbers them: code cells, from 1
        self.errors: list[str] = []  # such as "ValueError: five is too many"
        self.stderr = ""  # of the whole run: one traceback may span several messages

    def listen(self, message: dict) -> None:
        content = message["content"]
        if message["msg_type"] == "error":
            self.errors.append(f"{content['ename']}: {content['evalue']}")
        elif message["msg_type"] == "stream" and content["name"] == "stderr":
            self.stderr += content["text"]

    def all(self) -> list[str]:
        """Each error once."""
        return list(dict.fromkeys([*self.errors, *TRACEBACK.findall(self.stderr)]))


class ThisPython(KernelSpecManager):
    """The kernel is this Python, whatever kernels are installed."""

    def get_kernel_spec(self, kernel_name):
        # without the kernel's log, which reports a normal end as an error
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=50"]
        env = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            # notebooks need the inline backend, whatever MPLBACKEND says
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        }
        return KernelSpec(argv=argv, display_name="Python 3 (ipykernel)", language="python", env=env)


class Manager(AsyncKernelManager):
    def _kernel_spec_manager_default(self):
        return ThisPython()


class Client(PapermillNotebookClient):
    """Papermill's client; it passes every message of the kernel to `Errors`."""

    def papermill_execute_cells(self):
        super().papermill_execute_cells()
        outputs = [output for cell in self.nb.cells for output in cell.get("outputs", [])]
        if any(output.output_type == "error" for output in outputs):
            return
        self.nb.cells.append(new_code_cell(LAST.format(seconds=LAST_SECONDS)))
        try:
            super().execute_cell(self.nb.cells[-1], len(self.nb.cells) - 1)
        finally:
            self.nb.cells.pop()

    def execute_cell(self, cell, cell_index, **kwargs):
        self.nb_man.errors.cell += cell.cell_type == "code"
        return super().execute_cell(cell, cell_index, **kwargs)

    async def _async_poll_output_msg(self, parent_msg_id, cell, cell_index):
        """Like nbclient's, which drops messages of earlier cells, such as the error of a thread."""
        while True:
            message = await self.kc.iopub_channel.get_msg(timeout=None)
            self.nb_man.errors.listen(message)
            if message["parent_header"].get("msg_id") == parent_msg_id:
                try:
                    self.process_message(message, cell, cell_index)
                except CellExecutionComplete:
                    return


class Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, errors, execution_timeout=None, **kwargs):
        nb_man.errors = errors
        return Client(
            nb_man,
            kernel_name=kernel_name,
            kernel_manager_class=Manager,
            timeout=execution_timeout,
            startup_timeout=120,
            coalesce_streams=True,
        ).execute()


NAME = "m2r2kit"
papermill_engines.register(NAME, Engine)
