"""Starting programs that must not outlive us."""

from __future__ import annotations

import shutil

from traincert.regtest.errors import RegtestError


def bound_to_us(command: list[str], death_signal: str) -> list[str]:
    """Return a command that runs `command` in the same process and has the kernel signal it when we end.

    That holds however we end, SIGKILL included. To the kernel "we" are the *thread* that starts the command.
    """
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise RegtestError("setpriv not found; install the Debian package util-linux")
    return [setpriv, "--pdeathsig", death_signal, "--", *command]
