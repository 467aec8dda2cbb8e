"""What the kernel sees of tasks: real tasks in a real worker process, and this machine's bpftrace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest

from traincert.trainer import monitoring
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.orders import Commit, Order
from traincert.trainer.examples import Dataset
from traincert.trainer.job import TrainingJob
from traincert.trainer.monitoring import Monitor, MonitorError, Watched
from traincert.trainer.state import initial_state, save_state
from traincert.trainer.tasks import Task

TIMEOUT = 60  # seconds

# A loss that does once what its marker file says. The marker's name is one that may be opened.
DEEDS = """
    import os, socket, subprocess, threading, time
    from pathlib import Path
    import torch
    from torch.nn.functional import cross_entropy

    MARKER = Path(__file__).with_name("marker.py")

    def loss(outputs, target):
        if torch.is_grad_enabled() and MARKER.exists():
            deed = MARKER.read_text()
            MARKER.unlink()
            exec(deed, globals())
        return cross_entropy(outputs, target)
"""

# One that opens a file at each step, and a job with it.
CURIOUS = """
from torch.nn.functional import cross_entropy

def loss(outputs, target):
    open({letter!r}).close()
    return cross_entropy(outputs, target)
"""
RUN = """
cycles = 1
dataset = "traincert.trainer.datasets:digits"
validation_examples = 100
test_examples = 100
shards = 2
model = "traincert.trainer.models:mlp"
model_options = { inputs = 64, hidden = [], classes = 10 }
loss = "curious:loss"
learning_rate = 0.001
batch_size = 32
local_steps = 2
"""


class Place:
    """An engine with one worker, whose tasks do what they are told."""

    def __init__(self, engine: LocalEngine, dataset: Dataset, marker: Path) -> None:
        self.engine, self.dataset, self.marker = engine, dataset, marker
        self.model = save_state(engine.store, initial_state(engine.job))
        self.train()  # then the worker has started

    def shard(self, number: int) -> Path:
        return self.dataset.shard_folder / self.dataset.shards[number].hex()

    def train(self, shard: int = 0) -> Commit:
        task = Task(miner=bytes(32), segment=0, shard=shard, seed=bytes(32), cycle=0)
        order = Order(task, self.model, self.dataset.shards[shard], None)
        (commit,) = self.engine.collect(self.dataset.shard_folder, [order])
        assert isinstance(commit, Commit)
        return commit

    def watched(
        self, monitor: Monitor, deed: str = "", shard: int = 0, before_end: Callable[[], None] = lambda: None
    ) -> tuple[Watched, Commit]:
        """Have a task done that does `deed`, which is Python."""
        if deed:
            self.marker.write_text(deed, encoding="utf-8")
        (pid,) = self.engine.pids
        monitor.begin(pid, self.shard(shard))
        commit = self.train(shard)
        assert not self.marker.exists()
        before_end()
        return monitor.end(pid), commit

    def flags(self, monitor: Monitor, deed: str = "", shard: int = 0) -> list[str]:
        return list(self.watched(monitor, deed, shard)[0].flags)


@pytest.fixture(scope="module")
def place(job: TrainingJob, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("deeds")
    (folder / "deeds.py").write_text(dedent(DEEDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with LocalEngine(replace(job, loss="deeds:loss"), folder / "store", workers=1) as engine:
            yield Place(engine, dataset, folder / "marker.py")


def started(place: Place) -> Monitor:
    try:
        return Monitor.start([place.engine.store])
    except MonitorError as error:
        if "TRAINCERT_REQUIRE_MONITOR" in os.environ:
            raise
        pytest.skip(f"not monitored: {error}")


@pytest.fixture(scope="module")
def monitor(place: Place) -> Iterator[Monitor]:
    monitor = started(place)
    yield monitor
    monitor.close()


@pytest.fixture
def second(place: Place) -> Iterator[Monitor]:
    """Another one, for a test that breaks it."""
    monitor = started(place)
    yield monitor
    monitor.close()


@pytest.fixture
def letter(tmp_path: Path) -> Path:
    """A file that is no task's business."""
    path = tmp_path / "letter"
    path.write_text("dear")
    return path


def test_tasks_that_only_train_have_no_flags(place: Place, monitor: Monitor) -> None:
    """On the same shard, and on another."""
    for shard in (0, 0, 1):
        watched, _ = place.watched(monitor, shard=shard)
        assert watched.flags == ()
        assert watched.cpu_seconds > 0


def test_an_opened_file_is_flagged_whatever_the_name_that_it_is_opened_by(
    place: Place, monitor: Monitor, letter: Path, tmp_path: Path
) -> None:
    (place.engine.store / "link").symlink_to(letter)
    (place.marker.parent / "link.py").symlink_to(letter)
    os.link(letter, tmp_path / "other name")
    for deed in (
        f"open({str(letter)!r}).read()",
        f"open({str(letter)!r}, 'a').close()",
        f"open({str(place.engine.store / 'link')!r}).read()",
        f"open({str(place.marker.parent / 'link.py')!r}).read()",
        f"open({f'{place.engine.store}/../../{tmp_path.name}/../{tmp_path.name}/letter'!r})",
        f"here = Path.cwd(); os.chdir({str(tmp_path)!r}); open('letter'); os.chdir(here)",
        f"os.open('letter', os.O_RDONLY, dir_fd=os.open({str(tmp_path)!r}, os.O_RDONLY))",
        f"t = threading.Thread(target=open, args=[{str(letter)!r}]); t.start(); t.join()",
    ):
        assert place.flags(monitor, deed) == [f"opened-file {letter}"], deed
    held_out = place.dataset.held_out_folder / place.dataset.validation.hex()
    for path in (str(held_out), f"/proc/{os.getpid()}/environ", f"{tmp_path}/other name"):
        assert place.flags(monitor, f"open({path!r}, 'rb').read()") == [f"opened-file {path}"]
    assert place.flags(monitor, f"for _ in range(3): open({str(letter)!r}); open('/etc/passwd')") == [
        f"opened-file {letter}",
        "opened-file /etc/passwd",
    ]


def test_names_with_any_bytes_are_printable_text(place: Place, monitor: Monitor, tmp_path: Path) -> None:
    for name, shown in {
        "a\nb\x1b ü€ \"'\\uffffffc3": "a�b� ü€ \"'\\uffffffc3",
        '0 7 sent 1 9\\n"}\n0 7 sent 1 9': '0 7 sent 1 9\\n"}�0 7 sent 1 9',
        "\udcff": "�",  # no UTF-8
        "x" * 250: "x" * 199,
    }.items():
        flag = f"opened-file {tmp_path / shown}"
        assert place.flags(monitor, f"open({f'{tmp_path}/{name}'!a}, 'w')") == [flag[:200]]


def test_many_files_are_not_all_named(place: Place, monitor: Monitor, tmp_path: Path) -> None:
    flags = place.flags(monitor, f"for number in range(40): open({str(tmp_path)!r} + f'/{{number}}', 'w')")
    assert flags == [*(f"opened-file {tmp_path}/{number}" for number in range(19)), "and 21 more"]


def test_what_is_allowed_is_not_flagged(place: Place, monitor: Monitor, tmp_path: Path) -> None:
    for deed in (
        "open('/proc/self/status'); open('/dev/null', 'w'); os.listdir('/')",
        "import colorsys, this; time.tzset(); time.localtime()",
        f"open({str(place.engine.store / 'mine')!r}, 'w')",
        f"os.path.exists({str(tmp_path)!r})\ntry: open({str(tmp_path / 'missing')!r})\nexcept OSError: pass",
        f"open({str(place.shard(0))!r}, 'rb')",
    ):
        assert place.flags(monitor, deed) == [], deed


def test_another_shard_than_the_tasks_own_is_flagged(place: Place, monitor: Monitor) -> None:
    one, two = place.shard(0), place.shard(2)
    deed = f"open({str(two)!r}, 'rb').read(); open({str(one)!r}, 'rb').read()"
    assert place.flags(monitor, deed, shard=0) == [f"opened-other-shard {two.name}"]
    assert place.flags(monitor, deed, shard=2) == [f"opened-other-shard {one.name}"]


def test_what_a_task_sends_is_counted(place: Place, monitor: Monitor) -> None:
    """In whichever way; its worker's messages to the engine are not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        connected = f"socket.create_connection({address})"
        for deed, count in {
            connected: 0,
            f"{connected}.send(b'12345')": 5,
            f"os.write({connected}.detach(), bytes(300000))": 300000,
            f"os.writev({connected}.detach(), [b'12', b'3'])": 3,
            f"{connected}.sendmsg([b'12', b'34'])": 4,
            f"{connected}.sendfile(open({str(place.shard(0))!r}, 'rb'), 0, 70000)": 70000,
            f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'1234567', {address})": 7,
            "one, two = socket.socketpair(); one.send(b'12')": 2,
            f"t = threading.Thread(target={connected}.send, args=[b'1']); t.start(); t.join()": 1,
        }.items():
            assert place.flags(monitor, deed) == ([f"sent-bytes {count}"] if count else []), deed


def test_programs_and_processes_are_flagged_and_what_they_do(place: Place, monitor: Monitor, letter: Path) -> None:
    fork = "if (child := os.fork()) == 0:\n    {}\n    os._exit(0)\nos.waitpid(child, 0)"
    for deed, flags in {
        "subprocess.run(['/bin/true'], check=True)": ["forked", "started-program /bin/true"],
        f"subprocess.run(['/bin/cat', {str(letter)!r}], stdout=-3)": [
            "forked",
            "started-program /bin/cat",
            f"opened-file {letter}",
        ],
        fork.format("pass"): ["forked"],
        fork.format(f"open({str(letter)!r})"): ["forked", f"opened-file {letter}"],
        fork.format("one, two = socket.socketpair(); one.send(b'123')"): ["sent-bytes 3", "forked"],
    }.items():
        assert place.flags(monitor, deed) == flags, deed


def test_processor_time_is_that_of_the_worker_and_its_children(place: Place, monitor: Monitor) -> None:
    burn = "end = time.process_time() + 0.5\n    while time.process_time() < end: pass"
    alone = f"if True:\n    {burn}"
    child = f"if (child := os.fork()) == 0:\n    {burn}\n    os._exit(0)\nos.waitpid(child, 0)"
    for deed in (alone, child):
        assert place.watched(monitor, deed)[0].cpu_seconds > 0.5
    assert place.watched(monitor, "time.sleep(0.6)")[0].cpu_seconds < 0.5


def test_what_a_worker_does_between_two_tasks_counts_for_the_later_one(place: Place, monitor: Monitor) -> None:
    later = "one, two = socket.socketpair(); gone = Path(MARKER.with_name('sent.py'))\n"
    later += "def send():\n    while not gone.exists(): time.sleep(0.01)\n    one.send(b'12'); gone.unlink()\n"
    sent = place.marker.with_name("sent.py")
    assert place.flags(monitor, later + "threading.Thread(target=send).start()") == []
    sent.touch()
    wait_until(lambda: not sent.exists())
    assert place.flags(monitor) == ["sent-bytes 2"]
    assert place.flags(monitor) == []


def test_a_watched_task_gives_the_same_bits(place: Place, monitor: Monitor) -> None:
    _, watched = place.watched(monitor)
    with LocalEngine(place.engine.job, place.engine.store, workers=1) as engine:
        alone = Place(engine, place.dataset, place.marker).train()
    assert alone.update_hash == watched.update_hash


def test_an_engine_notes_what_its_tasks_do(place: Place, second: Monitor, letter: Path) -> None:
    with LocalEngine(place.engine.job, place.engine.store, workers=1, monitor=second) as engine:
        own = Place(engine, place.dataset, place.marker)
        place.marker.write_text(f"open({str(letter)!r})", encoding="utf-8")
        found = [own.train().resources, own.train(1).resources]
        second._process.kill()
        found.append(own.train().resources)
    assert [each and each.flags for each in found] == [(f"opened-file {letter}",), (), None]
    assert found[1]
    assert found[1].tree_seconds
    assert found[1].tree_seconds > found[1].cpu_seconds / 2
    assert found[2]
    assert found[2].tree_seconds is None


@pytest.mark.parametrize("possible", [True, False])
def test_a_run_says_what_its_tasks_did_or_that_nobody_watched(
    monitor: Monitor, letter: Path, tmp_path: Path, possible: bool
) -> None:
    del monitor  # this machine allows it
    (tmp_path / "curious.py").write_text(CURIOUS.format(letter=str(letter)), encoding="utf-8")
    job, out = tmp_path / "job.toml", tmp_path / "run"
    job.write_text(RUN, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "traincert.bridge.cli.main",
        "job",
        "run",
        str(job),
        "--monitor",
        "--out",
        str(out),
    ]
    env = os.environ | ({} if possible else {"PATH": ""})
    answer = subprocess.run([*command, "--miners", "2"], env=env, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert f"{2 * possible} of the run's 2 tasks were monitored\n" in answer.stdout
    assert (f"2 tasks also did this: opened-file {letter}\n" in answer.stdout) == possible
    assert ("tasks are not monitored: bpftrace is not installed" in answer.stderr) != possible
    tasks = json.loads((out / "costs/00000001.json").read_text())["tasks"].values()
    assert [each["flags"] for each in tasks] == [[f"opened-file {letter}"] if possible else None] * 2


def test_a_worker_that_replaces_a_dead_one_is_watched(place: Place, monitor: Monitor, letter: Path) -> None:
    (dead,) = place.engine.pids
    monitor.begin(dead, place.shard(0))
    os.kill(dead, signal.SIGKILL)
    place.train()
    assert place.engine.pids != [dead]
    assert monitor.end(dead).flags == ()
    assert place.flags(monitor, f"open({str(letter)!r})") == [f"opened-file {letter}"]


def test_a_task_after_bpftrace_ended_is_not_monitored(place: Place, second: Monitor) -> None:
    second._process.kill()
    with pytest.raises(MonitorError, match=r"^bpftrace ended$"):
        place.watched(second)


def test_a_task_that_uses_an_io_uring_is_not_monitored(place: Place, monitor: Monitor) -> None:
    deed = "import ctypes; ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120))"  # io_uring_setup
    with pytest.raises(MonitorError, match="the task used an io_uring, which cannot be seen"):
        place.watched(monitor, deed)
    assert place.flags(monitor) == []


def test_a_task_of_which_something_is_lost_is_not_monitored(place: Place, second: Monitor, letter: Path) -> None:
    """Here bpftrace stands still until its buffers are full."""
    assert place.flags(second) == []
    pid = second._process.pid
    deed = f"os.kill({pid}, {int(signal.SIGSTOP)})\nfor _ in range(3000): open({str(letter)!r})"
    with pytest.raises(MonitorError, match="bpftrace lost some of what was seen"):
        place.watched(second, deed, before_end=lambda: os.kill(pid, signal.SIGCONT))
    for _ in range(10):  # each processor tells of its loss with its next line
        with suppress(MonitorError):
            assert place.flags(second) == []
            return
    pytest.fail("no task was monitored any more")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT} s"
        time.sleep(0.02)


@pytest.mark.usefixtures("monitor")  # it is possible here
def test_bpftrace_ends_with_a_killed_engine_and_prints_nothing() -> None:
    code = (
        "from traincert.trainer.monitoring import Monitor; print(Monitor.start([])._process.pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=-1, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as engine:
        assert engine.stdout is not None
        pid = int(engine.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        engine.kill()
        assert engine.stdout.read() == ""
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


START = """
import os
from traincert.trainer.monitoring import Monitor, MonitorError
{first}
try:
    Monitor.start([])
except MonitorError as error:
    print(error)
"""


def reason(first: str = "", command: tuple[str, ...] = ()) -> str:
    """Why there is no monitor in a process that does this first."""
    code = START.format(first=first)
    return subprocess.check_output([*command, sys.executable, "-c", code], text=True, stderr=subprocess.STDOUT)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gets so far")


def test_a_user_is_told_that_it_needs_root() -> None:
    assert reason("os.geteuid() or os.setuid(65534)") == "it needs root\n"


@needs_root
def test_root_without_the_capability_is_told_so() -> None:
    said = "it needs the capability CAP_SYS_ADMIN, or CAP_BPF and CAP_PERFMON\n"
    setpriv = shutil.which("setpriv")
    assert setpriv
    assert reason(command=(setpriv, "--bounding-set", "-sys_admin,-bpf")) == said


@needs_root
def test_a_machine_that_cannot_do_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Up to what this machine has itself."""
    monkeypatch.setattr(monitoring, "_BTF", tmp_path / "vmlinux")
    with pytest.raises(MonitorError, match=r"^the kernel has no BTF: "):
        Monitor.start([])
    (tmp_path / "vmlinux").touch()
    monkeypatch.setattr(monitoring, "_TRACING", [str(tmp_path)])
    with pytest.raises(MonitorError, match=r"^tracefs is not mounted: mount -t tracefs nodev /sys/kernel/tracing$"):
        Monitor.start([])
    (tmp_path / "events").mkdir()
    with pytest.raises(MonitorError, match=r"^the kernel is too old: it must be version 6.3 or newer$"):
        Monitor.start([])
    (tmp_path / "events/sock/sock_send_length").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MonitorError, match=r"^bpftrace is not installed$"):
        Monitor.start([])
    (tmp_path / "bpftrace").write_text("#!/bin/sh\necho 'ERROR: no such thing' >&2\necho hello\nexit 1\n")
    (tmp_path / "bpftrace").chmod(0o700)
    with pytest.raises(MonitorError, match=r"^bpftrace ended: ERROR: no such thing$"):
        Monitor.start([])
