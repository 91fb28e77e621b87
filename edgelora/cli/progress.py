"""The bar of the commands that take long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from edgelora.cli.console import err

PATIENCE = 1.0  # seconds without a bar


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


@contextmanager
def late_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that is told how many are done, of how many; the bar appears after a second."""
    started, bar = time.perf_counter(), progress_bar()
    task = bar.add_task(what, total=None)

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if time.perf_counter() - started > PATIENCE:
            bar.start()

    try:
        yield show
    finally:
        bar.stop()
