"""From a cycle's result to a block: certificates, the lottery, blocks, the coordinator, the command line."""

from typing import TYPE_CHECKING

from traincert.lazy import importer

if TYPE_CHECKING:
    from traincert.bridge.chain import CertifiedBlock, certificate_json, read_chain, read_params
    from traincert.bridge.consensus.certificate import Certificate, CoordinatorSignature, Draw
    from traincert.bridge.consensus.lottery import ContributionTable, Leaf, TreeNode
    from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
    from traincert.bridge.consensus.rules import (
        Payload,
        check_training_certificate,
        contextual_check_training_certificate,
        read_training_payload,
    )
    from traincert.bridge.errors import BridgeError, CertificateError, EncodingError, JournalError, KeyFileError
    from traincert.bridge.rpc import NodeClient
    from traincert.bridge.testing.network import TrainingNetwork
    from traincert.bridge.testing.plugin import TrainingNetworkFactory

__all__ = [
    "BridgeError",
    "Certificate",
    "CertificateError",
    "CertifiedBlock",
    "ContributionTable",
    "CoordinatorSignature",
    "Draw",
    "EncodingError",
    "JournalError",
    "KeyFileError",
    "Leaf",
    "NodeClient",
    "Payload",
    "TrainingKeys",
    "TrainingNetwork",
    "TrainingNetworkFactory",
    "TrainingParams",
    "TreeNode",
    "certificate_json",
    "check_training_certificate",
    "contextual_check_training_certificate",
    "read_chain",
    "read_params",
    "read_training_payload",
]

__getattr__ = importer(
    __name__,
    {
        "BridgeError": "errors",
        "Certificate": "consensus.certificate",
        "CertificateError": "errors",
        "CertifiedBlock": "chain",
        "ContributionTable": "consensus.lottery",
        "CoordinatorSignature": "consensus.certificate",
        "Draw": "consensus.certificate",
        "EncodingError": "errors",
        "JournalError": "errors",
        "KeyFileError": "errors",
        "Leaf": "consensus.lottery",
        "NodeClient": "rpc",
        "Payload": "consensus.rules",
        "TrainingKeys": "consensus.params",
        "TrainingNetwork": "testing.network",
        "TrainingNetworkFactory": "testing.plugin",
        "TrainingParams": "consensus.params",
        "TreeNode": "consensus.lottery",
        "certificate_json": "chain",
        "check_training_certificate": "consensus.rules",
        "contextual_check_training_certificate": "consensus.rules",
        "read_chain": "chain",
        "read_params": "chain",
        "read_training_payload": "consensus.rules",
    },
)
