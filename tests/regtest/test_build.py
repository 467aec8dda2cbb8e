"""A build is made once, whole, or not at all. Real cmake, ninja and compiler on a tiny tree."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from traincert.regtest.build import NodeKind, build_node, cache_folder, node_folder
from traincert.regtest.errors import BuildError, SourceError
from traincert.regtest.node import wait_for

# A build in another process; it prints each step that it comes to.
BUILD = """\
import sys
from pathlib import Path
from traincert.regtest.build import NodeKind, build_node
from traincert.regtest.errors import RegtestError
try:
    kind = NodeKind(source=Path(sys.argv[1]), patch=Path(sys.argv[2]))
    print(build_node(kind, lambda step, done, total: print(step, flush=True)))
except RegtestError as error:
    sys.exit(str(error))
"""
PATCH = """\
--- a/src/main.cpp
+++ b/src/main.cpp
@@ -3,5 +3,5 @@
 int main()
 {
-    std::puts("upstream");
+    std::puts("patched");
     return 0;
 }
"""


def start_build(source: Path, patch: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(source), str(patch)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def only_keeps(cache: Path, *names: str) -> bool:
    """Whether the cache folder holds nothing but these (and the lock)."""
    return {path.name for path in cache.iterdir()} == {"lock", *names}


def test_build_holds_programs_tests_and_manifest(sdist: Path, patch: Path, cache: Path) -> None:
    (patch / "src").mkdir()
    (patch / "src/new.h").write_text("// new\n")
    steps: list[tuple[str, int, int]] = []
    folder = build_node(NodeKind(source=sdist, patch=patch), lambda *step: steps.append(step))
    assert folder == node_folder(NodeKind(source=sdist, patch=patch))
    for name in ("bitcoind", "bitcoin-cli"):
        assert subprocess.check_output([folder / "bin" / name]) == b"upstream\n"
    assert (folder / "test/functional/feature_upstream.py").is_file()
    assert (folder / "test/config.ini").read_text() == f"SRCDIR={folder}\nBUILDDIR={folder}\n"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["base"], manifest["bitcoin_core"], manifest["stock"]) == ("31", "31.99", False)
    assert list(manifest["patch"]) == ["src/new.h"]
    assert steps[:2] == [("unpacking", 0, 0), ("configuring", 0, 0)]
    assert steps[-1] == ("compiling", 4, 4)
    assert only_keeps(cache, "nodes", "logs")


def test_stock_build_is_the_source_alone(tree: Path, patch: Path) -> None:
    (patch / "src/test").mkdir(parents=True)
    (patch / "src/test/training_tests.cpp").write_text("no C++\n")
    (patch / "test/functional").mkdir(parents=True)
    (patch / "test/functional/feature_new.py").write_text("# new\n")
    (patch / "patches/01.patch").write_text("no patch\n")
    kind = NodeKind(stock=True, source=tree, patch=patch)
    folder = build_node(kind)
    assert {program.name for program in (folder / "bin").iterdir()} == {"bitcoind", "bitcoin-cli"}
    assert [file.name for file in (folder / "test/functional").iterdir()] == ["feature_upstream.py"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["stock"], manifest["patch"]) == (True, {})
    assert folder != node_folder(NodeKind(source=tree, patch=patch))
    (patch / "patches/01.patch").write_text("another\n")
    assert node_folder(kind) == folder


def test_other_base_is_built_of_its_own_source_and_diffs(tree: Path, patch: Path) -> None:
    (patch / "patches/01.patch").write_text("no patch\n")
    (patch / "patches/28").mkdir()
    (patch / "patches/28/01.patch").write_text(PATCH)
    with pytest.raises(SourceError, match=r"Bitcoin Core 31\.99, expected 28\.99"):
        build_node(NodeKind("28", source=tree, patch=patch))
    lists = tree / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace("MAJOR 31", "MAJOR 28"))
    folder = build_node(NodeKind("28", source=tree, patch=patch))
    assert subprocess.check_output([folder / "bin/bitcoind"]) == b"patched\n"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["base"], list(manifest["patch"])) == ("28", ["patches/28/01.patch"])


def test_unknown_base_is_refused(patch: Path) -> None:
    with pytest.raises(SourceError, match=r"upstream\.toml: no base 27; its bases are 31, 28$"):
        build_node(NodeKind("27", patch=patch))


def test_patchs_test_programs_are_built_where_it_has_them(tree: Path, patch: Path) -> None:
    (patch / "src/test").mkdir(parents=True)
    (patch / "src/test/training_tests.cpp").write_text("int main() { return 0; }\n")
    lists = tree / "CMakeLists.txt"
    names = {"test_training", "training_check", "fuzz_training"}
    targets = "".join(f"add_executable({name} src/test/training_tests.cpp)\n" for name in sorted(names))
    lists.write_text(lists.read_text() + targets)
    programs = build_node(NodeKind(source=tree, patch=patch)) / "bin"
    assert {program.name for program in programs.iterdir()} == {"bitcoind", "bitcoin-cli", *names}


def test_unchanged_patch_is_not_built_again(sdist: Path, patch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_node(NodeKind(source=sdist, patch=patch))
    monkeypatch.setenv("PATH", "")  # without any program
    assert build_node(NodeKind(source=sdist, patch=patch)) == folder


def test_another_patch_source_or_flag_is_another_build(
    sdist: Path, tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [
        node_folder(NodeKind(source=sdist, patch=patch)),
        node_folder(NodeKind(source=tree, patch=patch)),
        node_folder(NodeKind("28", patch=patch)),
    ]
    for name in ("src/new.cpp", "test/functional/feature_new.py", "patches/01.patch"):
        (patch / name).parent.mkdir(parents=True, exist_ok=True)
        for content in ("// one\n", "// two\n"):
            (patch / name).write_text(content)
            folders.append(node_folder(NodeKind(source=sdist, patch=patch)))
    monkeypatch.setenv("CXXFLAGS", "-O0")
    folders.append(node_folder(NodeKind(source=sdist, patch=patch)))
    assert len(set(folders)) == len(folders)
    monkeypatch.delenv("CXXFLAGS")
    (patch / "patches/README.md").write_text("not part of a build")
    assert node_folder(NodeKind(source=sdist, patch=patch)) in folders


def test_without_a_source_the_pinned_one_is_meant(sdist: Path, patch: Path) -> None:
    assert node_folder(NodeKind(patch=patch)) == node_folder(NodeKind(source=sdist, patch=patch))


def test_two_builds_at_once_build_once(sdist: Path, patch: Path, cache: Path) -> None:
    builds = [start_build(sdist, patch) for _ in range(2)]
    printed = [build.communicate(timeout=60)[0].splitlines() for build in builds]
    assert [build.returncode for build in builds] == [0, 0]
    assert {lines[-1] for lines in printed} == {str(node_folder(NodeKind(source=sdist, patch=patch)))}
    assert sum(lines.count("configuring") for lines in printed) == 1
    assert only_keeps(cache, "nodes", "logs")


def test_compiler_error_is_told_and_the_log_kept(tree: Path, patch: Path, cache: Path) -> None:
    (tree / "src/main.cpp").write_text("int main() { return nonsense; }\n")
    with pytest.raises(BuildError, match=r"ninja failed: .*'nonsense' was not declared") as raised:
        build_node(NodeKind(source=tree, patch=patch))
    log = Path(str(raised.value).rpartition("The full log is ")[2])
    assert "nonsense" in log.read_text()
    assert only_keeps(cache, "logs")


def test_configuration_error_is_told(tree: Path, patch: Path, cache: Path) -> None:
    lists = tree / "CMakeLists.txt"
    lists.write_text(lists.read_text() + "find_package(Nowhere REQUIRED)\n")
    with pytest.raises(BuildError, match=r"(?s)cmake failed: CMake Error at .*Nowhere"):
        build_node(NodeKind(source=tree, patch=patch))
    assert only_keeps(cache, "logs")


def test_bad_patch_or_source_leaves_nothing(tree: Path, patch: Path, cache: Path) -> None:
    (patch / "patches/01-bad.patch").write_text("no patch\n")
    with pytest.raises(BuildError, match=r"01-bad\.patch: does not apply"):
        build_node(NodeKind(source=tree, patch=patch))
    (tree / "CMakeLists.txt").unlink()
    with pytest.raises(SourceError, match="not a source tree"):
        build_node(NodeKind(source=tree, patch=patch))
    assert only_keeps(cache)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_build_ends_its_compilers(
    signal_number: signal.Signals, tree: Path, patch: Path, cache: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "endless.h")  # nobody writes to it: the compiler waits
    (tree / "src/main.cpp").write_text(f'#include "{tmp_path}/endless.h"\nint main() {{ return 0; }}\n')
    build = start_build(tree, patch)
    wait_for(lambda: processes_with(str(cache / "build/out")), 30, "the compilers to run")
    wait_for(lambda: any("cc1plus" in each for each in processes_with(f"{tmp_path}")), 30, "a compiler to run")
    build.send_signal(signal_number)
    build.communicate(timeout=30)
    wait_for(lambda: not processes_with(str(cache)), 30, "the compilers to end", lambda: processes_with(str(cache)))
    if signal_number == signal.SIGINT:
        assert only_keeps(cache, "logs")
    (tree / "src/main.cpp").write_text("int main() { return 0; }\n")
    assert (build_node(NodeKind(source=tree, patch=patch)) / "bin/bitcoind").is_file()
    assert only_keeps(cache, "nodes", "logs")


def processes_with(text: str) -> list[str]:
    """The command lines of all running processes that work in, or on, something named so."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            place = str((process / "cwd").readlink())
        except OSError:
            continue  # it has ended
        if place.startswith(text) or (text in command and "build_node" not in command):
            found.append(command)
    return found


def only_programs(folder: Path, *names: str) -> str:
    """A PATH with these programs alone."""
    folder.mkdir()
    for name in names:
        program = shutil.which(name)
        assert program is not None
        (folder / name).symlink_to(program)
    return str(folder)


def test_missing_programs_are_named_before_anything_is_done(
    sdist: Path, patch: Path, cache: Path, tmp_path: Path
) -> None:
    path = only_programs(tmp_path / "bin", "cmake", "patch", "pkg-config", "setpriv", "cc")
    build = start_build(sdist, patch, PATH=path)
    printed, error = build.communicate(timeout=30)
    assert (build.returncode, printed) == (1, "")
    assert error == "not found: c++, ninja; on Debian: apt-get install build-essential ninja-build\n"
    assert not cache.exists()


def test_missing_library_is_named(sdist: Path, patch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"  # a real one, but it finds headers nowhere except in the tree's folder
    (tmp_path / "include/boost").mkdir(parents=True)
    for name in ("boost/version.hpp", "event2/event.h", "sqlite3.h"):
        (tmp_path / "include" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "include" / name).write_text("")
    compiler.write_text(f'#!/bin/sh\nexec c++ -nostdinc -I{tmp_path}/include "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BuildError, match=r"^not found: zmq\.h; on Debian: apt-get install libzmq3-dev$"):
        build_node(NodeKind(source=sdist, patch=patch))


def test_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user was chosen by number."""

    def unknown(_: int) -> None:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(BuildError, match="this user has no home folder: set XDG_CACHE_HOME"):
        cache_folder()
