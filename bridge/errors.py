"""What can go wrong in the bridge.

BridgeError
├── CertificateError   bytes or values that no certificate may have; `reason` is the node's name for it
├── KeyFileError       a key file that cannot be made or must not be used
├── JournalError       a second certificate for one slot and round
├── NodeCallError      a node refused a call
└── NodeUnreachableError   a node did not answer
"""


class BridgeError(Exception):
    """Anything the user of the bridge may have to act on: one line that says what, where and what to do."""


class CertificateError(BridgeError):
    """A certificate that is not valid, for a reason that the node has the same name for."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"bad-traincert-{reason}: {message}")
        self.reason = f"bad-traincert-{reason}"


class KeyFileError(BridgeError):
    """A key file that cannot be made or must not be used."""


class JournalError(BridgeError):
    """A second certificate for one slot and round."""


class NodeCallError(BridgeError):
    """A node refused a call: `code` is its JSON-RPC error code."""

    def __init__(self, node: str, method: str, code: int, message: str) -> None:
        super().__init__(f"{node}: {method}: {message} (RPC error {code})")
        self.code = code


class NodeUnreachableError(BridgeError):
    """No answer from a node."""
