"""`traincert demo` as a user runs it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from traincert.regtest import wait_for
from traincert.regtest.node import datadir_in_use
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import RunFolder

TRAINCERT = str(Path(sys.executable).parent / "traincert")


def environment(mark: Path) -> dict[str, str]:
    """The environment for a command, whose processes can then be found: they all inherit it."""
    return os.environ | {"TEST_MARK": str(mark)}


def run(*arguments: str | Path, mark: Path = Path()) -> subprocess.CompletedProcess[str]:
    command = [TRAINCERT, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment(mark))


def processes(mark: Path) -> list[str]:
    """Command lines of the processes that a marked command left."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended, or is not ours
            continue
        if f"TEST_MARK={mark}".encode() in variables:
            found.append(command)
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, node_programs: Path) -> tuple[Path, str]:  # noqa: ARG001 - built before
    """The demo as `make demo` runs it, in another directory."""
    directory = tmp_path_factory.mktemp("demo") / "data"
    answer = run("demo", "--data", directory, mark=directory)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return directory, answer.stdout


def test_the_demos_updates_can_be_made_again(demo: tuple[Path, str]) -> None:
    answer = run("job", "replay", demo[0] / "coordinator/run", "--cycle", "12")
    assert answer.stdout.splitlines()[-1] == "all 4 updates are the same", answer.stderr


def test_the_demo_reaches_its_accuracy_and_every_claim_holds(demo: tuple[Path, str]) -> None:
    _, shown = demo
    assert "NOT TRUE" not in shown
    claims = [line for line in shown.splitlines() if line.startswith("✓")]
    assert len(claims) == 11
    accuracy = float(claims[-1].partition("has: ")[2].split()[0])
    assert accuracy >= 0.95
    assert "(bar: 0.95)" in claims[-1]
    rows = [line.split() for line in shown.splitlines()[1:13]]
    assert [row[0] for row in rows] == [str(height) for height in range(1, 13)]
    assert {row[1] for row in rows} <= {f"miner{i}" for i in range(4)}
    assert all(len(row[-1]) == 64 for row in rows)


def test_the_readme_shows_what_the_demo_prints(demo: tuple[Path, str]) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    shown, promised = (
        [re.sub(r"[0-9.]+", "#", line.strip()) for line in text.splitlines() if line.strip().startswith("✓")]
        for text in (demo[1], readme)
    )
    assert promised == shown


def test_the_picture_is_one_and_keys_are_their_owners_only(demo: tuple[Path, str]) -> None:
    directory, _ = demo
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    keys = secrets_in(directory)
    assert len(keys) == 2 + 2 + 4 * 2 + 2 * 2 + 1  # coordinator, broker's users, miners, cosigners, TLS
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_no_secret_is_in_a_log_or_an_answer(demo: tuple[Path, str]) -> None:
    directory, shown = demo
    files = [*directory.glob("node*/regtest/debug.log"), *directory.glob("*/log")]
    logs = shown + "".join(log.read_text(errors="replace") for log in files)
    assert "Done loading" in logs
    for key in secrets_in(directory):
        assert key.read_text().strip() not in logs


def secrets_in(directory: Path) -> list[Path]:
    return [path for kind in ("*.key", "*.seed") for path in directory.rglob(kind)]


def test_no_process_is_left(demo: tuple[Path, str]) -> None:
    assert processes(demo[0]) == []


def test_afterwards_bitcoind_and_bitcoin_cli_need_the_data_directory_alone(
    demo: tuple[Path, str], node_programs: Path
) -> None:
    datadirs = [demo[0] / f"node{number}" for number in range(3)]

    def cli(datadir: Path, *arguments: str) -> str:
        command = [str(node_programs / "bitcoin-cli"), f"-datadir={datadir}", *arguments]
        return subprocess.check_output(command, text=True).strip()

    for datadir in datadirs:
        command = [str(node_programs / "bitcoind"), f"-datadir={datadir}", "-daemonwait"]
        subprocess.run(command, check=True, capture_output=True)
    try:
        tip = cli(datadirs[0], "getbestblockhash")
        assert json.loads(cli(datadirs[0], "getblock", tip))["height"] == 12
        assert json.loads(cli(datadirs[0], "gettrainingcertificate"))["blockhash"] == tip
        for datadir in datadirs:  # they find each other
            wait_for(
                partial(_has_peers, partial(cli, datadir), {"node0", "node1", "node2"} - {datadir.name}), 30, "peers"
            )
    finally:
        for datadir in datadirs:
            cli(datadir, "stop")
        wait_for(lambda: not any(map(datadir_in_use, datadirs)), 30, "the nodes to stop")


def _has_peers(cli: Callable[..., str], names: set[str]) -> bool:
    agents = [peer["subver"] for peer in json.loads(cli("getpeerinfo"))]
    return all(any(f"({name})" in agent for agent in agents) for name in names)


@pytest.mark.usefixtures("node_programs")
def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    small = ("demo", "--data", tmp_path / "data", "--miners", "1", "--nodes", "1")
    for cycles in ("2", "1"):
        answer = run(*small, "--cycles", cycles)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert f"all 1 nodes have the same tip, block {cycles}" in answer.stdout


def blocks_in(shown: str) -> list[str]:
    """The hashes in the table of blocks that a demo shows."""
    rows = [line.split() for line in shown.splitlines()[1:]]
    table = rows[: rows.index([])]
    assert [row[0] for row in table] == [str(height) for height in range(1, len(table) + 1)]
    return [row[-1] for row in table]


def keys_of(directory: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in secrets_in(directory)}


@pytest.mark.usefixtures("node_programs")
def test_a_demo_that_has_ended_goes_on_with_its_keys_and_chain(tmp_path: Path) -> None:
    data = tmp_path / "data"
    made = ("--data", data, "--miners", "1", "--nodes", "2", "--seed", "7", "--no-compat-pow")

    def kept_files() -> dict[Path, str]:
        files = [
            *secrets_in(data),
            *data.glob("node*/bitcoin.conf"),
            *data.glob("coordinator/run/cycles/0000000[012].json"),
        ]
        return {path: path.read_text() for path in files}

    first = run("demo", *made, "--cycles", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    before = kept_files()
    answer = run("demo", "--continue", "--data", data, "--cycles", "1")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "going on after block 2\n" in answer.stderr
    assert "✓ the chain has a block for every cycle" in answer.stdout
    assert (blocks_in(answer.stdout)[:2], len(blocks_in(answer.stdout))) == (blocks_in(first.stdout), 3)
    assert kept_files() == before
    again = run("demo", "--continue", *made, "--cycles", "1")  # what is as it was may be said again
    assert again.returncode == 0, again.stdout + again.stderr
    assert (blocks_in(again.stdout)[:3], len(blocks_in(again.stdout))) == (blocks_in(answer.stdout), 4)
    assert json.loads((data / "demo.json").read_text())["cycles"] == 4


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("preparing", signal.SIGKILL),
        ("starting 2 nodes", signal.SIGTERM),
        ("cycle 1 ", signal.SIGKILL),
        ("block 2 ", signal.SIGINT),
        ("checking", signal.SIGKILL),
    ],
)
@pytest.mark.usefixtures("node_programs")
def test_a_demo_that_was_ended_at_any_moment_goes_on(tmp_path: Path, moment: str, number: signal.Signals) -> None:
    data = tmp_path / "data"
    small = ["--miners", "1", "--nodes", "2", "--cycles", "3"]
    command = [TRAINCERT, "demo", "--data", str(data), *small]
    blocks = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(tmp_path)) as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if line.startswith("block "):
                blocks.append(line.split()[-1])
            if line.startswith(moment):
                break
        demo.send_signal(number)
        demo.communicate()
    wait_for(lambda: not processes(tmp_path), 10, "all processes to end", lambda: processes(tmp_path))
    keys = {path: key for path, key in keys_of(data).items() if "coordinator.unfinished" not in path.parts}
    answer = run("demo", "--continue", "--data", data)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "✓ the chain has a block for every cycle" in answer.stdout
    found = blocks_in(answer.stdout)
    assert len(found) == (3 if moment != "checking" else 3 + 12)  # after the last cycle: as many more as the job says
    assert found[: len(blocks)] == blocks
    assert keys_of(data).items() >= keys.items()


def test_a_demo_that_was_kept_goes_on_with_the_nodes_that_run(
    kept: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    directory, _ = kept
    answer = run("demo", "--continue", "--data", directory, "--cycles", "1")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "✓ all 2 nodes have the same tip, block 3" in answer.stdout
    assert processes(directory) == []  # --keep holds for one command
    logs = [(datadir / "regtest/debug.log").read_text() for datadir in directory.glob("node*")]
    assert [log.count("Done loading") for log in logs] == [1, 1]


MADE = {"version": 1, "cycles": 2, "job": "digits", "miners": 1, "nodes": 1, "seed": None, "round_seconds": 60}
MADE |= {"compat_pow": True}
ANEW = "begin anew without --continue, or choose another --data"


@pytest.mark.parametrize(
    ("plan", "options", "said"),
    [
        (None, [], "there is no demo in data that can go on"),
        ("", [], "data/demo.json cannot be read (JSONDecodeError('Expecting value: line 1 column 1 (char 0)'))"),
        ("[]", [], "data/demo.json cannot be read (TypeError('list indices must be integers or slices, not str'))"),
        (json.dumps({"version": 1}), [], "data/demo.json cannot be read (KeyError('cycles'))"),
        (json.dumps(MADE | {"version": 2}), [], "data/demo.json has format 2, this traincert reads format 1"),
        (json.dumps(MADE), ["--job", "fashion"], "--job fashion: the demo in data was made with digits"),
        (json.dumps(MADE), ["--miners", "2"], "--miners 2: the demo in data was made with 1"),
        (json.dumps(MADE), ["--seed", "3"], "--seed 3: the demo in data was made with none"),
    ],
)
def test_a_folder_whose_demo_cannot_go_on_is_told_in_a_line(
    plan: str | None, options: list[str], said: str, tmp_path: Path
) -> None:
    if plan is not None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/demo.json").write_text(plan)
    command = [TRAINCERT, "demo", "--continue", "--data", "data", *options]
    answer = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (1, f"traincert: {said}: {ANEW}\n")
    assert (tmp_path / "data").exists() == (plan is not None)


@pytest.mark.usefixtures("node_programs")
def test_a_demo_in_use_and_one_of_another_job_are_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps(MADE))
    with RunFolder(tmp_path / "coordinator/run", replace(TrainingJob.named("digits"), batch_size=7)):
        pass
    marker = tmp_path / ".traincert-demo"
    with marker.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for options in ([], ["--continue"]):
            answer = run("demo", "--data", tmp_path, *options)
            assert answer.returncode == 1
            said = f"another demo runs in {tmp_path}: wait for its end, or choose another --data"
            assert answer.stderr == f"traincert: {said}\n"
    answer = run("demo", "--data", tmp_path, "--continue")
    assert answer.returncode == 1
    batch = TrainingJob.named("digits").batch_size
    assert answer.stderr == (
        f"traincert: the demo in {tmp_path} trains another job (batch_size was 7, is {batch}): {ANEW}\n"
    )


@pytest.fixture
def kept(tmp_path: Path, node_programs: Path) -> Iterator[tuple[Path, subprocess.CompletedProcess[str]]]:
    """A small network that was left running."""
    directory = tmp_path / "kept"
    small = ("--cycles", "2", "--miners", "1", "--nodes", "2", "--seed", "7")
    answer = run("demo", "--data", directory, *small, "--keep", mark=directory)
    try:
        yield directory, answer
    finally:
        for datadir in directory.glob("node*"):
            subprocess.run([node_programs / "bitcoin-cli", f"-datadir={datadir}", "stop"], check=False)
        wait_for(lambda: not any(map(datadir_in_use, directory.glob("node*"))), 30, "the kept nodes to stop")


def test_a_kept_network_can_be_read_and_stopped_as_it_says(
    kept: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    directory, answer = kept
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert len(list(directory.glob("node*"))) == 2
    assert "bar" not in answer.stdout  # two cycles promise no accuracy
    assert len(left := processes(directory)) == 2, left
    assert all("bitcoind -datadir=" in command for command in left)

    shown = run("chain", "--datadir", directory / "node1", "--json")
    blocks = json.loads(shown.stdout)
    assert [block["height"] for block in blocks] == [1, 2]
    assert blocks[1]["model_before"] == blocks[0]["model_after"]
    verify = ["receipt", "verify", str(directory / "miner0"), "--cycle", "1", "--datadir", str(directory / "node1")]
    receipt = run(*verify)
    assert receipt.stdout.count("✓") == 6, receipt.stderr
    assert "\nThis miner won block 2, because the ticket is one of its own: " in receipt.stdout
    verified = json.loads(run(*verify, "--json").stdout)
    assert (verified["valid"], len(verified["steps"])) == (True, 6)
    assert receipt.stdout.endswith(f"{verified['result']}\n")
    records = directory / "coordinator/run"
    show = ["miner", "show", blocks[1]["winner_key"], "--datadir", str(directory / "node1"), "--run", str(records)]
    winner = json.loads(run(*show, "--json").stdout)
    assert (winner["draws"], winner["drawn"], winner["blocks"][-1]["height"]) == (1, 1, 2)
    assert winner["expected"] == winner["blocks"][-1]["weight"] / winner["blocks"][-1]["total"]
    table = run("chain", "--datadir", directory / "node1", "--run", records)
    assert all(block["blockhash"] in table.stdout for block in blocks)
    assert all(re.search(r" miner\d ", line) for line in table.stdout.splitlines() if blocks[0]["blockhash"] in line)
    without = run("chain", "--datadir", directory / "node1").stdout
    assert blocks[0]["winner_key"][:16] in without
    assert "miner" not in without
    assert f"{records} has the record of each block" in table.stdout
    changed = records / "cycles/00000002.json"
    changed.write_text(changed.read_text().replace('"cycle": 2', '"cycle": 3'))
    answer2 = run("chain", "--datadir", directory / "node1", "--run", records)
    assert answer2.returncode == 1
    assert answer2.stderr.startswith(f"traincert: block 2: the certificate has record {blocks[1]['record']}, but ")

    again = run("demo", "--data", directory, "--cycles", "1")
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("traincert: a node is running in")

    talk, stop = (line.strip() for line in answer.stdout.splitlines() if "bitcoin-cli" in line)
    assert json.loads(subprocess.check_output(shlex.split(talk)))["height"] == 2
    subprocess.run(["/bin/sh", "-c", stop], check=True)
    wait_for(lambda: not any(map(datadir_in_use, directory.glob("node*"))), 30, "the nodes to stop")
    gone = run("chain", "--datadir", directory / "node1")
    assert gone.returncode == 3
    assert gone.stderr.startswith("traincert: node1")
    assert len(gone.stderr.splitlines()) == 1


@pytest.mark.usefixtures("node_programs")
def test_an_absent_winner_is_replaced_and_blocks_need_no_proof_of_work(tmp_path: Path) -> None:
    """A miner's node hangs until its absence is noticed; and, in the same run, nonces are not searched."""
    data = tmp_path / "data"
    options = ["--nodes", "2", "--miners", "2", "--round", "1", "--no-compat-pow"]
    command = [TRAINCERT, "demo", "--data", str(data), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        assert demo.stderr is not None
        absent, height = "", ""
        for line in demo.stderr:
            if line.startswith("cycle 1 "):
                pid = int((data / "node1/regtest/bitcoind.pid").read_text())
                os.kill(pid, signal.SIGSTOP)
            elif " is absent, drawing again (" in line:
                absent = absent or line
            elif absent and not height:  # the line of the block that closed the slot
                height = line.split()[1]
                os.kill(pid, signal.SIGCONT)
        shown = demo.stdout.read()
    assert demo.returncode == 0, shown
    assert re.fullmatch(rf"block {height}: miner1 is absent, drawing again \(no answer yet\)\n", absent)
    rows = [line.split() for line in shown.splitlines()[1:13]]
    assert next(row for row in rows if row[0] == height)[1:3] == ["miner0", "(round"]
    assert "✓ python-bitcoinlib's CheckBlock takes every block, proof of work aside" in shown
    assert any(int(row[-1], 16) >> 255 for row in rows)  # above regtest's target


@pytest.mark.parametrize(
    "moment", ["preparing", "starting 3 nodes", "starting the broker", "cycle 1 ", "block 2 ", "checking"]
)
@pytest.mark.usefixtures("node_programs")
def test_ctrl_c_at_any_moment_stops_every_process(tmp_path: Path, moment: str) -> None:
    command = [TRAINCERT, "demo", "--data", str(tmp_path / "data"), "--cycles", "3", "--keep"]
    env = environment(tmp_path)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env) as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if line.startswith(moment):
                break
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does, to all of its processes
        rest = demo.stderr.read()
    assert demo.returncode == 130
    assert rest.splitlines()[-1:] == ["traincert: interrupted"], rest
    assert "Traceback" not in rest
    assert "Warning" not in rest
    wait_for(lambda: not processes(tmp_path), 10, "all processes to end", lambda: processes(tmp_path))


@pytest.mark.usefixtures("node_programs")
def test_a_directory_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    answer = run("demo", "--data", tmp_path, "--cycles", "1")
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1] == (
        f"traincert: {tmp_path} is not empty, and not a former demo's: choose another with --data"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["demo", "--cycles", "0"], "'--cycles': 0 is not in the range"),
        (["demo", "--continue", "--cycles", "x"], "'--cycles': 'x' is not a valid integer"),
        (["demo", "--seed", "x"], "'--seed': 'x' is not a valid integer"),
        (["chain", "--datadir", "/no/such/folder"], "'/no/such/folder' does not exist"),
        (["no-such-command"], "No such command"),
    ],
)
def test_wrong_usage_is_told_in_a_line_with_exit_code_2(arguments: list[str], problem: str) -> None:
    answer = run(*arguments)
    assert answer.returncode == 2
    assert problem in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_folder_that_is_no_data_directory_is_told(tmp_path: Path) -> None:
    answer = run("chain", "--datadir", tmp_path)
    assert answer.returncode == 1
    assert (
        answer.stderr == f"traincert: {tmp_path} is no node's data directory: No such file or directory: bitcoin.conf\n"
    )


def test_node_path_prints_where_the_programs_are(node_programs: Path) -> None:
    assert run("node", "path").stdout == f"{node_programs}\n"
    assert json.loads(run("node", "path", "--json").stdout) == {"path": str(node_programs)}


@pytest.mark.parametrize(
    ("source", "problem"),
    [("/etc", "not a source tree of Bitcoin Core"), ("/etc/passwd", "damaged or not a tar archive: ")],
)
def test_a_wrong_source_is_told_in_a_line(tmp_path: Path, source: str, problem: str) -> None:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [TRAINCERT, "node", "build", "--source", source]
    answer = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[:-1] == ["node: unpacking"]
    assert answer.stderr.splitlines()[-1].startswith(f"traincert: {source}: {problem}")
    assert not list(tmp_path.rglob("bitcoind"))


def test_a_node_that_is_not_built_is_told(tmp_path: Path) -> None:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    answer = subprocess.run([TRAINCERT, "node", "path"], check=False, capture_output=True, text=True, env=env)
    assert answer.returncode == 1
    assert answer.stderr.startswith("traincert: the node is not built yet")
    assert answer.stderr.endswith("run traincert node build, with the same options\n")


def test_a_cache_that_cannot_be_written_is_told() -> None:
    env = os.environ | {"XDG_CACHE_HOME": "/proc/no/such/folder"}
    answer = subprocess.run([TRAINCERT, "node", "build"], check=False, capture_output=True, text=True, env=env)
    assert answer.returncode == 1
    assert answer.stderr == "traincert: No such file or directory: /proc/no\n"
