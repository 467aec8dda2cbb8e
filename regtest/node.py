"""Starts, stops and calls one bitcoind process on regtest."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import secrets
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
"""bitcoin.conf options: from a name, without dash, to its value. A repeated option has a list of values."""

START_TIMEOUT = 60.0  # seconds; a start takes about 0.5 s, but longer on a busy machine
STOP_TIMEOUT = 60.0  # seconds
RPC_TIMEOUT = 60.0  # seconds
START_ATTEMPTS = 5

# These options make a node that uses little memory and connects only to given nodes. The caller's options replace them.
DEFAULT_OPTIONS: Options = {
    "dbcache": "16",  # MiB
    "discover": "0",
    "dnsseed": "0",
    "fallbackfee": "0.0002",  # BTC/kvB; a regtest chain has no fee history, so wallets need this to send
    "fixedseeds": "0",
    "listenonion": "0",
    "maxsigcachesize": "1",  # MiB; allocating the default 32 MiB is a fifth of a start's work
    "natpmp": "0",
    "peertimeout": "999999999",  # seconds; after a jump of the mock time, a node must not think that peers timed out
    "printtoconsole": "0",
}

RPC_IN_WARMUP = -28
"""Bitcoin Core's error code while a node starts (src/rpc/protocol.h)."""
_logger = logging.getLogger(__name__)


class Node:
    """A bitcoind with its data directory.

    All options are in `datadir`/bitcoin.conf, so `bitcoin-cli -datadir=...` works without further options.
    The context manager starts the node on entry and stops it on exit.

    By default the node ends when this Python process ends, even if this process is killed. With `keep` the node goes
    on running after the context and after this process. `bitcoin-cli -datadir=... stop` then stops it. Another Node
    object of the same data directory can control it after `attach()`.
    """

    def __init__(
        self, bitcoind: Path, datadir: Path, options: Options | None = None, *, name: str = "", keep: bool = False
    ) -> None:
        self.bitcoind = bitcoind
        self.datadir = datadir.absolute()
        self.name = name or datadir.name
        self.options = options or {}
        self.keep = keep
        self.rpc_port = 0  # start() chooses both ports
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
        """The URL for JSON-RPC. The user and the password are in `cookie_file`."""
        return f"http://127.0.0.1:{self.rpc_port}"

    @property
    def p2p_address(self) -> str:
        """The host:port that other nodes connect to."""
        return f"127.0.0.1:{self.p2p_port}"

    @property
    def relay_host(self) -> str:
        """The IP address on which a relay must listen, so that the node can connect to the relay."""
        return "127.0.0.1"

    @property
    def relay_target(self) -> str:
        """The host:port at which a relay on this machine can connect to the node."""
        return self.p2p_address

    @property
    def cli(self) -> list[str]:
        """The command line of bitcoin-cli for this node, to be followed by an RPC method."""
        return [str(self.bitcoind.with_name("bitcoin-cli")), f"-datadir={self.datadir}"]

    @property
    def chain_dir(self) -> Path:
        """The folder of the regtest chain in the data directory."""
        return self.datadir / "regtest"

    @property
    def cookie_file(self) -> Path:
        """The file with `user:password` for RPC. Each start writes a new one."""
        return self.chain_dir / ".cookie"

    @property
    def pid(self) -> int | None:
        """The process id of the running or paused node; None if the node does not run."""
        return self._process.pid if self._process and is_running(self._process) else None

    @property
    def died(self) -> bool:
        """Whether the node ended without a regular shutdown: a regular shutdown removes the pid file."""
        return self.pid is None and self._pid_file.exists()

    @property
    def paused(self) -> bool:
        """Whether `pause()` has paused the node."""
        return self.pid is not None and self._process is not None and self._process.status() == psutil.STATUS_STOPPED

    def attach(self) -> bool:
        """Take control of a node that another process started on this data directory. Returns whether it runs."""
        self._process = find_process(self._pid_file, f"-datadir={self.datadir}")
        self._read_ports()
        return self._process is not None

    def _read_ports(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            options = read_conf(self.datadir)
            self.rpc_port, self.p2p_port = int(options["rpcport"]), int(options["port"])

    def start(self) -> None:
        """Start the node and wait until it answers RPC. Does nothing if the node runs already.

        The node keeps the ports of its last start if they are free.

        Raises NodeError if the node ended: the message has its exit code and its last output. Raises WaitTimeoutError
        if the node did not answer within START_TIMEOUT seconds.
        """
        if self.pid is not None:
            return
        self.kill()  # forgets an earlier process, which has ended; also removes its zombie
        if self.disk_full:
            raise NodeError(f"{self.name} cannot start: its disk is full")
        self.datadir.mkdir(parents=True, exist_ok=True)
        if datadir_in_use(self.datadir):
            # This may be a node started with `keep`. A new bitcoin.conf would have other ports and make it unreachable.
            raise NodeError(f"{self.name}: a node is running in {self.datadir} already")
        for attempt in range(1, START_ATTEMPTS + 1):
            if attempt > 1 or not self.rpc_port:
                self.rpc_port, self.p2p_port = free_ports(2)
            self._write_conf()
            # _is_ready() looks for these files, so files of an earlier start must not mislead it.
            for leftover in (self.cookie_file, self._pid_file):
                leftover.unlink(missing_ok=True)
            try:
                self._launch()
                wait_for(self._is_ready, START_TIMEOUT, f"{self.name} to answer RPC", self.log_tail)
            except PortTakenError:
                # Another program took a port after free_ports() and before bitcoind's bind: try other ports.
                if attempt == START_ATTEMPTS:
                    raise
            except BaseException:
                self.kill()
                raise
            else:
                return

    def stop(self) -> None:
        """Ask the node to stop and wait for its end. After STOP_TIMEOUT seconds, kill it."""
        if not self._was_started():
            return
        if self.pid is None:
            _logger.warning("%s had already ended (%s)", self.name, self._ending())
        try:
            self.resume()
            try:
                self.rpc("stop")
            except NodeError:  # the node is still starting or already stopping; SIGTERM works in both cases
                self._terminate()
            wait_for(lambda: self.pid is None, STOP_TIMEOUT, f"{self.name} to stop")
        except WaitTimeoutError:
            _logger.warning("%s did not stop within %d s: killed", self.name, STOP_TIMEOUT)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the node at once, without a shutdown, as in a power failure."""
        if self._process is not None:
            kill(self._process)
            self._process = None

    def pause(self) -> None:
        """Pause the node (SIGSTOP) until `resume()`: it keeps its connections but does not answer."""
        self._running().suspend()
        wait_for(lambda: self.paused, STOP_TIMEOUT, f"{self.name} to stand still")

    def resume(self) -> None:
        """Let a paused node continue. Does nothing if the node is not paused."""
        if self.paused:
            self._running().resume()

    def fill_disk(self) -> None:
        """Make every write of the node fail, as on a full disk, until `free_disk()`.

        The node shuts itself down at its next write. This sets the limit of the file size to 0, so writes fail with
        EFBIG instead of ENOSPC. A limit needs no privilege. Linux only.
        """
        self.disk_full = True
        if self.pid is not None:
            self._limit_files(0)

    def free_disk(self) -> None:
        """Undo `fill_disk()`. This does not start a node that has shut itself down."""
        self.disk_full = False
        if self.pid is not None:
            self._limit_files(psutil.RLIM_INFINITY)

    def _limit_files(self, soft: int) -> None:
        """Set the maximum size, in bytes, of files that the node writes."""
        self._running().rlimit(psutil.RLIMIT_FSIZE, (soft, psutil.RLIM_INFINITY))

    def _terminate(self) -> None:
        if self._process is not None and is_running(self._process):
            self._process.terminate()

    def _was_started(self) -> bool:
        """Whether this object has started or attached to a node, which it has not stopped or killed since."""
        return self._process is not None

    def _running(self) -> psutil.Process:
        if self._process is None or self.pid is None:
            raise NodeError(f"{self.name} is not running")
        return self._process

    def restart(self) -> None:
        """Stop the node and start it again on the same data directory."""
        self.stop()
        self.start()

    def rpc(self, method: str, *params: object, wallet: str | None = None) -> Any:
        """Call an RPC method and return its result as decoded JSON. With `wallet`, call it for the wallet of this name.

        Raises RpcError if the node answers with an error. Raises NodeUnreachableError if there is no connection, no
        answer within RPC_TIMEOUT seconds, or an answer that is not JSON-RPC.
        """
        try:
            login = read_cookie(self.cookie_file)
        except FileNotFoundError:
            raise NodeUnreachableError(f"{self.name} is not running: no {self.cookie_file}") from None
        try:
            with requests.Session() as session:
                session.trust_env = False  # ignore proxies and .netrc: the node is on this machine
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
        """Return the last lines of debug.log; "" if the file does not exist."""
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
            # Without rpcbind, a node listens on ::1 too. If only 127.0.0.1's port is taken, it starts without an error.
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
        """Whether our own process answers on our RPC port. Raises NodeError if the process has ended."""
        if self.pid is None:
            said = self._last_words() or self.log_tail()
            port_taken = "Unable to bind to" in said or "Unable to start HTTP server" in said
            kind = PortTakenError if port_taken else NodeError
            ending = self._ending()
            self.kill()
            raise kind(f"{self.name} did not start ({ending}): {said}")
        # bitcoind writes both files only after it owns the data directory's lock and the RPC port.
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
        """The process id that the node writes into its pid file."""
        return self.pid

    def _last_words(self) -> str:
        return self._stderr_file.read_text(errors="replace").strip()

    def _ending(self) -> str:
        if not isinstance(self._process, psutil.Popen):  # only a parent process learns the exit code
            return "exit code unknown"
        code = self._process.wait()  # for a killed process this is minus the signal's number
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    @property
    def _pid_file(self) -> Path:
        return self.chain_dir / "bitcoind.pid"

    @property
    def _stderr_file(self) -> Path:
        return self.datadir / "stderr.log"


class PortTakenError(NodeError):
    """The node did not start, because another program uses one of its ports."""


def write_conf(datadir: Path, options: Options, name: str = "") -> None:
    """Write the bitcoin.conf of a regtest node, from DEFAULT_OPTIONS and `options`, which take precedence.

    Raises NodeError for a value with a line break or "#". The message has `name`, or else the folder's name.
    """
    lines = ["regtest=1", "[regtest]"]
    for option, values in {**DEFAULT_OPTIONS, **options}.items():
        for value in [values] if isinstance(values, str) else values:
            if "\n" in value or "#" in value:
                raise NodeError(
                    f"{name or datadir.name}: option {option}: bitcoin.conf cannot hold the value {value!r}, "
                    "because of its line break or '#'"
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
    """Whether any bitcoind runs regtest on a data directory."""
    try:
        with (datadir / "regtest" / ".lock").open("r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a running bitcoind holds this lock
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def wait_for(
    condition: Callable[[], object], timeout: float, what: str, last_seen: Callable[[], object] | None = None
) -> None:
    """Call `condition()` repeatedly until it returns a true value.

    Raises WaitTimeoutError if that takes more than `timeout` seconds. The message is "waited ... s for `what`", and the
    result of `last_seen()`.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            seen = f"; last seen: {last_seen()}" if last_seen else ""
            raise WaitTimeoutError(f"waited {timeout:g} s for {what}{seen}")
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Return `count` different ports on 127.0.0.1 that are free now.

    They are below those that the kernel gives to connections (32768 and above), so that no connection takes one before
    the caller's program does.
    """
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = 20_000 + secrets.randbelow(12_000)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.append(port)
        return ports
