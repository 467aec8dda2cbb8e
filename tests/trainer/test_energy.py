"""Meters of energy, of a pretended machine, and what work costs by them."""

import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from traincert.trainer.energy import EnergyMeter, Spending, energy_meters

NO_LIBRARY = "libtraincert-is-not-there.so.1"
NOBODY = 65534


@pytest.fixture
def powercap() -> Iterator[Path]:
    """A folder like Linux' /sys/class/powercap, that everybody may read."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for zone, what, joules in (
            ("intel-rapl:0", "package-0", 100),
            ("intel-rapl:0:0", "core", 60),
            ("intel-rapl:0:1", "dram", 5),
            ("intel-rapl:1", "package-1", 200),
            ("intel-rapl:2", "psys", 400),
        ):
            (folder / zone).mkdir()
            (folder / zone / "name").write_text(f"{what}\n")
            (folder / zone / "max_energy_range_uj").write_text("1000000000\n")
            (folder / zone / "energy_uj").write_text(f"{joules * 10**6}\n")
        (folder / "intel-rapl").mkdir()
        yield folder


def add(powercap: Path, package: int, joules: int) -> None:
    """Let a package use energy. Its meter turns over at 1000 joules."""
    file = powercap / f"intel-rapl:{package}" / "energy_uj"
    file.write_text(f"{(int(file.read_text()) + joules * 10**6) % 10**9}\n")


def test_rapl_has_a_meter_for_each_package_and_no_part_is_counted_twice(powercap: Path) -> None:
    found = energy_meters(powercap, NO_LIBRARY)
    assert [(each.name, each.read(), each.turns_at) for each in found.meters] == [
        ("RAPL package-0", 100.0, 1000.0),
        ("RAPL package-1", 200.0, 1000.0),
    ]
    assert found.why_none == ""


def test_joules_are_counted_also_when_a_meter_turns_over(powercap: Path) -> None:
    with Spending(energy_meters(powercap, NO_LIBRARY).meters) as spending:
        add(powercap, 0, 950)
        add(powercap, 1, 30)
    assert spending.joules == pytest.approx({"RAPL package-0": 950, "RAPL package-1": 30})


def test_a_meter_is_read_so_often_that_it_may_turn_over_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traincert.trainer.energy._PAUSE", 0.001)
    readings: list[int] = []

    def read() -> float:
        readings.append(60 * len(readings))
        return readings[-1] % 100

    with Spending([EnergyMeter("fast", read, 100)]) as spending:
        while len(readings) < 50:  # another thread reads
            time.sleep(0.001)
    assert spending.joules == {"fast": readings[-1]}


def test_rapl_that_only_root_may_read_is_no_meter(powercap: Path) -> None:
    for file in powercap.glob("*/energy_uj"):
        file.chmod(0)
    us = os.geteuid()
    if us == 0:  # who may read everything
        os.seteuid(NOBODY)
    try:
        found = energy_meters(powercap, NO_LIBRARY)
    finally:
        os.seteuid(us)
    assert found == ([], "no meter: RAPL package-1 needs root")


def test_without_any_meter_it_is_said_and_nothing_is_invented(tmp_path: Path) -> None:
    found = energy_meters(tmp_path, NO_LIBRARY)
    assert found.why_none == "no meter: neither RAPL nor NVML is here"
    with Spending(found.meters) as spending:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
    assert spending.joules == {}
    assert 0.2 <= spending.cpu_seconds <= spending.seconds + 5
    assert spending.seconds > 0


def test_a_meter_that_cannot_be_read_is_none(powercap: Path) -> None:
    for package in (0, 1):
        file = powercap / f"intel-rapl:{package}" / "energy_uj"
        file.unlink()
        file.mkdir()
    assert energy_meters(powercap, NO_LIBRARY) == ([], "no meter: RAPL package-1: Is a directory")


def test_a_meter_that_fails_meanwhile_is_left_out(powercap: Path) -> None:
    with Spending(energy_meters(powercap, NO_LIBRARY).meters) as spending:
        add(powercap, 1, 7)
        (powercap / "intel-rapl:0/energy_uj").unlink()
    assert spending.joules == pytest.approx({"RAPL package-1": 7})
    assert all(map(math.isfinite, spending.joules.values()))


FAKE_NVML = """
    #include <string.h>
    struct device { int number; unsigned long long used; } devices[2] = {{0, 5000}, {1, 0}};
    int nvmlInit_v2(void) { return INIT; }
    int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
    int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **device) { *device = devices + index; return 0; }
    int nvmlDeviceGetName(struct device *device, char *name, unsigned length) {
        strncpy(name, device->number ? "old" : "new", length); return 0; }
    int nvmlDeviceGetTotalEnergyConsumption(struct device *device, unsigned long long *millijoules) {
        if (device->number) return 3;  /* NVML_ERROR_NOT_SUPPORTED */
        *millijoules = device->used += 2500; return 0; }
"""


def build(folder: Path, init: int) -> str:
    """Build a library with the functions of nvml.h, for two GPUs of which one has no meter. Return its path."""
    source, library = folder / "nvml.c", folder / "libnvml.so"
    source.write_text(dedent(FAKE_NVML))
    subprocess.run(
        [shutil.which("cc") or "cc", "-shared", "-fPIC", f"-DINIT={init}", "-o", str(library), str(source)], check=True
    )
    return str(library)


def test_nvml_has_a_meter_for_each_gpu_that_can_be_read(tmp_path: Path) -> None:
    found = energy_meters(tmp_path, build(tmp_path, init=0))
    assert [each.name for each in found.meters] == ["NVML GPU 0 new"]
    with Spending(found.meters) as spending:
        pass
    assert spending.joules == {"NVML GPU 0 new": 2.5}


def test_nvml_without_a_driver_is_no_meter(tmp_path: Path) -> None:
    assert energy_meters(tmp_path, build(tmp_path, init=9)).meters == []
