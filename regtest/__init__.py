"""Networks of real Bitcoin Core nodes on this machine; knows nothing of training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traincert.regtest.build import NodeKind, build_node, node_folder
    from traincert.regtest.errors import (
        BuildError,
        NodeError,
        NodeUnreachableError,
        RegtestError,
        RpcError,
        SourceError,
        WaitTimeoutError,
    )
    from traincert.regtest.network import Network
    from traincert.regtest.node import Node, wait_for

__all__ = [
    "BuildError",
    "Network",
    "Node",
    "NodeError",
    "NodeKind",
    "NodeUnreachableError",
    "RegtestError",
    "RpcError",
    "SourceError",
    "WaitTimeoutError",
    "build_node",
    "node_folder",
    "wait_for",
]

_MODULES = ("errors", "build", "node", "network")


def __getattr__(name: str) -> Any:
    # Imported when asked for: every start of pytest, in any project, imports this package because of plugin.py.
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
