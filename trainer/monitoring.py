"""What a task does beside training, seen by the kernel: its processor time, files, sockets, programs, processes.

bpftrace runs `monitoring.bt`, which watches worker processes and all processes that they start. It needs root, and a
kernel of version 6.3 or newer. This tells what a task did. It does not stop the task, and code that runs as root can
evade it. It cannot see what a task reads of a shard that its worker process has opened in a task before.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import IO, Any, NamedTuple

from traincert.trainer.errors import TrainerError
from traincert.trainer.resources import few

_SCRIPT = Path(__file__).with_suffix(".bt")
_TIMEOUT = 30.0  # seconds that bpftrace has to start, or to answer
_REQUESTS = 1 << 16  # so many numbers has a monitor for its requests; as in the script
_FIRST_NUMBERS = itertools.count(_REQUESTS, _REQUESTS)  # of each monitor of this process
_LEARN = 1 << 30  # in place of a process id: what this thread opens now is allowed; as in the script
_BTF = Path("/sys/kernel/btf/vmlinux")
_TRACING = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
_OWN_PID_NAMESPACE = 0xEFFFFFFC  # the number of the kernel's own, PROC_PID_INIT_INO in linux/proc_ns.h
_ADMIN, _PERFMON, _BPF = 21, 38, 39  # CAP_SYS_ADMIN and so on, linux/capability.h
_MODULE = re.compile(r"\.(py|pyc|so)(\.\d+)?$")  # Python writes x.pyc as x.pyc.<number> first

# What every task may open: Python, installed packages, shared libraries, time zones, and what these read of the system.
_SYSTEM = (
    *("/lib", "/lib64", "/usr/lib", "/usr/share/zoneinfo", "/usr/share/locale", "/etc/localtime"),
    *("/etc/ld.so.cache", "/etc/locale.alias", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
)


class MonitorError(TrainerError):
    """Tasks cannot be monitored, or a task was not. The message says why."""


@contextmanager
def start_monitor(
    wanted: bool, allowed: Iterable[Path], on_failure: Callable[[str], object]
) -> Iterator[Monitor | None]:
    """Have a monitor, as `Monitor.start` starts it, if it is `wanted`.

    If this machine does not allow it, call `on_failure` with the reason, and have None.
    """
    monitor = None
    if wanted:
        try:
            monitor = Monitor.start(allowed)
        except MonitorError as error:
            on_failure(str(error))
    try:
        yield monitor
    finally:
        if monitor:
            monitor.close()


class Watched(NamedTuple):
    """What a task did.

    A flag is a name, or a name, a space and which: `opened-file PATH`, `opened-other-shard NAME`, `sent-bytes NUMBER`,
    `started-program PATH`, `forked`. At most 20 files and 20 programs are named; text is cut after 300 characters.
    """

    cpu_seconds: float  # of the worker process, and of all processes that it started
    flags: tuple[str, ...]  # what it did beside training


@dataclass
class _Seen:
    """What was seen of a worker since its last task ended."""

    lost: int  # how many losses of lines there were before
    shard: Path | None = None
    used: int = 0  # nanoseconds of processor time
    names: dict[str, list[str]] = field(default_factory=dict)  # of a file's folders, from the file on, by thread
    opened: dict[tuple[str, ...], None] = field(default_factory=dict)  # for each file its path, on all of its mounts
    programs: dict[str, None] = field(default_factory=dict)
    sent: int = 0
    forked: bool = False
    unseen: bool = False  # it used an io_uring


class Monitor:
    """Watches the worker processes of an engine in this process. Only one thread may use it.

    It ends with this process, even if this process is killed.
    """

    @classmethod
    def start(cls, allowed: Iterable[Path]) -> Monitor:
        """Start to monitor; it takes about a second.

        `allowed` are the folders whose files a task may open, such as the engine's store. Not the folder of shards:
        of it, a task may open its own shard. Python, installed packages and shared libraries are always allowed; and
        the modules (.py, .pyc, .so) in the folders of `sys.path`.

        Raises MonitorError if this machine does not allow it.
        """
        program = _program()
        monitor = cls(program)
        try:
            monitor._begin_all(allowed)
        except BaseException:
            monitor.close()
            raise
        return monitor

    def __init__(self, program: str) -> None:
        self._changed = Condition()
        self._ended = False
        self._lost = 0
        self._lines = 0  # that have come
        self._answered = 0  # the number of the last request that was answered
        self._printed: int | None = None  # how many lines there were then
        first = next(_FIRST_NUMBERS)
        self._numbers = itertools.cycle(range(first, first + _REQUESTS))
        self._seen: dict[int, _Seen] = {}
        self._held: list[int] = []  # the allowed folders, open: the kernel keeps their addresses for us
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open until `close`
        self._process = subprocess.Popen(
            [program, "-f", "json", "-B", "line", _SCRIPT, str(os.getpid()), str(first)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"BPFTRACE_STRLEN": "200", "BPFTRACE_PERF_RB_PAGES": "256"},
            start_new_session=True,  # Ctrl-C is for this process
        )
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        self._reader = Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def close(self) -> None:
        """End to monitor. Closing twice is allowed."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._errors.close()
        while self._held:
            os.close(self._held.pop())

    def begin(self, pid: int, shard: Path) -> None:
        """A task on the file `shard` begins now in the worker process `pid`, which waits for this.

        What a worker does between two tasks counts for the later one.

        Raises MonitorError if bpftrace has ended or does not answer.
        """
        with self._changed:
            self._seen.setdefault(pid, _Seen(self._lost)).shard = shard.resolve()
        self._ask(pid)
        with self._changed:
            self._seen[pid].used = 0

    def end(self, pid: int) -> Watched:
        """The task of the worker process `pid`, which may be dead, has ended: return what it did.

        Raises MonitorError if not all of it was seen.
        """
        self._ask(pid)
        with self._changed:
            seen = self._seen[pid]
            self._seen[pid] = _Seen(self._lost)
            if seen.lost != self._lost:
                raise MonitorError("bpftrace lost some of what was seen")
        if seen.unseen:
            raise MonitorError("the task used an io_uring, which cannot be seen")
        return Watched(seen.used / 1e9, few(list(_flags(pid, seen))))

    def _begin_all(self, allowed: Iterable[Path]) -> None:
        self._ask(0, seconds=0.05)  # it answers when all of the script runs
        self._ask(_LEARN)
        for path in _with_mounts([*allowed, sys.prefix, sys.base_prefix, Path(__file__).resolve().parent, *_SYSTEM]):
            with suppress(OSError):  # this machine does not have it
                self._held.append(os.open(path, os.O_PATH))
        self._ask(0)

    def _ask(self, pid: int, seconds: float = 1.0) -> None:
        """Send a request; wait for its answer, and for all lines from before, or until it is clear that some are lost.

        The answer may be lost, too: the request is sent again after `seconds`.
        """
        with self._changed:
            missing, deadline = 0, time.monotonic() + _TIMEOUT
            while True:
                number = next(self._numbers)
                with suppress(OSError):  # the kernel knows no such request
                    os.getpriority(number, pid)
                self._changed.wait_for(partial(self._complete, number), seconds)
                if self._ended or (self._answered != number and time.monotonic() > deadline):
                    raise MonitorError(self._said())
                if self._complete(number):
                    return
                if self._answered == number and self._printed is not None:
                    before, missing = missing, self._printed - self._lines
                    if missing == before:  # none of them has come since
                        self._lost += 1
                        self._lines = self._printed
                        return

    def _complete(self, number: int) -> bool:
        all_there = self._printed is not None and self._lines >= self._printed
        return self._ended or (self._answered == number and all_there)

    def _said(self) -> str:
        """Return bpftrace's last error."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        errors = [line for line in lines if "ERROR" in line and "RLIMIT" not in line]  # that one it only says
        return f"bpftrace {'ended' if self._ended else 'does not answer'}" + "".join(
            f": {_plain(each)}" for each in errors[-1:]
        )

    def _read(self, lines: IO[bytes]) -> None:
        with lines:
            for line in lines:
                with self._changed:
                    try:
                        self._take(json.loads(line.decode(errors="replace"), strict=False))
                    except (ValueError, KeyError, TypeError):  # it is cut off
                        self._lost += 1
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "printf":
            self._lines += 1
            kind, number, *rest = _text(message["data"]).removesuffix("\n").split(" ", 2)
            if kind == "answer":
                self._answered, self._printed = int(number), None
            elif (seen := self._seen.get(int(number))) is not None:
                self._note(seen, kind, "".join(rest))
        elif message["type"] == "map":
            self._printed = int(message["data"]["@lines"])
        elif message["type"] == "lost_events":
            self._lost += 1

    def _note(self, seen: _Seen, kind: str, rest: str) -> None:
        if kind == "used":
            seen.used += int(rest)
        elif kind == "name":
            thread, _, name = rest.partition(" ")
            seen.names.setdefault(thread, []).append(name)
        elif kind == "opened":
            thread, device = rest.split()
            seen.opened.setdefault(_paths(device, seen.names.pop(thread, [])))
        elif kind == "started":
            seen.programs.setdefault(rest)
        elif kind == "sent":
            seen.sent += int(rest)
        elif kind == "forked":
            seen.forked = True
        elif kind == "unseen":
            seen.unseen = True


def _program() -> str:
    """Return the path of bpftrace. Raises MonitorError if it cannot do its work here."""
    if sys.platform != "linux":
        raise MonitorError("it needs Linux")
    if os.geteuid() != 0:
        raise MonitorError("it needs root")
    status = Path("/proc/self/status").read_text()
    (effective,) = re.findall(r"^CapEff:\s*(\w+)", status, re.MULTILINE)
    held = {bit for bit in (_ADMIN, _PERFMON, _BPF) if int(effective, 16) >> bit & 1}
    if _ADMIN not in held and held != {_PERFMON, _BPF}:
        raise MonitorError("it needs the capability CAP_SYS_ADMIN, or CAP_BPF and CAP_PERFMON")
    if os.stat("/proc/self/ns/pid").st_ino != _OWN_PID_NAMESPACE:  # noqa: PTH116 - of what it links to
        raise MonitorError("this is a container with process ids of its own")
    if not _BTF.exists():
        raise MonitorError(f"the kernel has no BTF: {_BTF} does not exist")
    if not (mounted := [Path(each) for each in _TRACING if Path(each, "events").is_dir()]):
        raise MonitorError("tracefs is not mounted: mount -t tracefs nodev /sys/kernel/tracing")
    if not (mounted[0] / "events/sock/sock_send_length").exists():
        raise MonitorError("the kernel is too old: it must be version 6.3 or newer")
    if (program := shutil.which("bpftrace")) is None:
        raise MonitorError("bpftrace is not installed")
    return program


def _flags(pid: int, seen: _Seen) -> Iterable[str]:
    files: list[str] = []
    for paths in seen.opened:
        if str(seen.shard) in paths:
            continue
        if seen.shard is not None and any(Path(path).parent == seen.shard.parent for path in paths):
            files.append("opened-other-shard " + Path(paths[0]).name)
        elif not any(_is_usual(pid, path) for path in paths):
            files.append("opened-file " + paths[0])
    if seen.sent:
        yield f"sent-bytes {seen.sent}"
    if seen.forked:
        yield "forked"
    yield from (_plain("started-program " + program) for program in seen.programs)
    yield from map(_plain, files)


def _text(printed: str) -> str:
    r"""Return what was printed: bpftrace 0.17 writes the byte 0xc3 as \uffffffc3, not as JSON has it."""
    if "\uffff" not in printed:
        return printed
    return (
        re.sub("\uffffff(..)", lambda code: chr(int(code[1], 16)), printed).encode("latin-1").decode(errors="replace")
    )


def _plain(text: str) -> str:
    """Return a name, which a task may have chosen, without line breaks and the like."""
    return "".join(each if each.isprintable() else "�" for each in text)


def _is_usual(pid: int, path: str) -> bool:
    """Tell whether a task opens such files to train: what it imports, and what the system says of it."""
    if path.startswith((f"/proc/{pid}/", "/sys/devices/system/")):
        return True
    return _MODULE.search(path) is not None and any(
        Path(path).is_relative_to(Path(folder or ".").resolve()) for folder in sys.path
    )


class _Mount(NamedTuple):
    device: str  # of its file system: major:minor
    root: str  # the folder of the file system that is mounted
    point: str  # where


def _mounts() -> list[_Mount]:
    """Return all mounts. Format: proc_pid_mountinfo(5)."""
    lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    parts = [[re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), part) for part in line.split()] for line in lines]
    return [_Mount(each[2], each[3], each[4]) for each in parts]


def _with_mounts(paths: Sequence[str | Path]) -> list[Path]:
    """Return the paths, and the places inside them at which other file systems are mounted."""
    folders = [Path(path).resolve() for path in paths]
    inside = [Path(each.point) for each in _mounts()]
    return folders + [point for point in inside if any(point.is_relative_to(folder) for folder in folders)]


def _paths(device: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return a file's path at each place at which its file system is mounted; names are from the file upwards."""
    inside = Path("/", *reversed(names))
    found = [
        str(Path(mount.point) / inside.relative_to(mount.root))
        for mount in _mounts()
        if mount.device == device and inside.is_relative_to(mount.root)
    ]
    return tuple(found) or (f"{device}{inside}",)
