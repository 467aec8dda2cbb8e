"""Starts programs that end with us or keep running, and finds running ones again.

In this file "we" are this Python process.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO

import psutil

from traincert.regtest.errors import RegtestError

# The kernel sends a death signal when the *thread* that started a process ends. This thread lives as long as we do.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


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
    return _spawner.submit(start).result()


def bound_to_us(command: list[str], death_signal: str) -> list[str]:
    """Return a command that runs `command` so that the kernel sends it a signal when we end, even by SIGKILL.

    `death_signal` is a name without SIG, such as TERM. The kernel watches the *thread* that starts the command.
    Raises RegtestError if setpriv is missing.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise RegtestError("setpriv not found; install the Debian package util-linux")
    return [setpriv, "--pdeathsig", death_signal, "--", *command]


def find_process(pid_file: Path, argument: str) -> psutil.Process | None:
    """Return the process whose id is in a pid file; None if it does not run.

    After a crash or a reboot another process may have this id. So the process must be older than the file and have
    `argument` on its command line.
    """
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int(pid_file.read_text()))
        began = process.create_time() <= pid_file.stat().st_mtime + 1  # seconds; create_time() is not exact
        if began and argument in process.cmdline() and is_running(process):
            return process
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
