"""The errors of this package.

RegtestError
├── SourceError            the node's source is missing, or is not the pinned one
├── BuildError             the source cannot be patched or compiled
├── WaitTimeoutError       a condition was not true in time
└── NodeError              a node did not start or died, or a request for a node or network is refused
    ├── NodeUnreachableError   the node does not answer
    └── RpcError               the node answered a call with an error
"""


class RegtestError(Exception):
    """Base of all errors that this package raises itself. The text is a complete message for the user."""


class SourceError(RegtestError):
    """The source cannot be fetched, read or trusted."""


class BuildError(RegtestError):
    """A tool is missing, a diff does not apply, or the compilation failed."""


class WaitTimeoutError(RegtestError):
    """A condition was not true in time. The message names the condition and the last known state."""


class NodeError(RegtestError):
    """A node does not start, has died, or cannot do what was asked. Also raised for a wrong name, link or folder."""


class NodeUnreachableError(NodeError):
    """The node gave no JSON-RPC answer: it does not run or listen, or another program uses its port."""


class RpcError(NodeError):
    """The node answered an RPC call with an error; `code` is Bitcoin Core's (upstream: rpc/protocol.h)."""

    def __init__(self, node: str, method: str, code: int, message: str) -> None:
        super().__init__(f"{node}: {method}: {message} (RPC error {code})")
        self.node = node
        self.method = method
        self.code = code
        self.message = message
