"""Key files (32 secret bytes in hex, mode 0600), and what is derived from a key."""

import os
import secrets
import stat
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

from bitcoin.core import Hash160
from bitcoin.core.script import OP_0, CScript
from coincurve import PrivateKey

from traincert.bridge.errors import KeyFileError


def create_secret(path: Path) -> bytes:
    """Make a new secret, write it to a new file of mode 0600, and return its 32 bytes.

    Raises KeyFileError if the file is there already (a key is never overwritten) or cannot be written.
    """
    secret = PrivateKey(secrets.token_bytes(32)).secret  # coincurve refuses the few numbers that are no key
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

    Raises KeyFileError if the file is missing or malformed, or if other users may read it.
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


@dataclass(frozen=True)
class NetworkKeys:
    """The secrets of a training network, 32 bytes each."""

    coordinators: tuple[bytes, ...]
    beacon: bytes
    miners: tuple[bytes, ...]


def create_network_keys(folder: Path, coordinators: int, miners: int) -> NetworkKeys:
    """Make the keys of a new network: coordinator0.key, ..., beacon.key, miner0.key, ... in a folder.

    Raises KeyFileError if one of them is there already or cannot be written.
    """
    return NetworkKeys(
        tuple(create_secret(folder / f"coordinator{i}.key") for i in range(coordinators)),
        create_secret(folder / "beacon.key"),
        tuple(create_secret(folder / f"miner{i}.key") for i in range(miners)),
    )


def load_network_keys(folder: Path) -> NetworkKeys:
    """Read the keys that `create_network_keys` made.

    Raises KeyFileError if there are none, or if one of them must not be used.
    """
    coordinators, miners = _load_numbered(folder, "coordinator"), _load_numbered(folder, "miner")
    return NetworkKeys(coordinators, load_secret(folder / "beacon.key"), miners)


def _load_numbered(folder: Path, role: str) -> tuple[bytes, ...]:
    """Read the secrets of a role, whose files are numbered from 0. There must be at least one."""
    more = takewhile(Path.exists, (folder / f"{role}{number}.key" for number in count(1)))
    return tuple(map(load_secret, [folder / f"{role}0.key", *more]))


def xonly_key(secret: bytes) -> bytes:
    """Return a secret's x-only public key, 32 bytes (BIP340)."""
    return PrivateKey(secret).public_key_xonly.format()


def payout_script(secret: bytes) -> CScript:
    """Return the scriptPubKey (P2WPKH, BIP141) that pays to a secret's public key."""
    return CScript([OP_0, Hash160(PrivateKey(secret).public_key.format())])
