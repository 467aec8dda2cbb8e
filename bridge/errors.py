"""What can go wrong in the bridge.

BridgeError
├── EncodingError      a value that its field cannot hold
├── CertificateError   a certificate that breaks a rule; `reason` is the node's name for the rule
├── KeyFileError       a key file that cannot be made or must not be used
├── MessageError       a statement that is forged, altered or of a wrong form (messages.py)
├── ChainError         a block that breaks a rule, or cannot be read (verifier.py)
├── ReceiptError       a receipt that is wrong, or cannot be checked (receipts.py)
├── CosignError        a certificate that a cosigner must not sign (checker.py)
├── BrokerUnreachableError  nothing listens at the broker's address (broker.py)
└── JournalError       a journal that refuses to sign, or that cannot be used

A node that refuses a call or does not answer raises the harness's errors, traincert.regtest.errors: RpcError and
NodeUnreachableError.
"""


class BridgeError(Exception):
    """Base of the bridge's errors: one line that says what is wrong, where, and what to do."""


class EncodingError(BridgeError):
    """A value that its field cannot hold: a hash of another length than 32 bytes, or a number out of range."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}: {expected} expected, found {value!r}")
        self.field = field


class CertificateError(BridgeError):
    """A certificate that breaks a rule of SPEC.md. `reason` is what the node calls it, bad-traincert-..."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"bad-traincert-{reason}: {message}")
        self.reason = f"bad-traincert-{reason}"


class KeyFileError(BridgeError):
    """A key file that cannot be made or must not be used."""


class JournalError(BridgeError):
    """The journal has another certificate for the slot and round, or is no journal of this format."""
