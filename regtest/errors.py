"""What can go wrong in this package.

RegtestError
├── SourceError            the node's source cannot be had, or is not the pinned one
├── BuildError             it cannot be patched or compiled
├── WaitTimeoutError       a condition did not come true in time
└── NodeError              a node did not start, or died
    ├── NodeUnreachableError   it gives no answer
    └── RpcError               it answers a call with an error
"""


class RegtestError(Exception):
    """Base of every error that this package raises on purpose; its text is one message for a person."""


class SourceError(RegtestError):
    """The source cannot be fetched, read or trusted."""


class BuildError(RegtestError):
    """A tool is missing, a patch does not apply, or the compiler gave up."""


class WaitTimeoutError(RegtestError):
    """What was awaited did not happen; the message says what it was and what was seen last."""


class NodeError(RegtestError):
    """A node cannot be started, or ended by itself; the message names the node."""


class NodeUnreachableError(NodeError):
    """No JSON-RPC answer from the node: not running, not listening, or somebody else on its port."""


class RpcError(NodeError):
    """The node answered a call with an error."""

    def __init__(self, node: str, method: str, code: int, message: str) -> None:
        super().__init__(f"{node}: {method}: {message} (RPC error {code})")
        self.node = node
        self.method = method
        self.code = code
        self.message = message
