"""Starts, stops and calls one bitcoind process on regtest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import psutil
import requests

from traincert.regtest.errors import NodeError, NodeUnreachableError, RpcError, WaitTimeoutError
from traincert.regtest.processes import find_by_argument, find_process, is_running, kill, spawn

Value = str | int | float
Options = Mapping[str, Value | Sequence[Value]]
"""bitcoin.conf options: from a name, without dash, to its value. A repeated option has a list of values.

True is 1 and False is 0. `port` and `rpcport` choose the ports. `rpcuser` and `rpcpassword` are a login beside the
cookie's.
"""

START_TIMEOUT = 60.0  # seconds; a start takes about 0.5 s, but longer on a busy machine
LOAD_TIMEOUT = 1800.0  # seconds in which a node that answers reads its blocks and its mempool: long with -reindex
STOP_TIMEOUT = 60.0  # seconds
RPC_TIMEOUT = 60.0  # seconds
ENDING_TIME = 1.0  # seconds in which a node that refuses connections may turn out to have ended
START_ATTEMPTS = 5
BLOCKS_PER_CALL = 100  # that a node makes in one call: far fewer than it makes within RPC_TIMEOUT

TIMEOUT_FACTOR = "TRAINCERT_TIMEOUT_FACTOR"
"""The environment variable by which all timeouts are multiplied, for slow machines."""

# These options make a node that uses little memory and connects only to given nodes. The caller's options replace them.
DEFAULT_OPTIONS: Options = {
    "dbcache": "16",  # MiB
    "discover": "0",
    "dnsseed": "0",
    "fallbackfee": "0.0002",  # BTC/kvB; a regtest chain has no fee history, so wallets need this to send
    "fixedseeds": "0",
    "listenonion": "0",
    # Seconds. A node whose tip is older is in initial block download and takes no transactions. Ours never is, although
    # no block may have come since its clock was set forward, or at all.
    "maxtipage": "9999999999",
    "maxsigcachesize": "1",  # MiB; allocating the default 32 MiB is a fifth of a start's work
    "natpmp": "0",
    "peertimeout": "999999999",  # seconds; after a jump of the mock time, a node must not think that peers timed out
    "printtoconsole": "0",
    "rpcworkqueue": "1024",  # calls that wait; a node refuses further ones
}

# We set these options ourselves, or nodes could not be found, called and copied with another value.
_NOT_FOR_USERS = {
    *(
        "bind",
        "blocksdir",
        "chain",
        "conf",
        "daemon",
        "daemonwait",
        "datadir",
        "pid",
        "regtest",
        "rpcallowip",
        "rpcbind",
    ),
    *("rpccookiefile", "server", "settings", "signet", "testnet", "testnet4", "walletdir"),
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
        self.datadir = datadir.resolve()
        self.name = name or datadir.name
        self.options = options or {}
        self.keep = keep
        self.rpc_port = 0  # start() chooses the ports that the options do not
        self.p2p_port = 0
        self.disk_full = False
        self.reconnect: Callable[[], None] = lambda: None  # a network's way to link the node again, for restart()
        self._process: psutil.Process | None = None
        self._no_answer = ""  # why the last call of a start was not answered

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
        self._process = find_process(self.chain_dir / ".lock")
        self._read_ports()
        return self._process is not None

    def _read_ports(self) -> None:
        # An empty bitcoin.conf, as a full disk may leave it, names none.
        with contextlib.suppress(OSError, KeyError, ValueError):
            options = read_conf(self.datadir)
            self.rpc_port, self.p2p_port = int(options["rpcport"]), int(options["port"])

    def start(self) -> None:
        """Start the node, and wait until it answers RPC and has read its blocks and its mempool.

        Does nothing if the node runs already. The node keeps the ports of its last start if they are free. The wallets
        that were loaded at the last `stop()` are loaded again.

        Raises NodeError if an option cannot be used, or if the node ended: the message has its exit code and its last
        output. Raises WaitTimeoutError if the node did not answer within START_TIMEOUT seconds, or was not ready
        within further LOAD_TIMEOUT seconds.
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
        log_size = self._log_size()
        for attempt in range(1, START_ATTEMPTS + 1):
            self._choose_ports(anew=attempt > 1)
            self.write_conf()
            # _mempool() looks for these files, so files of an earlier start must not mislead it.
            for leftover in (self.cookie_file, self._pid_file):
                leftover.unlink(missing_ok=True)
            try:
                self._launch()
                wait_for(self._mempool, START_TIMEOUT, f"{self.name} to answer RPC", self._seen)
                wait_for(self._is_ready, LOAD_TIMEOUT, f"{self.name} to read its blocks", self._seen)
                self._check_options(log_size)
            except PortTakenError:
                # Another program took a port after free_ports() and before bitcoind's bind: try other ports.
                if attempt == START_ATTEMPTS:
                    raise
            except BaseException:
                self.kill()
                self._kill_strays()
                raise
            else:
                return

    def _choose_ports(self, *, anew: bool) -> None:
        if anew or not self.rpc_port:
            self.rpc_port, self.p2p_port = free_ports(2)
        self.rpc_port, self.p2p_port = self._port("rpcport", self.rpc_port), self._port("port", self.p2p_port)

    def _port(self, option: str, otherwise: int) -> int:
        text = str(self.options.get(option, otherwise))
        if not text.isdecimal() or not 0 < int(text) < 1 << 16:
            raise NodeError(f"{self.name}: option {option}: {text} is no port")
        return int(text)

    def _check_options(self, log_size: int) -> None:
        """Raise NodeError if the node said in its log, after the first `log_size` bytes, that it ignores an option."""
        with contextlib.suppress(FileNotFoundError), (self.chain_dir / "debug.log").open("rb") as log:
            log.seek(log_size if log_size <= self._log_size() else 0)  # the node cuts a log that is too long
            unknown = set(
                re.findall(
                    r"Ignoring unknown configuration value (?:regtest\.)?(\S+)", log.read().decode(errors="replace")
                )
            )
            if ours := unknown.intersection(self.options):
                raise NodeError(f"{self.name}: {self.bitcoind} has no option {', '.join(sorted(ours))}")

    def _kill_strays(self) -> None:
        """Kill what a start that failed has left: a wrapper's child, or a node that went to the background."""
        for process in find_by_argument(f"-datadir={self.datadir}"):
            kill(process)

    def stop(self) -> None:
        """Ask the node to stop and wait for its end. After STOP_TIMEOUT seconds, kill it.

        The next start loads the wallets that are loaded now.
        """
        if not self._was_started():
            return
        wallets: list[str] | None = None
        if self.pid is None:
            _logger.warning("%s had already ended (%s)", self.name, self._ending())
        try:
            self.resume()
            try:
                wallets = self.rpc("listwallets")
                self.rpc("stop")
            except NodeError:  # it has no wallets, is still starting or already stopping; SIGTERM works in all cases
                self._terminate()
            wait_for(lambda: self.pid is None, STOP_TIMEOUT, f"{self.name} to stop")
        except WaitTimeoutError:
            _logger.warning("%s did not stop within %d s: killed", self.name, STOP_TIMEOUT)
        finally:
            self.kill()
            if wallets is not None:
                self._load_at_start(wallets)

    def _load_at_start(self, wallets: list[str]) -> None:
        """Write into the node's own settings (upstream: doc/files.md) which wallets its next start loads."""
        file = self.chain_dir / "settings.json"
        settings = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # it may be empty after a full disk
            settings = json.loads(file.read_text())
        if settings.get("wallet", []) != wallets:
            new = file.with_suffix(".new")
            new.write_text(json.dumps({**settings, "wallet": wallets}, indent=4))
            new.replace(file)

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
        """Stop the node and start it again on the same data directory. A node of a network is linked again."""
        self.stop()
        self.start()
        self.reconnect()

    def mine(self, count: int = 1, address: str | None = None) -> list[str]:
        """Make `count` blocks and return their hashes. They pay `address`, by default a script that anybody can spend.

        Raises RpcError if the node refuses, for example because its blocks need certificates.
        """
        method, paid = ("generatetoaddress", address) if address else ("generatetodescriptor", anybodys_script())
        hashes: list[str] = []
        for done in range(0, count, BLOCKS_PER_CALL):
            hashes += self.rpc(method, min(BLOCKS_PER_CALL, count - done), paid)
        return hashes

    def rpc(
        self,
        method: str,
        /,
        *params: object,
        wallet: str | None = None,
        rpc_timeout: float | None = None,
        **named: object,
    ) -> Any:
        """Call an RPC method, with its arguments in order or by their names, and return its result as decoded JSON.

        Amounts are Decimal in the result, and can be in the arguments. With `wallet`, call the method for the wallet of
        this name.

        Raises RpcError if the node answers with an error. Raises NodeUnreachableError if there is no connection, no
        answer within `rpc_timeout` seconds (by default RPC_TIMEOUT), or an answer that is not JSON-RPC.
        """
        try:
            login = read_cookie(self.cookie_file)
        except FileNotFoundError:
            raise NodeUnreachableError(f"{self.name} is not running: no {self.cookie_file}") from None
        arguments = {**named, **({"args": params} if params else {})} if named else params
        try:
            with requests.Session() as session:
                session.trust_env = False  # ignore proxies and .netrc: the node is on this machine
                response = session.post(
                    self.rpc_url if wallet is None else f"{self.rpc_url}/wallet/{quote(wallet, safe='')}",
                    data=json.dumps({"id": 0, "method": method, "params": arguments}, default=_decimal_text),
                    auth=login,
                    timeout=(rpc_timeout or RPC_TIMEOUT) * timeout_factor(),
                )
        except requests.RequestException as error:
            raise NodeUnreachableError(f"{self.name} at {self.rpc_url}: {method}: {self._why(error)}") from error
        try:
            answer = json.loads(response.content, parse_float=Decimal)
            failure, result = answer["error"], answer["result"]
        except (ValueError, KeyError, TypeError):
            said = f"HTTP status {response.status_code}, not a JSON-RPC answer: {response.text[:200]}".rstrip(": \r\n")
            raise NodeUnreachableError(f"{self.name} at {self.rpc_url}: {method}: {said}") from None
        if failure is not None:
            raise RpcError(self.name, method, failure["code"], failure["message"])
        return result

    def _why(self, error: requests.RequestException) -> str:
        """Return why the node gave no answer: how it ended, if it has ended."""
        if self._was_started() and isinstance(error, requests.ConnectionError):
            with contextlib.suppress(WaitTimeoutError):  # a process closes its connections a moment before it ends
                wait_for(lambda: self.pid is None, ENDING_TIME, "the end")
                return f"{self.name} has ended ({self._ending()})"
        return str(error)

    def log_tail(self, lines: int = 10) -> str:
        """Return the last lines of debug.log; "" if the file does not exist."""
        try:
            with (self.chain_dir / "debug.log").open("rb") as log:
                log.seek(max(0, log.seek(0, 2) - 300 * lines))
                return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""

    def _log_size(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return (self.chain_dir / "debug.log").stat().st_size
        return 0

    def write_conf(self, peers: Sequence[str] = ()) -> None:
        """Write bitcoin.conf. `peers` are addresses to which the node connects on its own.

        Raises NodeError if an option cannot be used, and OSError if the file cannot be written.
        """
        ours: dict[str, Value | Sequence[Value]] = {
            "port": self.p2p_port,
            "rpcport": self.rpc_port,
            **self._listening(),
        }
        options = self._users_options()
        if peers:
            ours["addnode"] = [*values(options.get("addnode", [])), *peers]
        write_conf(self.datadir, {**options, **ours}, self.name)

    def _users_options(self) -> Options:
        """Return the caller's options, with a user's password hashed: then the node makes a cookie, too."""
        options = dict(self.options)
        for option in options:
            if not re.fullmatch(r"[a-z0-9]+", option):
                raise NodeError(f"{self.name}: {option!r} is no option's name: leave out dashes and sections")
            if option.removeprefix("no") in _NOT_FOR_USERS:
                raise NodeError(f"{self.name}: option {option} cannot be set: traincert needs it as it is")
        user, password = options.pop("rpcuser", None), options.pop("rpcpassword", None)
        if user is None and password is None:
            return options
        if user is None or password is None:
            raise NodeError(f"{self.name}: the options rpcuser and rpcpassword need each other")
        return {**options, "rpcauth": [*values(options.get("rpcauth", [])), _rpcauth(str(user), str(password))]}

    def _listening(self) -> dict[str, str]:
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
        """Whether the node has read its blocks and its mempool: that comes last (upstream: init.cpp)."""
        return bool(self._mempool().get("loaded"))

    def _mempool(self) -> dict[str, Any]:
        """Return what the node says of its mempool; nothing if our own process does not answer on our RPC port yet.

        Raises NodeError if the process has ended, or has started the node as another process.
        """
        if self.pid is None:
            said = self._last_words() or self.log_tail()
            port_taken = "Unable to bind to" in said or "Unable to start HTTP server" in said
            kind = PortTakenError if port_taken else NodeError
            ending = self._ending()
            self.kill()
            raise kind(f"{self.name} did not start ({ending}): {said}")
        # bitcoind writes both files only after it owns the data directory's lock and the RPC port.
        if not (self.cookie_file.exists() and self._pid_file.exists()):
            return {}
        try:
            mempool: dict[str, Any] = self.rpc("getmempoolinfo")
        except NodeUnreachableError as error:
            self._no_answer = str(error)
            return {}
        except RpcError as error:
            if error.code != RPC_IN_WARMUP:
                raise
            return {}
        if self._pid_file.read_text().strip() != str(self._pid_of_its_own()):
            raise NodeError(f"{self.name}: {self.bitcoind} started the node as another process: a script must use exec")
        return mempool

    def _seen(self) -> str:
        return f"{self._no_answer}\n{self.log_tail()}".strip()

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

    Raises NodeError for a value with a line break or "#", or that is of another type. The message has `name`, or else
    the folder's name.
    """
    lines = ["regtest=1", "[regtest]"]
    for option, one_or_more in {**DEFAULT_OPTIONS, **options}.items():
        for each in values(one_or_more):
            value = _conf_text(option, each, name or datadir.name)
            if "\n" in value or "#" in value:
                raise NodeError(
                    f"{name or datadir.name}: option {option}: bitcoin.conf cannot hold the value {value!r}, "
                    "because of its line break or '#'"
                )
            lines.append(f"{option}={value}")
    new = datadir / "bitcoin.conf.new"
    new.write_text("\n".join(lines) + "\n")
    new.replace(datadir / "bitcoin.conf")  # as a whole: others may read it now, and we may be killed


def values(one_or_more: Value | Sequence[Value]) -> Sequence[Value]:
    """Return the values of an option as a list."""
    return [one_or_more] if isinstance(one_or_more, str) or not isinstance(one_or_more, Sequence) else one_or_more


def anybodys_script() -> str:
    """Return a descriptor of a new script that anybody can spend.

    With the same script, a block that replaces another one of the same time would be the same block.
    """
    return f"raw(08{secrets.token_hex(8)}7551)"  # push 8 bytes, OP_DROP, OP_TRUE


def _conf_text(option: str, value: object, name: str) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")  # bitcoind does not read 1e-05
    if not isinstance(value, str | int):
        raise NodeError(f"{name}: option {option}: {value!r} is neither text nor a number")
    return str(value)


def _rpcauth(user: str, password: str) -> str:
    """Return a login as a node's option rpcauth has it (upstream: share/rpcauth)."""
    salt = secrets.token_hex(16)
    return f"{user}:{salt}${hmac.new(salt.encode(), password.encode(), hashlib.sha256).hexdigest()}"


def _decimal_text(value: object) -> str:
    if isinstance(value, Decimal):
        return format(value, "f")
    raise TypeError(f"an argument of RPC cannot be of type {type(value).__name__}")


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

    Raises WaitTimeoutError if that takes more than `timeout` seconds, multiplied by the environment's TIMEOUT_FACTOR.
    The message is "waited ... s for `what`", and the result of `last_seen()`.
    """
    timeout *= timeout_factor()
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            seen = f"; last seen: {last_seen()}" if last_seen else ""
            raise WaitTimeoutError(f"waited {timeout:g} s for {what}{seen}")
        time.sleep(0.02)


def timeout_factor() -> float:
    """Return the factor of all timeouts. Raises NodeError if the environment's TIMEOUT_FACTOR is no such number."""
    text = os.environ.get(TIMEOUT_FACTOR) or "1"
    try:
        factor = float(text)
    except ValueError:
        factor = 0
    if not 0 < factor < float("inf"):
        raise NodeError(f"{TIMEOUT_FACTOR}={text} in the environment is no positive number")
    return factor


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
