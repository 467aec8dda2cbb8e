"""Imports that take seconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Seek no garbage while the code inside imports torch, which makes a million objects, and keeps all of them.

    To look through them again and again takes a quarter of an import's time. They are not looked at later either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
