"""Ctrl-C at moments at which Python would print a traceback."""

import contextlib
import signal
from collections.abc import Iterator
from threading import current_thread, main_thread
from types import FrameType


@contextlib.contextmanager
def ctrl_c_later() -> Iterator[None]:
    """Let Ctrl-C wait until the code inside has ended.

    A mask is not enough, because another thread may get the signal.
    """
    if current_thread() is not main_thread():  # only the main thread gets KeyboardInterrupt
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[0])
