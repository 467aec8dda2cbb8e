"""What a task cost, by the operating system, and what cannot be."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from traincert.trainer.examples import Examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.resources import (
    MOST_FLOPS,
    Meter,
    Resources,
    cgroup_cpu_file,
    few,
    impossible,
    measure_peak_flops,
)
from traincert.trainer.segments import Segment, count_task_flops, cut_segments

USED = Resources(
    user_seconds=0.9,
    system_seconds=0.1,
    page_faults=10,
    context_switches=3,
    peak_memory=10**8,
    read_bytes=0,
    written_bytes=4096,
    cgroup_seconds=None,
    peak_flops=1e11,
)

WORK = """
import sys, time
sys.stdin.readline()
held = bytearray(b"1") * 50_000_000
end = time.process_time() + 0.3
while time.process_time() < end:
    pass
with open(sys.argv[1], "wb", buffering=0) as file:
    file.write(held[:8_000_000])
del held
print("done", flush=True)
sys.stdin.readline()
"""


def measured(tmp_path: Path) -> Resources:
    """What a process used that spins for 0.3 s, holds 50 MB and writes 8 MB."""
    command = [sys.executable, "-c", WORK, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        meter = Meter(process.pid)
        meter.begin()
        print(file=process.stdin, flush=True)
        process.stdout.readline()
        found = meter.end(1e9)
        process.communicate("\n")
    assert found
    assert meter.end(1e9) is None  # the process has ended
    return found


def test_a_process_is_measured_from_outside(tmp_path: Path) -> None:
    found = measured(tmp_path)
    assert 0.3 <= found.cpu_seconds < 3
    assert 0 <= found.system_seconds <= found.cpu_seconds
    assert found.page_faults > 50_000_000 // 65536
    assert found.context_switches >= 1
    assert found.peak_memory
    assert 50_000_000 < found.peak_memory < 500_000_000
    assert found.written_bytes is None or found.written_bytes >= 8_000_000
    assert found.flags is None
    assert found.peak_flops == 1e9


def test_the_peak_of_memory_is_the_tasks_own() -> None:
    meter = Meter(os.getpid())
    held = torch.ones(50_000_000)
    del held
    meter.begin()
    found = meter.end(None)
    meter.begin()
    held = torch.ones(50_000_000)
    del held
    more = meter.end(None)
    assert found
    assert more
    assert found.peak_memory is not None
    assert more.peak_memory is not None
    assert more.peak_memory - found.peak_memory > 150_000_000


def test_a_thread_that_ends_takes_nothing_away() -> None:
    waits = threading.Event()

    def sleep() -> None:
        for _ in range(300):
            time.sleep(0.0001)
        waits.set()
        ends.wait()

    ends = threading.Event()
    thread = threading.Thread(target=sleep)
    thread.start()
    waits.wait()
    meter = Meter(os.getpid())
    meter.begin()
    ends.set()
    thread.join()
    found = meter.end(None)
    assert found
    assert found.context_switches >= 0


def test_a_thread_may_end_while_threads_are_counted() -> None:
    code = "import threading\nwhile True:\n    threading.Thread(target=int).start()"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            meter = Meter(process.pid)
            counts = [meter._counts() for _ in range(500)]
        finally:
            process.kill()
    assert None not in counts


def test_a_process_that_ends_while_it_is_measured_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a zombie then: some of its counts can still be read."""
    process = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
    meter = Meter(process.pid)
    meter.begin()
    counts = meter._counts()
    monkeypatch.setattr(meter, "_counts", lambda: counts)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert meter.end(None) is None
    process.communicate()


def test_flags_that_are_too_many_are_counted() -> None:
    assert few(["x" * 300, "y"]) == ("x" * 200, "y")
    assert few(list(map(str, range(20)))) == tuple(map(str, range(20)))
    assert few(list(map(str, range(50)))) == (*map(str, range(19)), "and 31 more")


def test_what_the_kernel_does_not_say_is_none() -> None:
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    meter = Meter(process.pid)
    meter.begin()
    assert meter.end(1e9) is None


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A folder like a process's in /proc."""
    folder = tmp_path / "proc"
    folder.mkdir()
    return folder


V2 = "30 23 0:26 {root} {at} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
V1 = "31 23 0:27 {root} {at} rw,nosuid shared:9 - cgroup cgroup rw,{controllers}\n"


def test_the_cpu_time_of_a_cgroup_v2_is_found(proc: Path, tmp_path: Path) -> None:
    own = tmp_path / "v2/miners/a"
    own.mkdir(parents=True)
    (own / "cpu.stat").write_text("usage_usec 5\n")
    (proc / "cgroup").write_text("0::/miners/a\n")
    (proc / "mountinfo").write_text(V2.format(root="/", at=tmp_path / "v2"))
    assert cgroup_cpu_file(proc) == own / "cpu.stat"


def test_the_root_of_cgroup_v2_is_no_group_but_a_containers_is(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "v2"
    root.mkdir()
    (root / "cpu.stat").write_text("usage_usec 5\n")
    (proc / "cgroup").write_text("0::/\n")
    (proc / "mountinfo").write_text(V2.format(root="/", at=root))
    assert cgroup_cpu_file(proc) is None
    (root / "cgroup.type").write_text("domain\n")  # only the true root lacks it
    assert cgroup_cpu_file(proc) == root / "cpu.stat"


def test_the_cpu_time_of_a_cgroup_v1_is_found_also_in_a_container(proc: Path, tmp_path: Path) -> None:
    at = tmp_path / "cpuacct"
    at.mkdir()
    (at / "cpuacct.usage").write_text("5\n")
    (proc / "cgroup").write_text("5:memory:/docker/ab\n3:cpu,cpuacct:/docker/ab\n0::/\n")
    (proc / "mountinfo").write_text(
        V1.format(root="/", at=tmp_path / "memory", controllers="memory")
        + V1.format(root="/docker/ab", at=at, controllers="cpu,cpuacct")
    )
    assert cgroup_cpu_file(proc) == at / "cpuacct.usage"
    (proc / "cgroup").write_text("3:cpu,cpuacct:/\n0::/\n")
    assert cgroup_cpu_file(proc) is None


def test_without_cgroups_there_is_no_file(proc: Path) -> None:
    assert cgroup_cpu_file(proc) is None
    (proc / "cgroup").write_text("")
    (proc / "mountinfo").write_text("22 27 0:21 / /proc rw,relatime - proc proc rw\n")
    assert cgroup_cpu_file(proc) is None


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_a_cgroups_cpu_time_counts_what_others_in_it_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name, text = ("cpuacct.usage", "{}000\n") if kind == "v1" else ("cpu.stat", "usage_usec {}\nuser_usec 1\n")
    path = tmp_path / name
    path.write_text(text.format(1_000_000))
    monkeypatch.setattr("traincert.trainer.resources.cgroup_cpu_file", lambda _proc: path)
    meter = Meter(os.getpid())
    meter.begin()
    path.write_text(text.format(3_500_000))
    found = meter.end(None)
    assert found
    assert found.cgroup_seconds == 2.5


def test_a_matrix_product_gives_a_plausible_speed() -> None:
    assert 1e8 < measure_peak_flops() < MOST_FLOPS


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (USED, ""),
        (None, ""),
        (replace(USED, peak_flops=None), ""),
        (replace(USED, user_seconds=0.0, system_seconds=0.03), ""),
        (
            replace(USED, user_seconds=0.001, system_seconds=0.0),
            "1e+10 floating-point operations in 0.001 CPU seconds, by a machine that does 1e+11 a second",
        ),
        (replace(USED, user_seconds=0.0, system_seconds=0.0), "in 0 CPU seconds"),
        (replace(USED, peak_flops=1e15), "1e+15 floating-point operations a CPU second are more than any processor"),
        (replace(USED, peak_flops=0.0), "by a machine that does 0 a second"),
    ],
)
def test_what_cannot_be_is_found(found: Resources | None, why: str) -> None:
    assert why in impossible(10**10, found)
    assert bool(impossible(10**10, found)) == bool(why)


@pytest.mark.parametrize(
    "change",
    [
        {"user_seconds": -1.0},
        {"system_seconds": float("nan")},
        {"peak_flops": float("inf")},
        {"page_faults": 2**63},
        {"peak_memory": -1},
        {"flags": ("x",) * 21},
        {"flags": ("x" * 201,)},
        {"flags": ("\x1b[31m",)},
        {"flags": ("forked\u202e",)},
    ],
)
def test_numbers_that_nobody_measures_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))}"):
        Resources(**{**asdict(USED), **change})


def flops(job: TrainingJob, examples: int = 100) -> list[int]:
    shard = Examples((torch.zeros(examples, 6),), torch.zeros(examples, dtype=torch.int64))
    segments = cut_segments(build_model(job), job, shard)
    return list(count_task_flops(build_model(job), job, segments, shard, examples))


def test_operations_of_a_task_are_counted_by_hand(job: TrainingJob) -> None:
    """Forward 2 x 6 x 5 + 2 x 5 x 3 an example; backward the weights' gradients, and the hidden layer's."""
    options = {"inputs": 6, "hidden": [5], "classes": 3}
    job = replace(job, model_options=options, segments=1, batch_size=10, local_steps=4)
    forward, weights, hidden = 60 + 30, 60 + 30, 30
    assert flops(job) == [4 * 10 * (forward + weights + hidden)]
    assert flops(job, examples=7) == [4 * 7 * (forward + weights + hidden)]
    assert flops(job, examples=1) == [4 * (forward + weights + hidden)]
    last = flops(replace(job, segments=2, balance="flops"))[1]
    assert last == 4 * 10 * (forward + 30 + hidden)  # from the first layer's bias on: not the first layer's weights
    assert flops(replace(job, device="cuda")) == [0]
    assert flops(replace(job, privacy="dp-sgd", noise_multiplier=1.0, max_grad_norm=1.0, shard_examples=0)) == [0]


def test_what_does_not_depend_on_the_batch_is_counted_once(job: TrainingJob) -> None:
    class Product(nn.Module):
        """The weight is a product of two matrices."""

        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.ones(3, 20)), nn.Parameter(torch.ones(20, 6))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs @ (self.left @ self.right).T

    job = replace(job, batch_size=50, local_steps=1)
    shard = Examples((torch.ones(60, 6),), torch.zeros(60, dtype=torch.int64))
    model = Product()
    with FlopCounterMode(display=False) as counter:
        inputs, target = shard.batch(slice(0, 50))
        nn.functional.cross_entropy(model(*inputs), target).backward()  # type: ignore[no-untyped-call]
    found = count_task_flops(model, job, [Segment(0, 180)], shard, 60)
    assert found == (counter.get_total_flops(),)


def test_time_of_the_cpu_clock_is_that_of_the_process() -> None:
    """From outside it is the same clock that the process reads itself."""
    meter = Meter(os.getpid())
    begin = time.process_time()
    meter.begin()
    sum(range(2_000_000))
    found = meter.end(None)
    assert found
    assert 0 < found.cpu_seconds <= time.process_time() - begin
