"""What work costs this machine: seconds, CPU seconds, and joules where the machine has a meter of energy.

Such a meter counts all that its processor or GPU does meanwhile, whoever asked for it. Memory, disks and the power
supply are not in it.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import NamedTuple, Self

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows RAPL, the meters of Intel's and AMD's processors."""
NVML = "libnvidia-ml.so.1"
"""The library of NVIDIA's driver, which reads the meters of its GPUs (from Volta on)."""

_NAME_BYTES = 96  # nvml.h: NVML_DEVICE_NAME_V2_BUFFER_SIZE
_PAUSE = 20.0  # seconds between two readings: a processor's meter turns over in minutes


@dataclass(frozen=True)
class EnergyMeter:
    """A counter of joules. At `turns_at` joules it begins again at 0. `read` raises OSError if it cannot be read."""

    name: str
    read: Callable[[], float]
    turns_at: float


class EnergyMeters(NamedTuple):
    """The meters of a machine that can be read, and if there are none, why."""

    meters: Sequence[EnergyMeter]
    why_none: str


@cache
def energy_meters(powercap: Path = POWERCAP, library: str = NVML) -> EnergyMeters:
    """Return this machine's meters."""
    meters: list[EnergyMeter] = []
    why_none = "no meter: neither RAPL nor NVML is here"
    for meter in (*_rapl(powercap), *_nvml(library)):
        try:
            meter.read()
        except PermissionError:
            why_none = f"no meter: {meter.name} needs root"
        except OSError as error:
            why_none = f"no meter: {meter.name}: {error.strerror}"
        else:
            meters.append(meter)
    return EnergyMeters(meters, "" if meters else why_none)


def _rapl(powercap: Path) -> Iterator[EnergyMeter]:
    """Yield a meter for each processor package, see Linux' Documentation/power/powercap/powercap.rst.

    The other zones are parts of packages, or count packages a second time.
    """
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            turns_at = int((zone / "max_energy_range_uj").read_text()) / 1e6
        except (OSError, ValueError):
            continue
        if name.startswith("package"):
            yield EnergyMeter(f"RAPL {name}", partial(_joules, zone / "energy_uj"), turns_at)


def _joules(microjoules: Path) -> float:
    return int(microjoules.read_text()) / 1e6


def _nvml(library: str) -> Iterator[EnergyMeter]:
    """Yield a meter for each GPU (nvml.h)."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return
    for number in range(count.value):
        device, name = ctypes.c_void_p(), ctypes.create_string_buffer(_NAME_BYTES)
        if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(device)):
            continue
        nvml.nvmlDeviceGetName(device, name, ctypes.c_uint(_NAME_BYTES))

        def read(device: ctypes.c_void_p = device) -> float:
            millijoules = ctypes.c_ulonglong()
            if code := nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)):
                raise OSError(code, f"NVML's error {code}")
            return millijoules.value / 1e3

        yield EnergyMeter(f"NVML GPU {number} {name.value.decode(errors='replace')}", read, 2**64 / 1e3)


class Spending:
    """What the code inside costs. Use it as a context manager, and read its fields at the end."""

    def __init__(self, meters: Sequence[EnergyMeter] | None = None) -> None:
        """Count with these meters; by default with all of this machine."""
        self.seconds = 0.0
        """How long it took."""
        self.cpu_seconds = 0.0
        """CPU seconds of this process, without other processes that it started."""
        self.joules: dict[str, float] = {}
        """What each meter counted, by its name. A meter that failed meanwhile is left out."""
        self._meters = energy_meters().meters if meters is None else meters
        self._before: dict[str, float] = {}
        self._ended = Event()
        self._reader = Thread(target=self._read_often, daemon=True)

    def __enter__(self) -> Self:
        self._seconds, self._cpu_seconds = time.perf_counter(), time.process_time()
        self._read()
        if self._meters:
            self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        if self._meters:
            self._reader.join()
        self._read()
        self.joules = {name: joules for name, joules in self.joules.items() if math.isfinite(joules)}
        self.seconds = time.perf_counter() - self._seconds
        self.cpu_seconds = time.process_time() - self._cpu_seconds

    def _read_often(self) -> None:
        """Read so often that no meter turns over twice between two readings."""
        while not self._ended.wait(_PAUSE):
            self._read()

    def _read(self) -> None:
        for meter in self._meters:
            try:
                now = meter.read()
            except OSError:
                now = math.nan  # so is every sum with it
            used = (now - self._before.get(meter.name, now)) % meter.turns_at
            self.joules[meter.name] = self.joules.get(meter.name, 0.0) + used
            self._before[meter.name] = now
