"""Programs that must not outlive us, and finding those again that should."""

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

# The kernel counts the *thread* that starts a process as its parent: this one lives as long as we do.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


def spawn(command: list[str], *, keep: bool, stderr: IO[bytes] | int = subprocess.DEVNULL) -> psutil.Popen:
    """Start a program in a session of its own, without input and output.

    It ends with us, however we end, SIGKILL included, unless `keep` is set. Raises OSError if it cannot be run.
    """
    start = partial(
        psutil.Popen,
        command if keep else bound_to_us(command, "KILL"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,  # Ctrl-C in the terminal is for us; we then stop what we started in good order
        restore_signals=False,  # SIGXFSZ stays ignored, for Node.fill_disk(); SIGPIPE too, as bitcoind itself has it
    )
    return _spawner.submit(start).result()


def bound_to_us(command: list[str], death_signal: str) -> list[str]:
    """Return a command that runs `command` in the same process and has the kernel signal it when we end.

    That holds however we end, SIGKILL included. To the kernel "we" are the *thread* that starts the command.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise RegtestError("setpriv not found; install the Debian package util-linux")
    return [setpriv, "--pdeathsig", death_signal, "--", *command]


def find_process(pid_file: Path, argument: str) -> psutil.Process | None:
    """Return the process that wrote its number into a file, if it still runs.

    After a crash or a reboot the number may be a stranger's: then it began after the file was written, or does not have
    `argument` on its command line.
    """
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int(pid_file.read_text()))
        began = process.create_time() <= pid_file.stat().st_mtime + 1  # in seconds; the kernel counts in hundredths
        if began and argument in process.cmdline() and is_running(process):
            return process
    return None


def find_by_argument(argument: str) -> list[psutil.Process]:
    """Return the processes that have an argument on their command line."""
    return [process for process in psutil.process_iter(["cmdline"]) if argument in (process.info["cmdline"] or [])]


def kill(process: psutil.Process) -> None:
    """End a process at once, and wait for its end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
    if isinstance(process, psutil.Popen):
        process.wait()
    while is_running(process):  # no child of ours: psutil would wait until its parent knows
        time.sleep(0.005)


def is_running(process: psutil.Process) -> bool:
    """Whether a process has not ended; a zombie has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
