"""Reports payments to a Bitcoin address."""

from payments.rpc import Rpc
from payments.watcher import Payment, Watcher

__all__ = ["Payment", "Rpc", "Watcher"]
