"""One node over RPC: a connection that stays open, is asked again while a node starts, and waits for blocks.

The only file that knows the library, bitcoinrpc. Errors are the harness's, so that a caller has one kind of each. The
harness itself (traincert.regtest.Node.rpc) makes a new connection for each call with requests: its calls come from many
threads at once, and from tests that run inside an event loop, where bitcoinrpc's own loop could not run.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import orjson
from bitcoinrpc import BitcoinRPC, RPCError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from traincert.bridge.errors import BridgeError
from traincert.regtest.errors import NodeUnreachableError, RpcError
from traincert.regtest.node import RPC_IN_WARMUP, RPC_TIMEOUT, read_conf, read_cookie

RETRY_TIME = 5.0  # seconds in which a node that is starting, or not there yet, is asked again


class _NotReadyError(NodeUnreachableError):
    """The call did not reach the node, or it is starting: asking again is harmless."""


class _CutOffError(NodeUnreachableError):
    """The node ended, or dropped the connection, before it answered."""


def retrying(error: type[Exception], seconds: float) -> Retrying:
    """Return a caller of functions: while one raises `error` it calls again, for at most so many seconds.

    Then it raises the last error.
    """
    return Retrying(
        retry=retry_if_exception_type(error),
        stop=stop_after_delay(seconds),
        wait=wait_exponential(multiplier=0.05, max=1),
        reraise=True,
    )


class NodeClient:
    """A node's RPC interface, over one connection that is kept open.

    The library is asynchronous; every call here waits for its answer, so that the loops that use it read from top to
    bottom and an interrupt ends them at once.
    """

    def __init__(self, url: str, cookie_file: Path, *, name: str) -> None:
        self.url = url
        self.name = name
        self._cookie_file = cookie_file
        self._runner = asyncio.Runner()
        self._rpc: BitcoinRPC | None = None

    @classmethod
    def from_datadir(cls, datadir: Path) -> Self:
        """Return a client of the regtest node that runs on a data directory: here, or where its rpcconnect says.

        Raises BridgeError if there is no bitcoin.conf that names its port.
        """
        try:
            options = read_conf(datadir)
        except OSError as error:
            raise BridgeError(f"{datadir} is no node's data directory: {error.strerror}: bitcoin.conf") from error
        if "rpcport" not in options:
            raise BridgeError(f"{datadir / 'bitcoin.conf'} names no rpcport")
        url = f"http://{options.get('rpcconnect', '127.0.0.1')}:{options['rpcport']}"
        return cls(url, datadir / "regtest" / ".cookie", name=datadir.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._rpc is not None:
            self._run(self._rpc.aclose())
            self._rpc = None
        self._runner.close()

    def call(self, method: str, *params: object) -> Any:
        """Call an RPC method and return its result, as JSON has it.

        Raises RpcError with the node's own error, and NodeUnreachableError if it did not answer.
        """
        return retrying(_NotReadyError, RETRY_TIME)(lambda: self._run(self._call(method, params)))

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        try:
            return self._runner.run(coroutine)
        finally:
            coroutine.close()  # an interrupt may come before it began, which Python would warn of

    async def _call(self, method: str, params: tuple[object, ...]) -> Any:
        try:
            if self._rpc is None:
                login = read_cookie(self._cookie_file)
                # trust_env: a proxy from the environment has no business between us and our node
                self._rpc = BitcoinRPC.from_config(self.url, login, timeout=RPC_TIMEOUT, trust_env=False)
            return await self._rpc.acall(method, list(params))
        except RPCError as error:
            if error.error["code"] == RPC_IN_WARMUP:
                raise _NotReadyError(f"{self.name}: {error}") from error
            raise RpcError(self.name, method, error.error["code"], str(error)) from error
        except FileNotFoundError:
            raise _NotReadyError(f"{self.name} is not running: no {self._cookie_file}") from None
        except httpx.ConnectError as error:
            raise _NotReadyError(f"{self.name} at {self.url} does not answer: {error}") from error
        except httpx.HTTPStatusError as error:  # 401: the node was restarted, its cookie is a new one
            if self._rpc is not None:
                await self._rpc.aclose()
                self._rpc = None
            raise _NotReadyError(f"{self.name} at {self.url}: {method}: {error.response.reason_phrase}") from error
        except (httpx.ReadError, httpx.RemoteProtocolError) as error:
            raise _CutOffError(f"{self.name} at {self.url}: {method}: {error or type(error).__name__}") from error
        except (httpx.HTTPError, orjson.JSONDecodeError) as error:
            problem = str(error) or type(error).__name__
            raise NodeUnreachableError(f"{self.name} at {self.url}: {method}: {problem}") from error

    def wait_for_height(self, height: int, timeout: float) -> bool:
        """Wait until the node's tip is at a height or above it, for at most `timeout` seconds; whether it is.

        A node that is restarted meanwhile is asked again.
        """
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(_CutOffError):
                if self._long_poll("waitforblockheight", height, deadline)["height"] >= height:
                    return True
            if time.monotonic() >= deadline:
                return False

    def wait_for_tip(self, block_hash: str, timeout: float) -> bool:
        """Wait until a block is the node's tip, for at most `timeout` seconds; whether it is.

        It is preferred to rivals with as much work, which the node may have heard of first.
        """
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(_CutOffError):
                if (
                    self._long_poll("waitforblock", block_hash, min(deadline, time.monotonic() + 1))["hash"]
                    == block_hash
                ):
                    return True
                with contextlib.suppress(RpcError):  # it has not heard of the block yet
                    self.call("preciousblock", block_hash)
            if time.monotonic() >= deadline:
                return False

    def _long_poll(self, method: str, awaited: str | int, deadline: float) -> Mapping[str, Any]:
        left = min(deadline - time.monotonic(), RPC_TIMEOUT / 2)
        answer: Mapping[str, Any] = self.call(method, awaited, max(1, int(left * 1000)))  # 0 would mean without end
        return answer
