"""The source is the pinned one, or an error."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from traincert.regtest.errors import SourceError
from traincert.regtest.source import Upstream, fetch, identify, unpack


@pytest.fixture
def upstream(patch: Path) -> Upstream:
    return Upstream.load(patch / "upstream.toml")


@pytest.fixture
def only_links(sdist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds the test's source distribution and nothing else."""
    for name in ("PIP_CONFIG_FILE", "PIP_CONSTRAINT"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(sdist.parent))


@pytest.mark.usefixtures("only_links")
def test_fetched_with_pip_once(upstream: Upstream, sdist: Path, tmp_path: Path) -> None:
    kept = fetch(upstream, tmp_path / "sources")
    assert kept.read_bytes() == sdist.read_bytes()
    sdist.unlink()
    assert fetch(upstream, tmp_path / "sources") == kept
    assert list((tmp_path / "sources").iterdir()) == [kept]


@pytest.mark.usefixtures("only_links")
def test_damaged_copy_is_fetched_again(upstream: Upstream, sdist: Path, tmp_path: Path) -> None:
    kept = fetch(upstream, tmp_path / "sources")
    kept.write_bytes(b"damaged")
    assert fetch(upstream, tmp_path / "sources").read_bytes() == sdist.read_bytes()


@pytest.mark.usefixtures("only_links")
def test_wrong_hash_is_refused(upstream: Upstream, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as raised:
        fetch(replace(upstream, sha256="0" * 64), tmp_path / "sources")
    assert str(raised.value) == (
        f"py-bitcoinkernel==0.1.0a5: sha256 is {upstream.sha256}, upstream.toml pins {'0' * 64}"
    )
    assert list((tmp_path / "sources").iterdir()) == []


@pytest.mark.usefixtures("only_links")
def test_unknown_version_gives_pips_reason(upstream: Upstream, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"pip cannot fetch py-bitcoinkernel==9: ERROR: .*py-bitcoinkernel==9"):
        fetch(replace(upstream, version="9"), tmp_path / "sources")


def test_users_copy_of_the_pinned_file_must_be_it(upstream: Upstream, sdist: Path) -> None:
    assert identify(sdist, upstream) == upstream.sha256
    sdist.write_bytes(sdist.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"upstream\.toml pins"):
        identify(sdist, upstream)


def test_users_tree_is_known_by_its_contents(upstream: Upstream, tree: Path) -> None:
    before = identify(tree, upstream)
    (tree / ".git").mkdir()
    (tree / ".git/HEAD").write_text("not part of the source")
    assert identify(tree, upstream) == before
    (tree / "src/main.cpp").write_text("int main() {}\n")
    assert identify(tree, upstream) != before


def test_missing_source_is_named(upstream: Upstream, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere\.tar\.gz: No such file or directory"):
        identify(tmp_path / "nowhere.tar.gz", upstream)


@pytest.mark.parametrize("form", ["tree", "folder of a source distribution", "source distribution", "plain tarball"])
def test_every_form_unpacks_to_the_same_tree(
    form: str, upstream: Upstream, tree: Path, sdist: Path, tmp_path: Path
) -> None:
    source = {
        "tree": tree,
        "folder of a source distribution": tmp_path / "unpacked",
        "source distribution": sdist,
        "plain tarball": tmp_path / "bitcoin.tar.xz",
    }[form]
    (tmp_path / "unpacked/depend").mkdir(parents=True)
    (tmp_path / "unpacked/depend/bitcoin").symlink_to(tree)
    with tarfile.open(tmp_path / "bitcoin.tar.xz", "w:xz") as archive:
        archive.add(tree, "bitcoin-31.99")
    unpack(source, upstream, tmp_path / "out")
    assert identify(tmp_path / "out", upstream) == identify(tree, upstream)


def test_programs_stay_executable(upstream: Upstream, tree: Path, tmp_path: Path) -> None:
    (tree / "run.sh").write_text("#!/bin/sh\n")
    (tree / "run.sh").chmod(0o775)
    with tarfile.open(tmp_path / "bitcoin.tar", "w") as archive:
        archive.add(tree, "bitcoin-31.99")
    unpack(tmp_path / "bitcoin.tar", upstream, tmp_path / "out")
    assert (tmp_path / "out/run.sh").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out/CMakeLists.txt").stat().st_mode & 0o777 == 0o644


def test_other_version_is_refused(upstream: Upstream, tree: Path, tmp_path: Path) -> None:
    lists = tree / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace("MAJOR 31", "MAJOR 30"))
    with pytest.raises(SourceError, match=r"tree: Bitcoin Core 30\.99, expected 31\.99"):
        unpack(tree, upstream, tmp_path / "out")


def test_something_else_is_refused(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    with pytest.raises(SourceError, match="else: not a source tree of Bitcoin Core"):
        unpack(tmp_path / "else", upstream, tmp_path / "out")


def test_truncated_tarball_is_refused(upstream: Upstream, sdist: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.tar.gz"
    short.write_bytes(sdist.read_bytes()[:200])
    with pytest.raises(SourceError, match=r"short\.tar\.gz: damaged or not a tar archive"):
        unpack(short, upstream, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("../escaped", tarfile.REGTYPE, "it would write outside its folder"),
        ("bitcoin/../../escaped", tarfile.REGTYPE, "it would write outside its folder"),
        ("/tmp/escaped", tarfile.REGTYPE, "it would write outside its folder"),  # noqa: S108
        ("bitcoin/link", tarfile.SYMTYPE, "neither a file nor a folder"),
        ("bitcoin/link", tarfile.LNKTYPE, "neither a file nor a folder"),
        ("bitcoin/device", tarfile.CHRTYPE, "neither a file nor a folder"),
    ],
)
def test_hostile_tarball_writes_nothing(name: str, kind: bytes, why: str, upstream: Upstream, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.tar"
    with tarfile.open(hostile, "w") as archive:
        archive.addfile(tarfile.TarInfo("bitcoin/CMakeLists.txt"))
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member, io.BytesIO())
    with pytest.raises(SourceError, match=f"refused, {why}: {name}"):
        unpack(hostile, upstream, tmp_path / "deep/out")
    assert not (tmp_path / "deep").exists()
