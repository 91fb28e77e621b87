"""Long calls into the runtime that Ctrl-C can end."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
_PATIENCE = 0.05  # seconds between two attempts to cancel


def start(call: Callable[[], T]) -> tuple[threading.Thread, Future[T]]:
    """Runs `call` on a thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    worker = threading.Thread(target=run, name="edgelora", daemon=True)
    worker.start()
    return worker, future


def end(worker: threading.Thread, cancel: Callable[[], None]) -> None:
    """Cancels until `worker` has ended: a cancel before the runtime began is lost."""
    while worker.is_alive():
        cancel()
        worker.join(_PATIENCE)


def interruptible(call: Callable[[], T], cancel: Callable[[], None]) -> T:
    """`call()`; on the main thread, KeyboardInterrupt cancels it and is raised once it ended."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    worker, future = start(call)
    try:
        return future.result()
    except KeyboardInterrupt:
        end(worker, cancel)
        raise
