"""Long calls into the runtime that Ctrl-C can end."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
_PATIENCE = 0.05  # seconds between two attempts to cancel


def prepare(call: Callable[[], T]) -> tuple[threading.Thread, Future[T]]:
    """A thread of its own for `call`, to be started; until it runs, the future can be cancelled."""
    future: Future[T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    return threading.Thread(target=run, name="edgelora", daemon=True), future


def start(call: Callable[[], T]) -> tuple[threading.Thread, Future[T]]:
    """Runs `call` on a thread of its own."""
    worker, future = prepare(call)
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
    worker, future = prepare(call)
    try:
        worker.start()
        return future.result()
    except KeyboardInterrupt:
        if not future.cancel():  # it runs, or has ended
            end(worker, cancel)
        raise
