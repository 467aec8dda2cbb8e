"""The same bits each time, on one kind of machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic() -> Iterator[None]:
    """Make what runs inside, or a function decorated with this, give the same bits each time; restored at the end.

    Not promised: the same bits on another kind of CPU, with another version of torch, or in another build of it,
    each of which may add in another order. Randomness is not set here: every draw uses its own seed.
    """
    threads = torch.get_num_threads()
    strictness = torch.get_deterministic_debug_mode()
    precision = torch.get_float32_matmul_precision()
    # The number of threads decides how sums are divided, and so how they are rounded.
    torch.set_num_threads(1)
    # An operation that has no deterministic implementation raises, instead of being a little different each time.
    torch.set_deterministic_debug_mode("error")
    # What cuBLAS needs to be deterministic. It stays: a process reads it once, when it first multiplies on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Lower settings let the CPU backend multiply in bfloat16 where it has the instructions.
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(strictness)
        torch.set_float32_matmul_precision(precision)
