"""Networks of real Bitcoin Core nodes on this machine; knows nothing of training."""

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
