"""One notebook, executed by Papermill in a kernel of this very interpreter, and watched while it runs.

Papermill reports a killed kernel's cells as completed; what is said here about success is checked cell by cell.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import psutil

from resonate_lib import record
from resonate_lib.config import CHECKOUT
from resonate_lib.progress import clock
from resonate_lib.runs import cache_dir

TOLD = re.compile(r"\s*(\d+):(\d\d) left$")  # how a line of a training, or of `progress.told`, ends
WIDTH = 90  # of a notebook's last line, as it is said


@dataclass
class Outcome:
    """How a notebook ended: status DONE, FAILED or INTERRUPTED, a one-line reason, seconds, and peak memory in MB."""

    status: str = "DONE"
    reason: str = ""
    seconds: float = 0.0
    peak_rss_mb: float = 0.0


@dataclass
class Watch:
    """A thread that samples memory, and says on standard error how far things are.

    `label`, `expected` seconds and those `after` this notebook are set per notebook; `last`: the line printed last, `heard` when.
    """

    every: float = 10.0
    label: str = ""
    expected: float = 0.0
    after: float = 0.0
    cell: int = 0
    cells: int = 0
    last: str = ""
    heard: float = 0.0
    peak_mb: float = 0.0
    began: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.monotonic)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def begin(self, label: str, cells: int, expected: float, after: float) -> None:
        """A new notebook: its expected seconds, and those of all that follow."""
        self.label, self.cells, self.cell, self.expected, self.after = label, cells, 0, expected, after
        self.last, self.peak_mb, self.started = "", resident_mb(), time.monotonic()
        self.say()

    def write(self, text: str) -> None:
        """Papermill's stdout_file: keeps the last line with something in it."""
        if lines := [line for line in text.replace("\r", "\n").splitlines() if line.strip()]:
            self.last, self.heard = lines[-1].strip(), time.monotonic()

    def flush(self) -> None:
        """Part of a file's interface; there is nothing to flush."""

    def say(self) -> None:
        """One line on standard error."""
        now, told = time.monotonic(), TOLD.search(self.last)
        spent = now - self.started
        at_least = 60 * int(told[1]) + int(told[2]) - (now - self.heard) if told else 0.0  # what runs now knows better
        left = max(self.expected - spent, 0.05 * spent, at_least) + self.after
        parts = [
            f"[{clock(now - self.began)}] {self.label}",
            f"cell {self.cell}/{self.cells}",
            f"about {clock(left)} left",
            f"{self.peak_mb / 1024:.1f} GB",
        ]
        end = told[0] if told else ""
        last = self.last[: len(self.last) - len(end)][: WIDTH - len(end)] + end
        print(" | ".join([*parts, last] if last else parts), file=sys.stderr, flush=True)

    def _loop(self) -> None:
        told = time.monotonic()
        while not self._stop.wait(0.5):
            self.peak_mb = max(self.peak_mb, resident_mb())
            if self.label and time.monotonic() - told >= self.every:
                told = time.monotonic()
                self.say()


def resident_mb() -> float:
    """Resident memory in MB of this process and all its descendants. Of a forked one only what is its own: it shares the pages
    of its parent, which are counted there."""
    here = psutil.Process()
    total = here.memory_info().rss
    for process in here.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().uss if _forked(process) else process.memory_info().rss
    return total / 2**20


def _forked(process: psutil.Process) -> bool:
    """Whether it runs its parent's program: the same command line. Asked of these alone, as what is a process' own is read page by
    page: every half second, that took 8 % of a core where two processes of 6 GB were training."""
    parent = process.parent()
    return parent is not None and process.cmdline() == parent.cmdline()


def environment(
    run: Path, notebook: str, *, params_dir: Path, from_version: Path | None, from_scratch: bool, offline: bool
) -> dict[str, str]:
    """The kernel's variables. Thread counts and offline mode that the user has set stay as they are."""
    threads, cache = str(record.cores()), cache_dir()
    kept = {
        name: os.environ.get(name, threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    }
    if offline:
        kept["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
    path = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **kept,
        "RESONATE_RUN": str(run),
        "RESONATE_BATCH": "1",
        "RESONATE_NOTEBOOK": notebook,
        "RESONATE_PARAMS": str(params_dir),
        "RESONATE_CACHE": str(cache),
        "RESONATE_FROM": str(from_version or ""),
        "RESONATE_FROM_SCRATCH": "1" if from_scratch else "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "NUMBA_CACHE_DIR": str(cache / "numba"),
        "IPYTHONDIR": str(cache / "ipython"),
        "PYTHONPATH": os.pathsep.join(path),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def manager_for(variables: dict[str, str], started: dict[str, subprocess.Popen]) -> type:
    """A kernel manager class that starts sys.executable, whatever the `python3` kernelspec of the machine points to.

    The kernel's process is put into `started`, so that its exit code can be read after its death.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class CurrentPython(AsyncKernelManager):
        @property
        def kernel_spec(self):
            return KernelSpec(argv=record.python_command(), display_name="Python 3", language="python")

        async def start_kernel(self, **options):
            await super().start_kernel(**{**options, "env": {**os.environ, **variables}})
            started["kernel"] = self.provisioner.process

    return CurrentPython


def execute(source: Path, output: Path, parameters: dict[str, Any], variables: dict[str, str], watch: Watch) -> Outcome:
    """Run `source` with `parameters`, keep the executed notebook at `output` whatever happens, and say how it ended.

    Raises nothing for a notebook that fails, a kernel that dies, Ctrl-C or a full disk: each becomes an Outcome.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    logging.getLogger("traitlets").setLevel(logging.CRITICAL)
    started: dict[str, subprocess.Popen] = {}
    outcome = Outcome()
    output.parent.mkdir(parents=True, exist_ok=True)

    def at_cell(cell, cell_index):
        watch.cell = cell_index + 1

    try:
        papermill.execute_notebook(
            source,
            output,
            parameters=parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=variables["RESONATE_RUN"],
            stdout_file=watch,
            kernel_manager_class=manager_for(variables, started),
            shutdown_kernel="immediate",
            on_cell_start=at_cell,
        )
        outcome = _unfinished(output) or outcome
    except KeyboardInterrupt:
        outcome = Outcome("INTERRUPTED", f"interrupted in cell {watch.cell}")
    except PapermillExecutionError as error:
        interrupted = error.ename == "KeyboardInterrupt"
        first = " ".join(str(error.evalue).split())[:300]
        outcome = Outcome("INTERRUPTED" if interrupted else "FAILED", f"cell {watch.cell}: {error.ename}: {first}")
    except DeadKernelError:
        outcome = Outcome("FAILED", f"cell {watch.cell}: the kernel died, {death(started.get('kernel'))}")
    except (TimeoutError, RuntimeError) as error:
        outcome = Outcome("FAILED", f"the kernel did not start: {' '.join(str(error).split())[:300]}; see `doctor`")
    except OSError as error:
        outcome = Outcome("FAILED", record.explain(error, output.parent.parent))
    finally:
        stop(started.get("kernel"))
    outcome.seconds, outcome.peak_rss_mb = time.monotonic() - watch.started, max(watch.peak_mb, resident_mb())
    with contextlib.suppress(OSError, ValueError):
        tidy(output, outcome, watch.cell)
    return outcome


def death(process: subprocess.Popen | None) -> str:
    """Words for a dead kernel's exit code."""
    code = None
    if process is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=2)
    if code is None:
        return "exit code unknown"
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        hint = "; the memory may have run out: close other programs or use smaller numbers" if number == 9 else ""
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(number).name}{hint}"
    return f"exit code {code}"


def stop(process: subprocess.Popen | None) -> None:
    """Make sure that the kernel is gone."""
    if process is not None and process.poll() is None:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def _unfinished(output: Path) -> Outcome | None:
    """A failure when some code cell was never executed, although Papermill calls it completed."""
    for index, cell in enumerate(nbformat.read(output, as_version=4).cells):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            return Outcome("FAILED", f"cell {index + 1} was not executed: the kernel stopped answering")
    return None


def tidy(output: Path, outcome: Outcome, cell: int) -> None:
    """Correct the executed notebook: true cell statuses after a death, and no folder of this machine in its text."""
    notebook = nbformat.read(output, as_version=4)
    paths = notebook.metadata.get("papermill", {})
    paths["input_path"], paths["output_path"] = output.name, output.name
    if outcome.status != "DONE" and not any(_status(item) == "failed" for item in notebook.cells):
        for index, item in enumerate(notebook.cells):
            if _status(item) == "completed" and index + 1 >= cell:
                item.metadata["papermill"]["status"] = "failed" if index + 1 == cell else "pending"
    text = nbformat.writes(notebook)
    places = ((str(CHECKOUT), "."), (sys.prefix, "<python>"), (str(Path.home()), "~"))
    for place, short in sorted(places, key=lambda pair: -len(pair[0])):
        text = text.replace(f"{place}/", f"{short}/") if len(place) > 1 else text
    record.atomic_write(output, text + "\n")


def _status(cell: Any) -> str:
    return cell.metadata.get("papermill", {}).get("status", "")
