"""Networks of real Bitcoin Core nodes on this machine, without any training."""

from typing import TYPE_CHECKING

from traincert.lazy import importer

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
    from traincert.regtest.faucet import Faucet
    from traincert.regtest.lasting import LastingNetwork, NodeStatus
    from traincert.regtest.links import Link
    from traincert.regtest.network import Network
    from traincert.regtest.node import Node, Options, wait_for
    from traincert.regtest.plugin import NetworkFactory

__all__ = [
    "BuildError",
    "Faucet",
    "LastingNetwork",
    "Link",
    "Network",
    "NetworkFactory",
    "Node",
    "NodeError",
    "NodeKind",
    "NodeStatus",
    "NodeUnreachableError",
    "Options",
    "RegtestError",
    "RpcError",
    "SourceError",
    "WaitTimeoutError",
    "build_node",
    "node_folder",
    "wait_for",
]

__getattr__ = importer(
    __name__,
    {
        "BuildError": "errors",
        "Faucet": "faucet",
        "LastingNetwork": "lasting",
        "Link": "links",
        "Network": "network",
        "NetworkFactory": "plugin",
        "Node": "node",
        "NodeError": "errors",
        "NodeKind": "build",
        "NodeStatus": "lasting",
        "NodeUnreachableError": "errors",
        "Options": "node",
        "RegtestError": "errors",
        "RpcError": "errors",
        "SourceError": "errors",
        "WaitTimeoutError": "errors",
        "build_node": "build",
        "node_folder": "build",
        "wait_for": "node",
    },
)
