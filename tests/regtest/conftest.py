"""A source tree that real cmake and ninja build in a second, with the target names of Bitcoin Core's."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest

from traincert.regtest.build import cache_folder

CMAKE_LISTS = """\
cmake_minimum_required(VERSION 3.22)
project(fake CXX)
set(CLIENT_VERSION_MAJOR 31)
set(CLIENT_VERSION_MINOR 99)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_executable(bitcoind src/main.cpp)
add_executable(bitcoin-cli src/main.cpp)
file(WRITE ${CMAKE_BINARY_DIR}/test/config.ini "SRCDIR=${CMAKE_SOURCE_DIR}\\nBUILDDIR=${CMAKE_BINARY_DIR}\\n")
"""
MAIN_CPP = """\
#include <cstdio>

int main()
{
    std::puts("upstream");
    return 0;
}
"""
# As little of a Python project as pip needs to fetch its source distribution.
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = """\
import os
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "py_bitcoinkernel-0.1.0a5.dist-info"
    os.mkdir(f"{folder}/{name}")
    with open(f"{folder}/{name}/METADATA", "w") as file:
        file.write("Metadata-Version: 2.1\\nName: py-bitcoinkernel\\nVersion: 0.1.0a5\\n")
    return name
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, unless it wants the real node or source."""
    if not {"node_programs", "real_cache"} & set(request.fixturenames):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "traincert"


@pytest.fixture
def real_cache() -> Path:
    """The user's own cache."""
    return cache_folder()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A plain tree."""
    tree = tmp_path / "tree"
    (tree / "src").mkdir(parents=True)
    (tree / "test/functional").mkdir(parents=True)
    (tree / "CMakeLists.txt").write_text(CMAKE_LISTS)
    (tree / "src/main.cpp").write_text(MAIN_CPP)
    (tree / "test/functional/feature_upstream.py").write_text("")
    return tree


@pytest.fixture
def sdist(tmp_path: Path, tree: Path) -> Path:
    """A source distribution that carries the tree."""
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "backend.py").write_text(BACKEND)
    (tmp_path / "links").mkdir()
    sdist = tmp_path / "links/py_bitcoinkernel-0.1.0a5.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(tree, "py_bitcoinkernel-0.1.0a5/depend/bitcoin")
        for name in ("pyproject.toml", "backend.py"):
            archive.add(tmp_path / name, f"py_bitcoinkernel-0.1.0a5/{name}")
    return sdist


@pytest.fixture
def patch(tmp_path: Path, sdist: Path) -> Path:
    """A patch folder, without patches, that pins the source distribution."""
    patch = tmp_path / "patch"
    (patch / "patches").mkdir(parents=True)
    (patch / "upstream.toml").write_text(f"""\
[31]
name = "py-bitcoinkernel"
version = "0.1.0a5"
sha256 = "{hashlib.sha256(sdist.read_bytes()).hexdigest()}"
folder = "depend/bitcoin"
tree_version = "31.99"
[28]
name = "py-bitcoinkernel"
version = "0.1.0a1"
sha256 = "{"0" * 64}"
folder = "depend/bitcoin"
tree_version = "28.99"
""")
    return patch
