"""One bitcoind process on regtest."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import requests

from traincert.regtest.errors import NodeError, NodeUnreachableError, RpcError, WaitTimeoutError
from traincert.regtest.processes import find_process, is_running, kill, spawn

Options = Mapping[str, str | Sequence[str]]
"""bitcoin.conf options, without the dash: a name and its value, or its values where it may be repeated."""

START_TIMEOUT = 60.0  # seconds; a start takes half a second, the rest is for machines that are busy
STOP_TIMEOUT = 60.0
RPC_TIMEOUT = 60.0
START_ATTEMPTS = 5

# A light node that speaks only to the nodes it is told of. A caller's option of the same name replaces ours.
DEFAULT_OPTIONS: Options = {
    "dbcache": "16",  # MiB
    "discover": "0",
    "dnsseed": "0",
    "fallbackfee": "0.0002",  # regtest has no fee history, without this its wallets cannot send
    "fixedseeds": "0",
    "listenonion": "0",
    "maxsigcachesize": "1",  # MiB; to make room for the usual 32 is a fifth of the work of a start
    "natpmp": "0",
    "peertimeout": "999999999",  # seconds of mock time: a jump of it must not look like peers that fell silent
    "printtoconsole": "0",
}

RPC_IN_WARMUP = -28
"""Bitcoin Core's error code while a node starts (src/rpc/protocol.h)."""
_logger = logging.getLogger(__name__)


class Node:
    """A bitcoind with its data directory.

    All its options are in `datadir`/bitcoin.conf, so `bitcoin-cli -datadir=...` needs nothing else. As a context
    manager it is started on entry and stopped on exit.

    A node never outlives this Python process, even if that is killed, unless `keep` is set: then leaving the context
    leaves the node running, its pid in `datadir`/regtest/bitcoind.pid, `bitcoin-cli ... stop` ends it, and another
    Node of the same data directory can `attach()` to it.
    """

    def __init__(
        self, bitcoind: Path, datadir: Path, options: Options | None = None, *, name: str = "", keep: bool = False
    ) -> None:
        self.bitcoind = bitcoind
        self.datadir = datadir.absolute()
        self.name = name or datadir.name
        self.options = options or {}
        self.keep = keep
        self.rpc_port = 0  # chosen by start()
        self.p2p_port = 0
        self.disk_full = False
        self._process: psutil.Process | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if not self.keep:
            self.stop()

    @property
    def rpc_url(self) -> str:
        """Where the node answers JSON-RPC; user and password are in `cookie_file`."""
        return f"http://127.0.0.1:{self.rpc_port}"

    @property
    def p2p_address(self) -> str:
        """The host:port that other nodes connect to."""
        return f"127.0.0.1:{self.p2p_port}"

    @property
    def relay_host(self) -> str:
        """Where a relay on this machine must listen for the node to reach it."""
        return "127.0.0.1"

    @property
    def relay_target(self) -> str:
        """Where a relay on this machine reaches the node."""
        return self.p2p_address

    @property
    def cli(self) -> list[str]:
        """The command that runs bitcoin-cli on the node."""
        return [str(self.bitcoind.with_name("bitcoin-cli")), f"-datadir={self.datadir}"]

    @property
    def chain_dir(self) -> Path:
        """The part of the data directory that belongs to regtest."""
        return self.datadir / "regtest"

    @property
    def cookie_file(self) -> Path:
        """`user:password` for the RPC port, written anew at each start."""
        return self.chain_dir / ".cookie"

    @property
    def pid(self) -> int | None:
        """The process id while the node runs, also while it is paused."""
        return self._process.pid if self._process and is_running(self._process) else None

    @property
    def died(self) -> bool:
        """Whether the node ended without a shutdown of its own."""
        return self.pid is None and self._pid_file.exists()

    @property
    def paused(self) -> bool:
        """Whether the process was stopped by `pause()`."""
        return self.pid is not None and self._process is not None and self._process.status() == psutil.STATUS_STOPPED

    def attach(self) -> bool:
        """Take over the node that another Python process started on this data directory and left; whether it runs."""
        self._process = find_process(self._pid_file, f"-datadir={self.datadir}")
        self._read_ports()
        return self._process is not None

    def _read_ports(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            options = read_conf(self.datadir)
            self.rpc_port, self.p2p_port = int(options["rpcport"]), int(options["port"])

    def start(self) -> None:
        """Start the node and wait until it answers.

        The ports of the last start are used again where they are free. Does nothing if the node runs.

        Raises NodeError if it ended instead, with its exit code and its own last words, and WaitTimeoutError if it
        did not answer within START_TIMEOUT seconds.
        """
        if self.pid is not None:
            return
        self.kill()  # nothing: it has ended, but may not have been waited for
        if self.disk_full:
            raise NodeError(f"{self.name} cannot start: its disk is full")
        self.datadir.mkdir(parents=True, exist_ok=True)
        if datadir_in_use(self.datadir):
            # perhaps a node that was kept: writing its conf anew would cut it off
            raise NodeError(f"{self.name}: a node is running in {self.datadir} already")
        for attempt in range(1, START_ATTEMPTS + 1):
            if attempt > 1 or not self.rpc_port:
                self.rpc_port, self.p2p_port = _free_ports(2)
            self._write_conf()
            # What a former run left must not pass for a sign of life of this one.
            for leftover in (self.cookie_file, self._pid_file):
                leftover.unlink(missing_ok=True)
            try:
                self._launch()
                wait_for(self._is_ready, START_TIMEOUT, f"{self.name} to answer RPC", self.log_tail)
            except PortTakenError:
                # Between our look and bitcoind's bind anyone may take a port: take others.
                if attempt == START_ATTEMPTS:
                    raise
            except BaseException:
                self.kill()
                raise
            else:
                return

    def stop(self) -> None:
        """Ask the node to stop and wait for its end; kill it if it takes more than STOP_TIMEOUT seconds."""
        if not self._was_started():
            return
        if self.pid is None:
            _logger.warning("%s had ended by itself (%s)", self.name, self._ending())
        try:
            self.resume()
            try:
                self.rpc("stop")
            except NodeError:  # it is starting, or on its way out already; the wait below decides
                self._terminate()
            wait_for(lambda: self.pid is None, STOP_TIMEOUT, f"{self.name} to stop")
        except WaitTimeoutError:
            _logger.warning("%s did not stop within %d s: killed", self.name, STOP_TIMEOUT)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the node at once, as a power failure would."""
        if self._process is not None:
            kill(self._process)
            self._process = None

    def pause(self) -> None:
        """Let the node stand still (SIGSTOP): it keeps its connections, and answers nobody until `resume()`."""
        self._running().suspend()
        wait_for(lambda: self.paused, STOP_TIMEOUT, f"{self.name} to stand still")

    def resume(self) -> None:
        """Let a paused node go on."""
        if self.paused:
            self._running().resume()

    def fill_disk(self) -> None:
        """Let every write of the node fail, as on a full disk, until `free_disk()`: at the next it shuts itself down.

        The file size limit does it (EFBIG instead of ENOSPC), which needs no privilege. Linux only.
        """
        self.disk_full = True
        if self.pid is not None:
            self._limit_files(0)

    def free_disk(self) -> None:
        """Undo `fill_disk()`. A node that has shut itself down is not started."""
        self.disk_full = False
        if self.pid is not None:
            self._limit_files(psutil.RLIM_INFINITY)

    def _limit_files(self, soft: int) -> None:
        """Limit the size of the files that the node writes, in bytes."""
        self._running().rlimit(psutil.RLIMIT_FSIZE, (soft, psutil.RLIM_INFINITY))

    def _terminate(self) -> None:
        if self._process is not None and is_running(self._process):
            self._process.terminate()

    def _was_started(self) -> bool:
        """Whether there is something to stop, or to say of its end."""
        return self._process is not None

    def _running(self) -> psutil.Process:
        if self._process is None or self.pid is None:
            raise NodeError(f"{self.name} is not running")
        return self._process

    def restart(self) -> None:
        """Stop the node and start it on the same data."""
        self.stop()
        self.start()

    def rpc(self, method: str, *params: object, wallet: str | None = None) -> Any:
        """Call an RPC method, of a wallet if one is named, and return its result, as JSON has it.

        Raises RpcError with the node's own error, and NodeUnreachableError if there is no connection, no answer within
        RPC_TIMEOUT seconds, or not the node's answer.
        """
        try:
            login = read_cookie(self.cookie_file)
        except FileNotFoundError:
            raise NodeUnreachableError(f"{self.name} is not running: no {self.cookie_file}") from None
        try:
            with requests.Session() as session:
                session.trust_env = False  # a proxy from the environment has no business here
                response = session.post(
                    self.rpc_url if wallet is None else f"{self.rpc_url}/wallet/{wallet}",
                    json={"id": 0, "method": method, "params": params},
                    auth=login,
                    timeout=RPC_TIMEOUT,
                )
        except requests.RequestException as error:
            raise NodeUnreachableError(f"{self.name} at {self.rpc_url}: {method}: {error}") from error
        try:
            answer = response.json()
            failure, result = answer["error"], answer["result"]
        except (requests.JSONDecodeError, KeyError, TypeError):
            raise NodeUnreachableError(
                f"{self.name} at {self.rpc_url}: {method}: HTTP status {response.status_code}, not a JSON-RPC answer"
            ) from None
        if failure is not None:
            raise RpcError(self.name, method, failure["code"], failure["message"])
        return result

    def log_tail(self, lines: int = 10) -> str:
        """Return the last lines of debug.log ("" if there is none)."""
        try:
            with (self.chain_dir / "debug.log").open("rb") as log:
                log.seek(max(0, log.seek(0, 2) - 300 * lines))
                return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    def _write_conf(self) -> None:
        ours = {"port": str(self.p2p_port), "rpcport": str(self.rpc_port), **self._listening()}
        write_conf(self.datadir, {**self.options, **ours}, self.name)

    def _listening(self) -> Options:
        return {
            "bind": self.p2p_address,
            # Left to itself a node whose RPC port is taken on 127.0.0.1 makes do with ::1, and does not say so.
            "rpcbind": "127.0.0.1",
            "rpcallowip": "127.0.0.1",
        }

    def _launch(self) -> None:
        command = [str(self.bitcoind), f"-datadir={self.datadir}"]
        try:
            with self._stderr_file.open("wb") as stderr:
                self._process = spawn(command, keep=self.keep, stderr=stderr)
        except OSError as error:
            raise NodeError(f"{self.name}: cannot run {self.bitcoind}: {error.strerror}") from error

    def _is_ready(self) -> bool:
        """Whether our process, and no other, answers on our RPC port."""
        if self.pid is None:
            said = self._last_words() or self.log_tail()
            port_taken = "Unable to bind to" in said or "Unable to start HTTP server" in said
            kind = PortTakenError if port_taken else NodeError
            ending = self._ending()
            self.kill()
            raise kind(f"{self.name} did not start ({ending}): {said}")
        # bitcoind writes both files only after it has its lock and its RPC port, so a stranger has no part in them.
        if not (self.cookie_file.exists() and self._pid_file.exists()):
            return False
        try:
            self.rpc("getblockcount")
        except NodeUnreachableError:
            return False
        except RpcError as error:
            if error.code != RPC_IN_WARMUP:
                raise
            return False
        return self._pid_file.read_text().strip() == str(self._pid_of_its_own())

    def _pid_of_its_own(self) -> int | None:
        """The process id as the node itself knows it."""
        return self.pid

    def _last_words(self) -> str:
        return self._stderr_file.read_text(errors="replace").strip()

    def _ending(self) -> str:
        if not isinstance(self._process, psutil.Popen):  # no child of ours
            return "exit code not known"
        code = self._process.wait()  # a negative signal number, as subprocess has it
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    @property
    def _pid_file(self) -> Path:
        return self.chain_dir / "bitcoind.pid"

    @property
    def _stderr_file(self) -> Path:
        return self.datadir / "stderr.log"


class PortTakenError(NodeError):
    """The node found a port taken."""


def write_conf(datadir: Path, options: Options, name: str = "") -> None:
    """Write the bitcoin.conf of a regtest node: these options, and DEFAULT_OPTIONS where they say nothing.

    Raises NodeError, with the node's name (the data directory's if there is none), for a value that it cannot hold.
    """
    lines = ["regtest=1", "[regtest]"]
    for option, values in {**DEFAULT_OPTIONS, **options}.items():
        for value in [values] if isinstance(values, str) else values:
            if "\n" in value or "#" in value:
                raise NodeError(
                    f"{name or datadir.name}: option {option}: bitcoin.conf cannot hold the value {value!r}"
                )
            lines.append(f"{option}={value}")
    (datadir / "bitcoin.conf").write_text("\n".join(lines) + "\n")


def read_conf(datadir: Path) -> dict[str, str]:
    """Return the options in a data directory's bitcoin.conf: the last value of each.

    Raises OSError if the file cannot be read.
    """
    lines = (line.partition("=") for line in (datadir / "bitcoin.conf").read_text().splitlines())
    return {name.strip(): value.strip() for name, equals, value in lines if equals}


def read_cookie(cookie_file: Path) -> tuple[str, str]:
    """Return the user and the password in a node's cookie file. Raises FileNotFoundError if the node does not run."""
    user, _, password = cookie_file.read_text().partition(":")
    return user, password


def datadir_in_use(datadir: Path) -> bool:
    """Whether a bitcoind, ours or not, runs regtest on a data directory."""
    try:
        with (datadir / "regtest" / ".lock").open("r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock that bitcoind itself takes
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def wait_for(
    condition: Callable[[], object], timeout: float, what: str, last_seen: Callable[[], object] | None = None
) -> None:
    """Ask until `condition()` is true.

    `what` is what is awaited, in words, and `last_seen` gives the state to be told if it does not come.

    Raises WaitTimeoutError if it was not true within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            seen = f"; last seen: {last_seen()}" if last_seen else ""
            raise WaitTimeoutError(f"waited {timeout:g} s for {what}{seen}")
        time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    """`count` different ports on 127.0.0.1 that were free when we looked."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
