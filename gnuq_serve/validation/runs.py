"""Many runs, side by side, each kept as it is done: a stopped experiment goes on from where it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from gnuq_serve.calibration.journal import Journal
from gnuq_serve.validation.study import Case, Settings, run_case

# Small products gain nothing by threads; the runs themselves go side by side.
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
}


class RunsFile(Journal):
    """Finished rows by case. Use as a context manager."""

    kind = "gnuq_validate_runs"
    another = "name another --out"

    def __init__(self, path: Path, settings: Settings) -> None:
        """Open or start a file; errors as of `Journal`."""
        self.rows: dict[Case, dict[str, Any]] = {}
        super().__init__(path, asdict(settings))

    def add(self, row: dict[str, Any]) -> None:
        """Keep one row."""
        self._take_row(row)
        self._append(row)

    def _take_row(self, row: dict[str, Any]) -> None:
        self.rows[Case(row["problem"], row["width"], row["seed"])] = row


def run_all(
    cases: Sequence[Case],
    settings: Settings,
    file: RunsFile,
    *,
    jobs: int,
    progress: Callable[[], None],
) -> list[dict[str, Any]]:
    """Run what is not there yet; rows in the order of the cases.

    Args:
        cases: what to run.
        settings: shared by all.
        file: where rows are, and where new ones go.
        jobs: processes at a time.
        progress: called after each new row.
    """
    todo = [case for case in cases if case not in file.rows]
    if todo:
        os.environ |= {name: os.environ.get(name, value) for name, value in _ONE_THREAD.items()}
        with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=get_context("spawn")) as pool:
            try:
                for future in as_completed([pool.submit(run_case, case, settings) for case in todo]):
                    file.add(future.result())
                    progress()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in active_children():  # a run takes minutes, and nothing of half a run is kept
                    child.terminate()
                raise
    return [file.rows[case] for case in cases]
