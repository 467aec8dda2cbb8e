"""Fetches the node's source with pip, verifies it and unpacks it."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from traincert.regtest.errors import SourceError


@dataclass(frozen=True)
class Upstream:
    """A pinned source distribution: one table of upstream.toml."""

    base: str
    """The table's name: a release of Bitcoin Core, for example 28."""
    name: str
    """The name of the Python package."""
    version: str
    """The version of the Python package."""
    sha256: str
    """The source distribution's sha256, in hex."""
    folder: str
    """The folder of Bitcoin Core's tree inside the source distribution."""
    tree_version: str
    """Bitcoin Core's version: major.minor."""
    borrowed: tuple[str, ...] = ()
    """Folders that are incomplete in the source distribution. The first base's folders replace them."""
    lacks: tuple[str, ...] = ()
    """Test programs of the patch that do not build on this base."""

    @classmethod
    def load(cls, file: Path, base: str | None = None) -> Self:
        """Read a base from upstream.toml; None is the first one. Raises SourceError for an unknown base."""
        bases = tomllib.loads(file.read_text())
        chosen = base or next(iter(bases))
        if chosen not in bases:
            raise SourceError(f"{file}: no base {chosen}; its bases are {', '.join(bases)}")
        return cls(chosen, **bases[chosen])

    @property
    def file_name(self) -> str:
        """The file name of the source distribution."""
        return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"


def fetch(upstream: Upstream, folder: Path) -> Path:
    """Return the path of the pinned source distribution in `folder`. If it is missing or damaged, fetch it with pip.

    Raises SourceError if pip cannot fetch it, or if its sha256 is not the pinned one.
    """
    kept = folder / upstream.file_name
    if kept.is_file() and file_sha256(kept) == upstream.sha256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        requirement = Path(temporary, "requirements.txt")
        requirement.write_text(f"{upstream.name}=={upstream.version} --hash=sha256:{upstream.sha256}\n")
        # `pip download` also runs code of the source distribution, for its metadata. With a hash pip verifies first.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", upstream.name, "--require-hashes", "--dest", temporary, "--requirement"]
        pip = subprocess.run([*command, str(requirement)], capture_output=True, text=True, check=False)
        if pip.returncode != 0:
            what = f"{upstream.name}=={upstream.version}"
            if "DO NOT MATCH THE HASHES" in pip.stderr:
                got = re.search(r"Got\s+(\w+)", pip.stderr)
                raise _wrong_sha256(what, upstream, got[1] if got else "another")
            errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or pip.stderr.splitlines()
            raise SourceError(f"pip cannot fetch {what}: {errors[-1] if errors else 'pip gave no reason'}")
        fetched = Path(temporary, upstream.file_name)
        if (got_sha256 := file_sha256(fetched)) != upstream.sha256:
            raise _wrong_sha256(fetched.name, upstream, got_sha256)
        fetched.replace(kept)
    return kept


def identify(source: Path, upstream: Upstream) -> str:
    """Return a sha256, in hex, of a user's own source: a tree or a tarball.

    Raises SourceError if the source cannot be read. A tarball with the pinned file's name must have the pinned sha256.
    """
    if not source.is_dir():
        digest = file_sha256(source)
        if source.name == upstream.file_name and digest != upstream.sha256:
            raise _wrong_sha256(str(source), upstream, digest)
        return digest
    return hash_files(source, [path for path in source.rglob("*") if ".git" not in path.relative_to(source).parts])


def unpack(source: Path, upstream: Upstream, target: Path) -> None:
    """Copy or extract Bitcoin Core's tree into the new folder `target`.

    `source` is a tarball or a folder. It holds Bitcoin Core's tree, or an unpacked source distribution with that tree.
    Raises SourceError if `source` is damaged, contains unsafe paths, or has another version of Bitcoin Core.
    """
    if source.is_dir():
        inner = source / upstream.folder
        root = inner if (inner / "CMakeLists.txt").is_file() else source
        shutil.copytree(root, target, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    else:
        try:
            _extract(source, upstream, target)
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            problem = str(error).partition("\n")[0].rstrip(":")  # tarfile adds a line for each compression it tries
            raise SourceError(f"{source}: damaged or not a tar archive: {problem}") from error
    _check_version(source, upstream, target / "CMakeLists.txt")


def file_sha256(file: Path) -> str:
    """Return a file's sha256, in hex. Raises SourceError if the file cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}") from error


def hash_files(root: Path, paths: list[Path]) -> str:
    """Return one sha256, in hex, of the files in `paths`: of their contents, and of their names relative to `root`.

    Folders in `paths` are ignored. Raises SourceError if a file cannot be read.
    """
    total = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            total.update(f"{path.relative_to(root).as_posix()}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def _wrong_sha256(what: str, upstream: Upstream, got: str) -> SourceError:
    return SourceError(f"{what}: sha256 is {got}, upstream.toml pins {upstream.sha256}")


def _extract(tarball: Path, upstream: Upstream, target: Path) -> None:
    """Extract the tree from a tarball.

    Bitcoin Core's tree has only plain files and folders. This refuses links, devices, and paths outside the target.
    tarfile's data filter does the same, but Debian 12's Python does not have it.
    """
    with tarfile.open(tarball) as archive:
        members = archive.getmembers()
        for member in members:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise SourceError(f"{tarball}: refused, it would write outside its folder: {member.name}")
            if not (member.isfile() or member.isdir()):
                raise SourceError(f"{tarball}: refused, neither a file nor a folder: {member.name}")
        top = PurePosixPath(members[0].name).parts[0] if members else ""
        root = PurePosixPath(top, upstream.folder)
        if not any(PurePosixPath(member.name).is_relative_to(root) for member in members):
            root = PurePosixPath(top)  # a plain tree
        for member in members:
            path = PurePosixPath(member.name)
            content = archive.extractfile(member)
            if content is None or not path.is_relative_to(root):
                continue
            file = target / path.relative_to(root)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                shutil.copyfileobj(content, stream)
            file.chmod(0o755 if member.mode & 0o100 else 0o644)


def _check_version(source: Path, upstream: Upstream, cmake_lists: Path) -> None:
    text = cmake_lists.read_text(errors="replace") if cmake_lists.is_file() else ""
    parts = [re.search(rf"set\(CLIENT_VERSION_{part} (\d+)\)", text) for part in ("MAJOR", "MINOR")]
    if not all(parts):
        raise SourceError(f"{source}: not a source tree of Bitcoin Core")
    version = ".".join(part[1] for part in parts if part)
    if version != upstream.tree_version:
        raise SourceError(f"{source}: Bitcoin Core {version}, expected {upstream.tree_version}")
