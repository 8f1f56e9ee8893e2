"""Execute one notebook with papermill, and trust nothing that can look finished without being so.

papermill only warns about a parameter that the notebook does not have, and marks a notebook as completed after a cell time-out or a dead
kernel. So the parameter is checked before, the exception is what counts, and the notebook that is kept says where it stopped.
"""

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import psutil
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from course import artifacts

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class ChapterError(RuntimeError):
    """A notebook that did not reach its end: which cell, its source, and what happened."""

    def __init__(self, cell: str, source: str, name: str, message: str, traceback: str = "") -> None:
        super().__init__(f"cell {cell!r}: {name}: {message}")
        self.cell, self.source, self.name, self.message, self.traceback = cell, source, name, message, traceback


@dataclass
class Result:
    """What one execution took."""

    seconds: float = 0.0
    peak_memory_bytes: int = 0


class Manager(AsyncKernelManager):
    """A kernel of this very Python, whatever kernels the user has installed, reached through files instead of TCP ports."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, language="python", display_name="Python 3")


class Engine(NBClientEngine):
    """papermill's own engine, with our kernel, a callback for each cell, and a look at the kernel's memory."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, watch, folder, execution_timeout=None, start_timeout=60, **_):
        """Run all cells; `watch` is a Watch."""
        manager = Manager(kernel_name=kernel_name, connection_file=str(folder / "kernel.json"))
        if os.name == "posix":
            manager.transport, manager.ip = "ipc", str(folder / "kernel-ipc")
        start = nb_man.cell_start

        def cell_start(cell, cell_index=None, **kwargs):
            watch.cell(cell, cell_index, len(nb_man.nb.cells))
            start(cell, cell_index, **kwargs)

        nb_man.cell_start = cell_start
        client = PapermillNotebookClient(
            nb_man, km=manager, timeout=execution_timeout, startup_timeout=start_timeout, kernel_name=kernel_name,
            on_notebook_start=lambda **_: watch.kernel(manager.provisioner.pid, folder), shutdown_kernel="immediate",
            extra_arguments=["--HistoryManager.enabled=False"],
        )  # fmt: skip
        client.owns_km = True
        client.widget_registry = {}  # nbclient's own Output widget sometimes loses a wake-up, and the cell then waits for ever
        try:
            return client.execute(env=watch.environment)
        finally:
            if client.km is not None and client.kc is not None:
                client._cleanup_kernel()


class Watch:
    """Follows one execution: the cell that runs, the kernel's process, its memory."""

    def __init__(self, environment: dict[str, str], on_cell: Callable[[int, int], None], on_kernel: Callable[[int, Path], None]) -> None:
        self.environment, self.on_cell, self.on_kernel = environment, on_cell, on_kernel
        self.current: tuple[int, dict] | None = None
        self.peak, self.pid, self._stop = 0, None, threading.Event()

    def cell(self, cell: dict, index: int, count: int) -> None:
        self.current = (index, cell)
        self.on_cell(index + 1, count)

    def kernel(self, pid: int, folder: Path) -> None:
        self.pid = pid
        self.on_kernel(pid, folder)
        threading.Thread(target=self._measure, daemon=True).start()

    def _measure(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, tree_memory(self.pid))
            self._stop.wait(0.2)

    def stop(self) -> None:
        """Stop measuring, and end whatever the notebook left running."""
        self._stop.set()
        if self.pid:
            kill_group(self.pid)


def tree_memory(pid: int) -> int:
    """Bytes in memory of a process and all its children; for the process itself at least the highest value it ever had."""
    total = 0
    try:
        process = psutil.Process(pid)
        for child in process.children(recursive=True):
            try:
                total += child.memory_info().rss
            except psutil.Error:
                continue
        own = process.memory_info().rss
    except psutil.Error:
        return 0
    try:  # Linux keeps the high-water mark, so that a short peak between two looks is not missed
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
        own_peak = int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        own_peak = own
    return max(own + total, own_peak)


def kill_group(pid: int) -> None:
    """End a kernel and what it started: a kernel leads a process group of its own."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    except AttributeError:  # Windows
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)] if psutil.pid_exists(pid) else ():
            process.kill()


def load(notebook: Path) -> nbformat.NotebookNode:
    """Read a notebook; one that names no kernel is a Python notebook."""
    node = nbformat.read(notebook, as_version=4)
    node.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return node


def check_parameters(notebook: Path, parameters: dict) -> None:
    """Every parameter must stand in the cell tagged "parameters": papermill only warns, and the notebook runs with its own value."""
    known = papermill.inspect_notebook(load(notebook))
    for name in parameters:
        if name not in known:
            message = f'{notebook.name} has no parameter {name!r} in a cell tagged "parameters" (it has: {", ".join(known) or "none"})'
            raise ChapterError("parameters", "", "missing parameter", message)


def execute(
    notebook: Path,
    output: Path,
    parameters: dict,
    environment: dict[str, str] | None = None,
    cell_timeout: float | None = None,
    on_cell: Callable[[int, int], None] = lambda index, count: None,
    on_kernel: Callable[[int, Path], None] = lambda pid, folder: None,
) -> Result:
    """Run `notebook` from its first cell to its last and write it to `output`.

    Until the end is reached the notebook stands in OUTPUT.partial.ipynb, and stays there when a cell fails. Raises ChapterError.
    """
    check_parameters(notebook, parameters)
    partial = partial_path(output)
    watch = Watch({**os.environ, **(environment or {})}, on_cell, on_kernel)
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="course-"))  # a short path: the name of a socket has at most 107 bytes
    watch.environment["IPYTHONDIR"] = str(folder)  # no start-up files of the user
    watch.environment.pop("MPLBACKEND", None)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    if papermill_engines._engines.get("course") is not Engine:
        papermill_engines.register("course", Engine)
    error = None
    try:
        done = papermill.execute_notebook(
            load(notebook), str(partial), parameters=parameters, engine_name="course", kernel_name="python3", progress_bar=False,
            cwd=str(notebook.parent), execution_timeout=cell_timeout, watch=watch, folder=folder,
        )  # fmt: skip
        # sys.exit(0) in a cell ends the notebook there, and papermill calls that success.
        if any(cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None for cell in done.cells):
            error = ("stopped early", "the cells after this one were not run", "")
    except PapermillExecutionError as failed:
        error = (failed.ename, failed.evalue, ANSI.sub("", "\n".join(failed.traceback)))
    except CellTimeoutError:
        error = ("time-out", f"the cell ran longer than {cell_timeout:g} seconds", "")
    except DeadKernelError:
        memory = f"; it had used {watch.peak / 1e9:.1f} GB" if watch.peak else ""
        error = ("dead kernel", f"the process of the notebook ended while this cell ran{memory}. Often the machine was out of memory", "")
    finally:
        watch.stop()
        shutil.rmtree(folder, ignore_errors=True)
    if error:
        raise _failed(partial, watch, *error)
    os.replace(partial, output)
    return Result(time.monotonic() - begun, watch.peak)


def partial_path(output: Path) -> Path:
    """Where a notebook stands until its end is reached."""
    return output.with_name(f"{output.stem}.partial.ipynb")


def _failed(partial: Path, watch: Watch, name: str, message: str, traceback: str) -> ChapterError:
    """The error to raise, after the notebook that is kept was made to say the truth about where it stopped."""
    cell_id, source = "?", ""
    try:
        notebook = nbformat.read(partial, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])]
        index = watch.current[0] if watch.current else 0
        for position, cell in enumerate(notebook.cells):
            if position >= index and "papermill" in cell.metadata:
                cell.metadata.papermill.update(status="failed" if position == index else "pending", exception=True if position == index else None)
        cell = notebook.cells[index]
        cell_id, source = cell.metadata.get("id") or cell.get("id", "?"), cell.source
        if cell.cell_type == "code" and not any(output.output_type == "error" for output in cell.outputs):
            cell.outputs.append(nbformat.v4.new_output("error", ename=name, evalue=message, traceback=[f"{name}: {message}"]))
        notebook.metadata.papermill["exception"] = True
        artifacts.write_bytes(partial, nbformat.writes(notebook).encode())
    except (OSError, ValueError, IndexError):  # a full disk, for example: the first error is the one to tell
        if watch.current:
            cell_id, source = watch.current[1].get("id", "?"), watch.current[1].get("source", "")
    return ChapterError(cell_id, source, name, message, traceback)
