"""Starts programs that end with us or keep running, and finds running ones again.

In this file "we" are this Python process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import psutil

from traincert.regtest.errors import RegtestError

_Order = tuple[Callable[[], psutil.Popen], Future[psutil.Popen]]


@cache
def _spawner() -> SimpleQueue[_Order]:
    """Return the orders for the thread that starts processes.

    The kernel sends a death signal when the *thread* that started a process ends. A daemon thread ends with us, after
    the functions of `atexit`: they can still stop a node in good order.
    """
    orders = SimpleQueue[_Order]()

    def carry_out() -> None:
        while True:
            start, started = orders.get()
            try:
                started.set_result(start())
            except BaseException as error:
                started.set_exception(error)

    threading.Thread(target=carry_out, name="spawner", daemon=True).start()
    return orders


os.register_at_fork(after_in_child=_spawner.cache_clear)  # a child that was forked does not have the thread


def spawn(
    command: list[str],
    *,
    keep: bool,
    stdout: int = subprocess.DEVNULL,
    stderr: IO[bytes] | int = subprocess.DEVNULL,
) -> psutil.Popen:
    """Start a program, detached from the terminal. Its stdin is /dev/null.

    The program ends when we end, even by SIGKILL. With `keep` it keeps running. Raises OSError if it cannot be run,
    and RegtestError if setpriv is missing.
    """
    start = partial(
        psutil.Popen,
        command if keep else bound_to_us(command, "KILL"),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,  # Ctrl-C in the terminal reaches only us; we then stop the program properly
        restore_signals=False,  # keep SIGXFSZ ignored, for Node.fill_disk(); bitcoind itself ignores SIGPIPE
    )
    started = Future[psutil.Popen]()
    _spawner().put((start, started))
    return started.result()


def bound_to_us(command: list[str], death_signal: str) -> list[str]:
    """Return a command that runs `command` so that the kernel sends it a signal when we end, even by SIGKILL.

    `death_signal` is a name without SIG, such as TERM. The kernel watches the *thread* that starts the command.
    Raises RegtestError if setpriv is missing.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise RegtestError("setpriv not found; install the Debian package util-linux")
    return [setpriv, "--pdeathsig", death_signal, "--", *command]


def find_process(locked: Path) -> psutil.Process | None:
    """Return the process that holds the lock on a file; None if none does.

    The lock is one of `fcntl`, as bitcoind's on a data directory. The kernel tells who holds it, so neither a reused
    process id nor a step of the machine's clock misleads us.
    """
    # struct flock: the kind of lock, from where, offset, length (0: to the end), and the process id in the answer.
    question = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with contextlib.suppress(OSError, psutil.Error):
        with locked.open("rb") as file:
            kind, _, _, _, pid = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, question))
        if kind != fcntl.F_UNLCK:
            return psutil.Process(pid)
    return None


def find_by_argument(argument: str) -> list[psutil.Process]:
    """Return all processes that have `argument` on their command line."""
    return [process for process in psutil.process_iter(["cmdline"]) if argument in (process.info["cmdline"] or [])]


def kill(process: psutil.Process) -> None:
    """Kill a process (SIGKILL) and wait for its end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    if isinstance(process, psutil.Popen):
        process.wait()
    while is_running(process):  # not our child; psutil's wait() does not return for a zombie
        time.sleep(0.005)


def is_running(process: psutil.Process) -> bool:
    """Whether a process runs. A zombie does not run."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
