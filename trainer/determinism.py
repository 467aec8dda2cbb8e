"""Computations that give the same bits each time, on machines of one numeric class."""

import os
import platform
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock

import numpy as np
import torch


def numeric_class(device: str) -> str:
    """Return, as a short text, what decides the bits that training on a device ("cpu" or "cuda") gives."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()} torch {torch.__version__}"
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


@contextmanager
def seeded(seed: int, devices: Sequence[int] = ()) -> Iterator[None]:
    """Seed torch, numpy and `random` for the code inside: users' code draws from any of them.

    `devices` are the GPUs that it uses. At the end all have the states that they had before.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


_LOCK = RLock()


@contextmanager
def deterministic() -> Iterator[None]:
    """Make the code inside give the same bits each time, as a context manager or a decorator.

    The bits are the same within one numeric class: one kind of processor, one version and build of torch. Others
    may add in another order. torch's settings are restored at the end. No random seed is set: every draw has its own.
    The settings are those of all threads, so only one thread at a time is inside.
    """
    with _LOCK:
        threads = torch.get_num_threads()
        strictness = torch.get_deterministic_debug_mode()
        precision = torch.get_float32_matmul_precision()
        filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        # The number of threads decides how a sum is split, and so how it is rounded.
        torch.set_num_threads(1)
        # An operation without a deterministic implementation raises an exception.
        torch.set_deterministic_debug_mode("error")
        # It would fill each new tensor with NaN, to show what uses it uninitialized. That takes long for a big model.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        # cuBLAS needs this to be deterministic. It is not restored: cuBLAS reads it once, at its first multiplication.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # With a lower setting, CPUs that have bfloat16 instructions would multiply in bfloat16.
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_deterministic_debug_mode(strictness)
            torch.set_float32_matmul_precision(precision)
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
