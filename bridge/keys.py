"""Key files: 32 secret bytes in hex, readable by their owner only."""

import os
import secrets
import stat
from pathlib import Path

from coincurve import PrivateKey

from traincert.bridge.errors import KeyFileError


def create_secret(path: Path) -> bytes:
    """Make a new secret, write it to a new file of mode 0600, and return its 32 bytes.

    Raises KeyFileError if the file is there already (a key is never overwritten) or cannot be written.
    """
    secret = PrivateKey(secrets.token_bytes(32)).secret  # refuses the few numbers that are no key
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secret.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise KeyFileError(f"{path} is there already: a key is never overwritten") from None
    except OSError as error:
        raise KeyFileError(f"cannot write the key file {path}: {error.strerror}") from error
    return secret


def load_secret(path: Path) -> bytes:
    """Read the 32 secret bytes of a key file.

    Raises KeyFileError if it is missing, malformed, or if others may read it.
    """
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise KeyFileError(f"others may read the key file {path}: chmod 600 it (and think of making a new key)")
        secret = bytes.fromhex(path.read_text().strip())
        return PrivateKey(secret).secret if len(secret) == 32 else _malformed(path)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}") from error
    except ValueError:
        return _malformed(path)


def _malformed(path: Path) -> bytes:
    raise KeyFileError(f"the key file {path} does not hold a secret key of 64 hex digits")


def xonly_key(secret: bytes) -> bytes:
    """Return a secret's x-only public key, 32 bytes (BIP340)."""
    return PrivateKey(secret).public_key_xonly.format()
