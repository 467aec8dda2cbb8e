"""What a task cost, as the operating system counts it from outside the task's process; and what cannot be.

These figures never enter a weight: a miner's own kernel proves nothing to others.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

MOST_FLOPS = 4e12
"""More floating-point operations a second than any processor core does in float32."""

_WINOGRAD = 4.0
"""A convolution needs up to so many times fewer operations than are counted (Lavin and Gray, arXiv 1509.09308)."""
_CPU_CLOCK = 2  # of all threads of a process, user and system (Linux: posix-timers.h, CPUCLOCK_SCHED)
_MOST_FLAGS = 20
_LONGEST_FLAG = 200


@dataclass(frozen=True)
class Resources:
    """What a task used. None stands for what could not be measured there."""

    user_seconds: float
    """CPU seconds of the task's process outside the kernel."""
    system_seconds: float
    """CPU seconds of the task's process in the kernel."""
    page_faults: int
    context_switches: int
    peak_memory: int | None
    """The most resident memory, bytes."""
    read_bytes: int | None
    """What was fetched from storage."""
    written_bytes: int | None
    """What was sent to storage."""
    cgroup_seconds: float | None
    """CPU seconds of all processes of the cgroup, for example the container, in the same time."""
    peak_flops: float | None
    """Floating-point operations that the machine does in one CPU second, measured by multiplying matrices."""
    tree_seconds: float | None = None
    """CPU seconds of the task's process and all that it started. None: it was not monitored, see monitoring.py."""
    flags: tuple[str, ...] | None = None
    """What the task did beside training. None: it was not monitored."""

    def __post_init__(self) -> None:
        """Raise ValueError for a number that nobody measures, and for flags that are too many or too long."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float | int) and not 0 <= value < 2**63:
                raise ValueError(f"{each.name} = {value}: must be from 0 to 2^63")
        if self.flags and (len(self.flags) > _MOST_FLAGS or max(map(len, self.flags)) > _LONGEST_FLAG):
            raise ValueError(f"flags: must be up to {_MOST_FLAGS}, of up to {_LONGEST_FLAG} characters each")
        if not all(map(str.isprintable, self.flags or ())):
            raise ValueError("flags: must be printable")

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of the task's process."""
        return self.user_seconds + self.system_seconds


def few(flags: Sequence[str]) -> tuple[str, ...]:
    """Return flags as Resources can have them: not too many, and none too long."""
    more = len(flags) - _MOST_FLAGS
    kept = flags if more <= 0 else [*flags[: _MOST_FLAGS - 1], f"and {more + 1} more"]
    return tuple(flag[:_LONGEST_FLAG] for flag in kept)


def impossible(flops: int, found: Resources | None) -> str:
    """Return why a task that needs so many floating-point operations cannot have used what it says, or "".

    Nothing is impossible of a task whose resources, or whose machine's speed, were not measured.
    """
    if found is None or found.peak_flops is None:
        return ""
    if found.peak_flops > MOST_FLOPS:
        return f"{found.peak_flops:.3g} floating-point operations a CPU second are more than any processor does"
    if flops > _WINOGRAD * found.peak_flops * found.cpu_seconds:
        return (
            f"{flops:.3g} floating-point operations in {found.cpu_seconds:.3g} CPU seconds, "
            f"by a machine that does {found.peak_flops:.3g} a second"
        )
    return ""


class _Counts(NamedTuple):
    """What the kernel has counted of a process so far."""

    cpu: float
    system: float
    page_faults: int
    context_switches: int
    read_bytes: int | None
    written_bytes: int | None
    cgroup: float | None


class Meter:
    """Measures what a process uses between `begin` and `end`. It reads /proc, so it needs Linux."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._proc = Path("/proc") / str(pid)
        self._cgroup = cgroup_cpu_file(self._proc)
        self._before: _Counts | None = None
        self._peak_known = False

    def begin(self) -> None:
        """Note what has been counted so far. If the kernel does not say it, `end` returns None."""
        self._peak_known = False
        with contextlib.suppress(OSError):  # without this right, the peak is of the process's whole life
            (self._proc / "clear_refs").write_text("5")  # resets VmHWM (Linux: Documentation/filesystems/proc.rst)
            self._peak_known = True
        self._before = self._counts()

    def end(self, peak_flops: float | None) -> Resources | None:
        """Return what the process used since `begin`; None if the kernel does not say it, or the process has ended.

        `peak_flops` is the machine's, as in Resources.
        """
        before, after = self._before, self._counts()
        if before is None or after is None:
            return None
        try:
            peak = _field(self._proc / "status", "VmHWM") * 1024 if self._peak_known else None
        except OSError:  # it has ended just now
            return None

        def used(old: int | None, new: int | None) -> int | None:
            return None if old is None or new is None else new - old

        cpu = after.cpu - before.cpu
        # The kernel counts the system's part in hundredths of a second, all of it exactly.
        system = min(cpu, after.system - before.system)
        cgroup = after.cgroup - before.cgroup if before.cgroup is not None and after.cgroup is not None else None
        return Resources(
            user_seconds=cpu - system,
            system_seconds=system,
            page_faults=after.page_faults - before.page_faults,
            context_switches=max(0, after.context_switches - before.context_switches),  # threads may have ended
            peak_memory=peak,
            read_bytes=used(before.read_bytes, after.read_bytes),
            written_bytes=used(before.written_bytes, after.written_bytes),
            cgroup_seconds=cgroup,
            peak_flops=peak_flops,
        )

    def _counts(self) -> _Counts | None:
        try:
            cpu = time.clock_gettime((~self.pid << 3) | _CPU_CLOCK)
            stat = (self._proc / "stat").read_text().rpartition(")")[2].split()
            minor, minor_children, major, major_children, _, system, user_children, system_children = map(
                int, stat[7:15]
            )
            switches = sum(map(_switches, (self._proc / "task").iterdir()))
        except OSError:
            return None
        read = written = None
        with contextlib.suppress(OSError):  # some containers do not allow it
            read, written = (_field(self._proc / "io", name) for name in ("read_bytes", "write_bytes"))
        return _Counts(
            cpu + (user_children + system_children) / _TICKS,
            (system + system_children) / _TICKS,
            minor + minor_children + major + major_children,
            switches,
            read,
            written,
            _read_cgroup(self._cgroup),
        )


_TICKS = 100
"""Of /proc, in a second (Linux: USER_HZ)."""


def _field(path: Path, name: str) -> int:
    """Return a number of a file of lines "name: number". Raises OSError if there is none."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0])
    raise OSError(f"{path} has no {name}")


def _switches(thread: Path) -> int:
    """Return how often a thread has waited, or let others run; 0 if it has ended just now."""
    try:
        kinds = ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
        return sum(_field(thread / "status", kind) for kind in kinds)
    except OSError:
        return 0


def cgroup_cpu_file(proc: Path) -> Path | None:
    """Return the file that counts the CPU time of a process's cgroup; None if it is in none but the root.

    `proc` is the process's folder in /proc. The file is cgroup v1's cpuacct.usage or v2's cpu.stat.
    """
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split(" - ") for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, group in groups:
        kind, name = ("cgroup", "cpuacct.usage") if "cpuacct" in controllers.split(",") else ("cgroup2", "cpu.stat")
        if controllers and kind == "cgroup2":
            continue
        for mount, source in mounts:
            root, folder = mount.split()[3:5]
            if source.split()[0] != kind or (kind == "cgroup" and "cpuacct" not in source.split()[2].split(",")):
                continue
            # In a container the mount shows its own group only, as `root`.
            inside = Path(folder, group.removeprefix(root).lstrip("/"))
            if (group != "/" or (inside / "cgroup.type").exists()) and (inside / name).exists():
                return inside / name
    return None


def _read_cgroup(path: Path | None) -> float | None:
    """Return the CPU seconds that a file of `cgroup_cpu_file` counts."""
    if path is None:
        return None
    try:
        text = path.read_text().split()
    except OSError:
        return None
    if path.name == "cpuacct.usage":
        return int(text[0]) / 1e9
    return int(text[text.index("usage_usec") + 1]) / 1e6


def measure_peak_flops() -> float:
    """Return how many floating-point operations a second one thread does, float32, by multiplying matrices."""
    import torch

    size, best = 384, math.inf
    matrix = torch.ones(size, size)
    for _ in range(10):
        begin = time.thread_time()
        torch.mm(matrix, matrix)
        best = min(best, time.thread_time() - begin)
    return 2 * size**3 / best
