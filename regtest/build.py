"""Patches and builds the node, and caches the result; can also build a stock node, without the patch.

The cache folder (`cache_folder()`) contains:

    nodes/<key>/   finished builds: bin/, manifest.json, and test/ and more for upstream's functional tests
    sources/       the pinned source distributions
    build/         the current build; the process that holds `lock` owns this folder, and empties it first
    lock           the lock file: only one build runs at a time
    logs/          the output of the last build of each key
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from traincert.regtest.errors import BuildError
from traincert.regtest.processes import bound_to_us
from traincert.regtest.source import Upstream, fetch, file_sha256, hash_files, identify, unpack

Progress = Callable[[str, int, int], None]
"""Called with the step's name, the work done, and the total work (0: unknown)."""

WAITING = "waiting for another build"
"""The step of a build that waits until another process has built."""

PATCH_FOLDER = Path(__file__).parent.parent / "bitcoind-patch"

CMAKE_FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DAPPEND_LDFLAGS=-s",  # no symbols, because they are most of the size
    "-DBUILD_BENCH=OFF",
    "-DBUILD_FUZZ_BINARY=ON",  # defines the ninja targets; _build() chooses which to build
    "-DBUILD_GUI=OFF",
    "-DBUILD_TESTS=ON",  # the same
    "-DBUILD_TX=OFF",
    "-DBUILD_UTIL=OFF",
    "-DBUILD_WALLET_TOOL=OFF",
    "-DENABLE_IPC=OFF",
    "-DENABLE_WALLET=ON",
    "-DWITH_ZMQ=ON",
]

# Test programs that the patch adds.
TEST_PROGRAMS = ["test_training", "training_check", "fuzz_training"]

# Parts of the source tree that functional tests read, and upstream's clang-format file, for `make test`.
KEPT = ["test", "contrib", "share/rpcauth", "src/.clang-format", "src/rpc/client.cpp", "src/test/data/asmap.raw"]

# Program or header -> its Debian package. We ask the compiler whether a header exists.
PROGRAMS = {
    "c++": "build-essential",
    "cc": "build-essential",
    "cmake": "cmake",
    "ninja": "ninja-build",
    "patch": "patch",
    "pkg-config": "pkgconf",
    "setpriv": "util-linux",
}
HEADERS = {
    "boost/version.hpp": "libboost-dev",
    "event2/event.h": "libevent-dev",
    "sqlite3.h": "libsqlite3-dev",
    "zmq.h": "libzmq3-dev",
}


def cache_folder() -> Path:
    """Return traincert's folder in the user's cache: $XDG_CACHE_HOME/traincert or ~/.cache/traincert.

    Raises BuildError if the user has no home folder, as in a container whose user was chosen by number.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "traincert")
    except RuntimeError:
        raise BuildError("this user has no home folder: set XDG_CACHE_HOME to a folder for built nodes") from None


@dataclass(frozen=True)
class NodeKind:
    """Which node to build. The default is the patched node on the first base of upstream.toml."""

    base: str | None = None
    """The name of a base in upstream.toml; None is the first one."""
    stock: bool = False
    """Build without the patch."""
    source: Path | None = None
    """A source tree or tarball to use instead of the pinned one. It must have the base's version."""
    patch: Path = PATCH_FOLDER
    """The folder with upstream.toml, the new files and the diffs."""

    @property
    def upstream(self) -> Upstream:
        """The pinned source of the base. Raises SourceError for an unknown base."""
        return Upstream.load(self.patch / "upstream.toml", self.base)

    def patch_files(self) -> list[Path]:
        """Return the files in the patch folder that affect the build; none for a stock node."""
        return [] if self.stock else [*new_files(self.patch), *diffs(self.patch, self.base)]


PATCHED = NodeKind()


def node_folder(kind: NodeKind = PATCHED) -> Path:
    """Return the folder of this build, which need not exist yet. The programs are in its bin/.

    Raises SourceError for an unknown base or an unreadable source.
    """
    upstream = kind.upstream
    recipe = {
        "source": identify(kind.source, upstream) if kind.source else upstream.sha256,
        "borrowed": [*upstream.borrowed, NodeKind(patch=kind.patch).upstream.sha256] if upstream.borrowed else [],
        "patch": hash_files(kind.patch, kind.patch_files()),
        "flags": CMAKE_FLAGS,
        "environment": {name: os.environ.get(name, "") for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")},
        "kept": KEPT,
    }
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:20]
    return cache_folder() / "nodes" / key


def build_log(target: Path) -> Path:
    """Return the file for the output of the build of `target`, a folder that `node_folder` returned."""
    return cache_folder() / "logs" / f"{target.name}.log"


class ProgressLines:
    """Says a build's progress in lines of text: one for each step, and one for each tenth of it."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._said = ""

    def update(self, step: str, done: int, total: int) -> None:
        """Say how far the build is, unless the last line says the same. This is a `Progress`."""
        line = f"node: {step} {10 * done // total * 10} %" if total else f"node: {step}"
        if line != self._said:
            self._say(line)
            self._said = line


def build_node(kind: NodeKind = PATCHED, progress: Progress | None = None) -> Path:
    """Build the node unless the cache has it, and return its folder.

    A second build at the same time waits for the first. A build that fails leaves only its log.
    Raises SourceError or BuildError. If the compilation fails, the message names the log.
    """
    target = node_folder(kind)
    if target.is_dir():
        return target
    report = progress or (lambda _step, _done, _total: None)
    _check_tools()
    with _build_folder(report) as (work, lock):
        target = node_folder(kind)  # compute it again: the patch may have changed during the wait for the lock
        if not target.is_dir():
            _build(kind, target, work, partial(_run, lock=lock), report)
    return target


def _build(kind: NodeKind, target: Path, work: Path, run: Callable[..., None], report: Progress) -> None:
    # Every build uses the same absolute paths: ccache recognises a file only by its path.
    tree, out, result = work / "src", work / "out", work / "node"
    source = prepare_tree(kind, tree, report)
    targets = ["bitcoind", "bitcoin-cli"]
    if any(file.name == "training_tests.cpp" for file in kind.patch_files()):
        targets += [program for program in TEST_PROGRAMS if program not in kind.upstream.lacks]
    log_file = build_log(target)
    log_file.parent.mkdir(exist_ok=True)
    with log_file.open("w+", buffering=1) as log:  # flush each line, so that users can follow the log
        report("configuring", 0, 0)
        programs = f"-DCMAKE_RUNTIME_OUTPUT_DIRECTORY={out}/bin"  # newer releases do this themselves
        run(["cmake", "-S", str(tree), "-B", str(out), "-G", "Ninja", programs, *CMAKE_FLAGS], log=log)
        run(["ninja", "-C", str(out), *targets], log=log, report=partial(report, "compiling"))

    (result / "bin").mkdir(parents=True)
    for name in targets:
        shutil.copy2(out / "bin" / name, result / "bin")
    for name in KEPT:
        _copy(tree / name, result / name)
    config = (out / "test/config.ini").read_text()
    # The flag that defines our fuzz targets says that upstream's are built.
    config = config.replace("\nENABLE_FUZZ_BINARY=", "\n#ENABLE_FUZZ_BINARY=")
    for folder in (tree, out):
        config = config.replace(str(folder), str(target))
    (result / "test/config.ini").write_text(config)
    (result / "manifest.json").write_text(json.dumps(_manifest(kind, source), indent=2) + "\n")
    target.parent.mkdir(exist_ok=True)
    result.rename(target)


def prepare_tree(kind: NodeKind, tree: Path, report: Progress) -> Path:
    """Write the source into the new folder `tree`, patch it unless stock, and return the path of the source used.

    Raises SourceError or BuildError.
    """
    source = kind.source
    if source is None:
        report("fetching", 0, 0)
        source = fetch(kind.upstream, cache_folder() / "sources")
    report("unpacking", 0, 0)
    unpack(source, kind.upstream, tree)
    if kind.upstream.borrowed:
        _borrow(kind, tree)
    if not kind.stock:
        apply_patch(kind.patch, tree, kind.base)
    return source


def _borrow(kind: NodeKind, tree: Path) -> None:
    lender = NodeKind(patch=kind.patch).upstream
    with tempfile.TemporaryDirectory() as temporary:
        lent = Path(temporary, "tree")
        unpack(fetch(lender, cache_folder() / "sources"), lender, lent)
        for folder in kind.upstream.borrowed:
            shutil.rmtree(tree / folder, ignore_errors=True)
            shutil.copytree(lent / folder, tree / folder)


def new_files(patch: Path) -> list[Path]:
    """Return the files that the patch adds to upstream's tree. They are the same for each base."""
    return [*_files(patch / "src"), *_files(patch / "test/functional")]


def diffs(patch: Path, base: str | None = None) -> list[Path]:
    """Return the diffs for a base, in the order of their names.

    A diff in patches/<base>/ replaces the diff of the same name in patches/.
    """
    folders = [patch / "patches", patch / "patches" / base] if base else [patch / "patches"]
    chosen = {file.name: file for folder in folders for file in folder.glob("*.patch")}
    return [chosen[name] for name in sorted(chosen)]


def apply_patch(patch: Path, tree: Path, base: str | None = None) -> None:
    """Add the patch folder's new files to a source tree, then apply the base's diffs in order.

    Raises BuildError if upstream already has a new file, or if a diff does not apply exactly.
    """
    for file in new_files(patch):
        new = tree / file.relative_to(patch)
        if new.exists():
            raise BuildError(f"{file}: upstream has this file already; change it with a diff in patches/")
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, new)
    for diff in diffs(patch, base):
        command = [
            "patch",
            "-p1",
            "--batch",
            "--forward",
            "--fuzz=0",
            "--no-backup-if-mismatch",
            f"--input={diff.absolute()}",
        ]
        result = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise BuildError(f"{diff}: does not apply: {_first_rejected(result.stdout + result.stderr)}")


def _first_rejected(output: str) -> str:
    """Return the first file that the program `patch` could not change, and the reason, from its output."""
    why = re.search(r".*(FAILED|can't find file|previously applied|malformed|garbage).*", output)
    if why is None:
        return output.strip()
    if "can't find file" in why[0]:  # `patch` then quotes lines of the diff, and the quote names the file
        quoted = re.search(r"^\|--- (?:a/)?(\S+)", output[why.end() :], re.MULTILINE)
        return f"{quoted[1] if quoted else '?'}: no such file in the tree"
    files = re.findall(r"^patching file (.+)", output[: why.start()], re.MULTILINE)
    return f"{files[-1]}: {why[0].strip()}" if files else why[0].strip()


def _copy(old: Path, new: Path) -> None:
    """Copy a file or folder if it exists: some bases lack some files."""
    if old.is_dir():
        shutil.copytree(old, new)
    elif old.exists():
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(old, new)


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


@contextlib.contextmanager
def _build_folder(report: Progress) -> Iterator[tuple[Path, IO[str]]]:
    """Wait for the lock, then yield the empty build folder and the open lock file."""
    work = cache_folder() / "build"
    cache_folder().mkdir(parents=True, exist_ok=True)
    with (cache_folder() / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(WAITING, 0, 0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work, lock
        finally:
            shutil.rmtree(work)


def _run(
    command: list[str], *, log: IO[str], lock: IO[str], report: Callable[[int, int], None] = lambda _done, _total: None
) -> None:
    """Run one step of the build and write its output to `log`. Raises BuildError if the step fails.

    If we are killed, the kernel ends the step soon after. The step inherits `lock`: the next build waits for its end.
    """
    start = log.tell()
    process = subprocess.Popen(
        bound_to_us(command, "TERM"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[lock.fileno()],
        start_new_session=True,  # Ctrl-C reaches only us; we then send ninja SIGTERM, and ninja ends its compilers
        env={**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"},
    )
    try:
        for line in process.stdout or []:
            log.write(line)
            if match := re.match(r"\[(\d+)/(\d+)\] ", line):
                report(int(match[1]), int(match[2]))
        process.wait()
    finally:
        _end(process)
    if process.returncode != 0:
        log.seek(start)
        lines = log.read().splitlines()
        # ninja lets other compilers finish after an error, so search the whole output for the first error.
        errors = (i for i, line in enumerate(lines) if re.search("error: |CMake Error|undefined reference", line))
        first = next(errors, max(0, len(lines) - 10))
        said = "\n".join(line for line in lines[first : first + 10] if line.strip())
        raise BuildError(f"{command[0]} failed: {said}\nThe full log is {log.name}")


def _end(process: subprocess.Popen[str]) -> None:
    """Make sure that a step has ended, also after an exception."""
    with process:  # closes the pipe
        process.terminate()  # no effect if the step has already ended
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _check_tools() -> None:
    """Check the programs and libraries that a build needs. The BuildError names the Debian packages to install."""
    programs = {**PROGRAMS}
    for variable, default in (("CXX", "c++"), ("CC", "cc")):  # CMake reads the same variables
        if chosen := os.environ.get(variable):
            programs[chosen.split()[0]] = programs.pop(default)
    missing = {program: package for program, package in programs.items() if shutil.which(program) is None}
    compiler = (os.environ.get("CXX") or "c++").split()
    if compiler[0] not in missing:
        missing |= {header: package for header, package in HEADERS.items() if not _has_header(compiler, header)}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise BuildError(f"not found: {', '.join(missing)}; on Debian: apt-get install {packages}")


def _has_header(compiler: list[str], header: str) -> bool:
    command = [*compiler, "-E", "-x", "c++", "-o", os.devnull, "-"]
    return not subprocess.run(
        command, input=f"#include <{header}>\n", text=True, stderr=subprocess.DEVNULL, check=False
    ).returncode


def _manifest(kind: NodeKind, source: Path) -> dict[str, object]:
    upstream = kind.upstream
    compiler = [*(os.environ.get("CXX") or "c++").split(), "--version"]
    return {
        "source": {"file": source.name, "sha256": identify(source, upstream)},
        "base": upstream.base,
        "bitcoin_core": upstream.tree_version,
        "stock": kind.stock,
        "patch": {str(path.relative_to(kind.patch)): file_sha256(path) for path in kind.patch_files()},
        "flags": CMAKE_FLAGS,
        "compiler": subprocess.run(compiler, capture_output=True, text=True, check=True).stdout.splitlines()[0],
    }
