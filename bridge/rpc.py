"""One node over RPC: a connection that stays open, repeats calls while the node starts, and waits for blocks.

This is the only file that uses the library bitcoinrpc. Its errors are the harness's (traincert.regtest.errors), so
callers see one kind of each. The harness itself calls nodes with requests (traincert.regtest.Node.rpc): tests call it
from many threads, and from inside a running event loop, where bitcoinrpc would need a loop of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
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
from traincert.trainer.interrupts import ctrl_c_later

RETRY_TIME = 5.0  # seconds for which a node that is starting, or is not there yet, is asked again


class _NotReadyError(NodeUnreachableError):
    """The call did not reach the node, or the node is starting. Calling again does no harm."""


class _CutOffError(NodeUnreachableError):
    """The node ended or closed the connection before it answered."""


def retrying(error: type[Exception], seconds: float) -> Retrying:
    """Return tenacity's caller: it calls a function again while that raises `error`, for at most `seconds`.

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

    bitcoinrpc is asynchronous. Each call here waits for its answer: the loops that use it read from top to bottom, and
    Ctrl-C ends them at once. Not for several threads at once. A call that does not reach the node is repeated for
    `retry_time` seconds.
    """

    def __init__(self, url: str, cookie_file: Path, *, name: str, retry_time: float = RETRY_TIME) -> None:
        self.url = url
        self.name = name
        self._retry_time = retry_time
        self._cookie_file = cookie_file
        self._runner = asyncio.Runner()
        with ctrl_c_later():  # a half-made event loop would print a traceback
            self._runner.get_loop()
        self._rpc: BitcoinRPC | None = None

    @classmethod
    def from_datadir(cls, datadir: Path, *, retry_time: float = RETRY_TIME) -> Self:
        """Return a client of the regtest node on a data directory. The node is here, or where its rpcconnect says.

        Raises BridgeError if the directory has no bitcoin.conf with an rpcport.
        """
        try:
            options = read_conf(datadir)
        except OSError as error:
            raise BridgeError(f"{datadir} is no node's data directory: {error.strerror}: bitcoin.conf") from error
        if "rpcport" not in options:
            raise BridgeError(f"{datadir / 'bitcoin.conf'} names no rpcport")
        url = f"http://{options.get('rpcconnect', '127.0.0.1')}:{options['rpcport']}"
        return cls(url, datadir / "regtest" / ".cookie", name=datadir.name, retry_time=retry_time)

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
        """Call an RPC method and return its result, decoded from JSON.

        Raises RpcError with the node's own error, and NodeUnreachableError if the node does not answer.
        """
        return self._call(method, lambda rpc: rpc.acall(method, list(params)))

    def call_each(self, method: str, arguments: Iterable[Sequence[object]]) -> list[Any]:
        """Call an RPC method with each of these arguments, in one request. Return the results, in this order.

        Where the node answers with an error, the result is an RpcError, which is not raised. Raises
        NodeUnreachableError if the node does not answer.
        """
        params = [list(each) for each in arguments]
        results: list[Any] = self._call(method, lambda rpc: self._post(rpc, method, params))
        return results

    def _call(self, method: str, ask: Callable[[BitcoinRPC], Coroutine[Any, Any, Any]]) -> Any:
        return retrying(_NotReadyError, self._retry_time)(lambda: self._run(self._ask(method, ask)))

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        try:
            return self._runner.run(coroutine)
        finally:
            coroutine.close()  # if Ctrl-C came before it began, Python would warn

    async def _post(self, rpc: BitcoinRPC, method: str, params: list[list[object]]) -> list[Any]:
        """Make calls in one request, which bitcoinrpc cannot do."""
        calls = [{"jsonrpc": "2.0", "id": i, "method": method, "params": each} for i, each in enumerate(params)]
        response = await rpc.client.post(self.url, content=orjson.dumps(calls))
        response.raise_for_status()
        results: list[Any] = []
        try:
            for _, answer in zip(calls, orjson.loads(response.content), strict=True):
                error = answer.get("error")
                if error and error["code"] == RPC_IN_WARMUP:
                    raise _NotReadyError(f"{self.name}: {error['message']}")
                failed = error and RpcError(self.name, method, error["code"], error["message"])
                results.append(failed or answer["result"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise NodeUnreachableError(f"{self.name} at {self.url}: {method}: not a JSON-RPC answer") from error
        return results

    async def _check_taken(self, response: httpx.Response) -> None:
        """Raise _NotReadyError if the node did not take a request: it shuts down, or too many wait.

        Then its answer is a line of text, or HTML (upstream: httpserver.cpp), which bitcoinrpc cannot read.
        """
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            said = (await response.aread()).decode(errors="replace").strip()
            reason = response.reason_phrase if said.startswith("<") or not said else said
            raise _NotReadyError(f"{self.name} at {self.url}: {reason}")

    async def _ask(self, method: str, ask: Callable[[BitcoinRPC], Coroutine[Any, Any, Any]]) -> Any:
        try:
            if self._rpc is None:
                login = read_cookie(self._cookie_file)
                # trust_env: a proxy of the environment must not stand between us and our node
                self._rpc = BitcoinRPC.from_config(self.url, login, timeout=RPC_TIMEOUT, trust_env=False)
                self._rpc.client.event_hooks = {"response": [self._check_taken]}
            return await ask(self._rpc)
        except RPCError as error:
            if error.error["code"] == RPC_IN_WARMUP:
                raise _NotReadyError(f"{self.name}: {error}") from error
            raise RpcError(self.name, method, error.error["code"], str(error)) from error
        except FileNotFoundError:
            raise _NotReadyError(f"{self.name} is not running: no {self._cookie_file}") from None
        except httpx.ConnectError as error:
            raise _NotReadyError(f"{self.name} at {self.url} does not answer: {error}") from error
        except httpx.HTTPStatusError as error:  # 401: the node was restarted and has a new cookie
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
        """Wait until the node's tip has at least this height, for at most `timeout` seconds. Returns whether it has.

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
        """Wait until a block is the node's tip, for at most `timeout` seconds. Returns whether it is.

        The node may have received another block with as much work first: it is told to prefer this one (preciousblock).
        """
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(_CutOffError):
                if (
                    self._long_poll("waitforblock", block_hash, min(deadline, time.monotonic() + 1))["hash"]
                    == block_hash
                ):
                    return True
                with contextlib.suppress(RpcError):  # the node does not have the block yet
                    self.call("preciousblock", block_hash)
            if time.monotonic() >= deadline:
                return False

    def _long_poll(self, method: str, awaited: str | int, deadline: float) -> Mapping[str, Any]:
        left = min(deadline - time.monotonic(), RPC_TIMEOUT / 2)
        answer: Mapping[str, Any] = self.call(
            method, awaited, max(1, int(left * 1000))
        )  # to the node 0 means: without end
        return answer
